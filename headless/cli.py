"""The command line: ``nibble demo | quantize | generate | inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..reading.names import shown
from . import convert, demo, distill, doctor, generate, inspect, profile, prompts, quantize, quiet, train

COMMANDS = (demo, quantize, inspect, generate, convert, prompts, profile, train, distill, doctor)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="nibble", description="4-bit diffusion: quantize, generate, inspect.")
    commands = top.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_command(commands)
    return top


def sentence(error: Exception) -> str:
    """What went wrong; for an error of the disk, with the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{shown(Path(str(error.filename or '')).name) or 'the disk'}: {error.strerror}"
    return str(error)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; a bad file or value ends in one sentence and exit status 1."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
    args = parser().parse_args(argv)
    try:
        with quiet.quiet():
            args.run(args)
    except (ValueError, OSError) as e:
        print(f"nibble: {sentence(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nibble: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
