"""``nibble demo``: what the pack does, on the model that ships with it. The work is in `showcase`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shown import bar, say


def add_command(commands) -> None:
    """Adds ``demo`` to the command line."""
    out = commands.add_parser("demo", help="run the main job on the shipped model, in a minute on a CPU")
    out.add_argument(
        "--out", type=Path, default=Path("nibble-demo"), help="folder for demo.png, profile.png, report.json"
    )
    out.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from . import showcase

    with bar(2 * showcase.STEPS, "steps") as progress:
        report = showcase.run(args.out, progress.set_description, progress.update)
    say(showcase.table(report), *(args.out / name for name in ("demo.png", "profile.png", "report.json")))
