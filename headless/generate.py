"""``nibble generate``: pictures from prompts, on the demo model or a diffusers folder, in 4 or 16 bits.

Only the command line's part is here, so that ``nibble --help`` need not load torch; the work is in `draw`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..sampling.detect import AUTO
from ..training.recipes import PRECISIONS
from .shown import bar

BATCH, MOST_STEPS, MOST_CFG = 4, 1000, 100.0


def add_command(subparsers) -> None:
    """Adds ``generate`` to the command line."""
    out = subparsers.add_parser("generate", help="draw pictures from a prompt")
    out.add_argument("prompt", nargs="*", help="one prompt per picture; quote each")
    out.add_argument("--prompts", type=Path, metavar="FILE", help="more of them: a prompt a line, or .jsonl or .csv")
    out.add_argument("--negative", help="what to keep out of the picture, where cfg is above 1 (default: the domain's)")
    out.add_argument("--domain", help="expand the prompts by this domain's template, e.g. emoji, or a YAML file")
    model = out.add_argument_group("the model")
    model.add_argument("--model", type=Path, help="diffusers pipeline folder (default: the shipped demo model)")
    model.add_argument("--quantized", type=Path, help="4-bit file made from that model by nibble quantize")
    model.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="without --quantized: quantize now or not"
    )
    model.add_argument("--rank", type=int, default=32, help="rank when quantizing now (default 32)")
    model.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be given several times"
    )
    model.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    run = out.add_argument_group("sampling")
    run.add_argument(
        "--preset", default=AUTO, metavar="ID", help="few-step preset: auto (default) takes the one that the LoRAs' "
        "metadata and the files' names say; none; or an id of docs/few-step.md",
    )  # fmt: skip
    run.add_argument("--lcm", action="store_true", help="LCM; for the demo model its LCM LoRA is added, unless a LoRA "
                     "given is a distillation itself")  # fmt: skip
    run.add_argument("--steps", type=int, help="default: the preset's; 25 or so without one")
    run.add_argument("--cfg", type=float, help="guidance scale, 1 for none (default: the preset's; else the model's "
                     "usual one, 3 for the demo)")  # fmt: skip
    run.add_argument("--guidance", type=float, help="scale that is built into FLUX.1-dev, FLUX.2-dev and full LCMs")
    run.add_argument("--seed", type=int, default=0, help="of the first picture; each next one takes the next seed")
    run.add_argument("--width", type=int, help="pixels (default: the domain's, else the model's own)")
    run.add_argument("--height", type=int, help="likewise")
    run.add_argument("--batch", type=int, default=BATCH, help=f"pictures at once (default {BATCH})")
    more = out.add_argument_group("from pictures")
    more.add_argument("--image", type=Path, metavar="PICTURE", help="start from this picture")
    more.add_argument("--strength", type=float, help="how much of it is drawn anew, up to 1 (default 0.6; 1 with a "
                      "mask)")  # fmt: skip
    more.add_argument("--mask", type=Path, metavar="PICTURE", help="draw anew only where this is white")
    more.add_argument("--controlnet", type=Path, metavar="FOLDER", help="a ControlNet in diffusers' layout")
    more.add_argument("--control", type=Path, metavar="PICTURE", help="what it follows: edges, depth, a pose ...")
    more.add_argument("--control-strength", type=float, default=1.0, help="default 1")
    more.add_argument("--ip-adapter", type=Path, metavar="FOLDER", help="an IP-Adapter, image_encoder/ beside it")
    more.add_argument("--ip-picture", type=Path, metavar="PICTURE", help="the picture that it prompts with")
    more.add_argument("--ip-strength", type=float, default=1.0, help="default 1")
    out.add_argument("--out", type=Path, default=Path("nibble-out"), help="folder for the pictures")
    out.set_defaults(run=run_generate)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError in one sentence for numbers that cannot be drawn with, before anything is loaded."""
    if not args.prompt and args.prompts is None:
        raise ValueError("there is nothing to draw: give a prompt, or --prompts FILE")
    if args.lcm and args.preset != AUTO:
        raise ValueError(f"--lcm is a preset itself: leave it or --preset {args.preset} out")
    for name, value, least, most in (
        ("--steps", args.steps, 1, MOST_STEPS),
        ("--cfg", args.cfg, 1, MOST_CFG),
        ("--guidance", args.guidance, 0, MOST_CFG),
        ("--batch", args.batch, 1, 256),
        ("--seed", args.seed, 0, 2**63 - 1),
        ("--rank", args.rank, 0, 1024),
        ("--control-strength", args.control_strength, 0, 10),
        ("--ip-strength", args.ip_strength, 0, 10),
    ):
        if value is not None and not least <= value <= most:
            hint = "; 1 means no guidance, which diffusers also calls 0" if name == "--cfg" and value < 1 else ""
            raise ValueError(f"{name} {value:g}: give {least:g} to {most:g}{hint}")
    for name in ("image", "mask", "control", "ip_picture"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name.replace('_', '-')} {path.name}: there is no such file")
    for name in ("model", "controlnet", "ip_adapter"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise ValueError(f"--{name.replace('_', '-')} {path.name}: there is no such folder")


def run_generate(args: argparse.Namespace) -> None:
    """``nibble generate``: prints the path of each picture as it is written."""
    check(args)
    with bar(1, "loading") as progress:
        from . import draw

        def start(total: int) -> None:
            progress.set_description("steps")
            progress.reset(total)

        def say(sentence: str) -> None:
            progress.write(f"nibble: {sentence}", file=sys.stderr)

        for path in draw.draw(args, start, progress.update, say):
            progress.write(str(path), file=sys.stdout)
