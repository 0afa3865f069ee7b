"""``nibble inspect``: what a model file is."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shown import say


def add_command(commands) -> None:
    """Adds ``inspect`` to the command line."""
    out = commands.add_parser("inspect", help="say what a model file is, layer by layer")
    out.add_argument("file", type=Path)
    out.add_argument("--json", action="store_true", help="print JSON instead of a table")
    out.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.inspect import inspect

    found = inspect(args.file)
    say(found.to_json() if args.json else found.table())
