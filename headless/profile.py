"""``nibble profile``: measures a pipeline on this machine and fits the constants that estimates use.

Only the command line's part is here, so that ``nibble --help`` need not load torch; the work is in `measure`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .shown import say


def add_command(commands) -> None:
    """Adds the command to argparse's subparsers."""
    p = commands.add_parser("profile", help="measure speed and memory here, and fit the constants of estimates")
    p.add_argument("--model", type=Path, help="diffusers pipeline folder (default: the shipped demo model)")
    p.add_argument("--precision", choices=["16-bit", "4-bit", "both"], default="both")
    p.add_argument("--rank", type=int, default=32, help="rank of the 4-bit layers' 16-bit branch (default 32)")
    p.add_argument(
        "--size", type=int, nargs="+", help="picture sizes in pixels (default: the model's own, and twice it)"
    )
    p.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    p.add_argument(
        "--steps", type=int, nargs="+", default=[2, 6], help="steps of the runs that are fitted (default 2 6)"
    )
    p.add_argument("--check", type=int, nargs="*", default=[4, 10], help="steps of runs to predict, then measure")
    p.add_argument("--cfg", type=float, default=3.0, help="guidance scale; above 1 runs two rows a picture (default 3)")
    p.add_argument("--repeat", type=int, default=2, help="the fastest of so many runs counts (default 2)")
    p.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    p.add_argument("--out", type=Path, default=Path("nibble-profile"), help="folder for the calibration, table, chart")
    p.set_defaults(run=run)


def run(args) -> None:
    """Measures, writes three files to ``args.out``, prints the table."""
    from .measure import profile

    result = profile(args, lambda text: say(text, to=sys.stderr))
    say(result.text, *result.files)
