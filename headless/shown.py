"""What commands have in common: what they print, and flags whose defaults are a recipe's."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from ..training.recipes import PRECISIONS


def say(*lines: object, to=None) -> None:
    stream = to or sys.stdout
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()


def bar(total: int | None, what: str):
    from tqdm import tqdm

    return tqdm(total=total, desc=what, file=sys.stderr, leave=False)


def follow(progress):
    """What training calls: after each step, and before it for what is made first."""

    def step(done: int, _total: int, loss: float) -> None:
        progress.set_postfix(loss=f"{loss:.4f}")
        progress.update(done - progress.n)

    return step, lambda what, done, total: progress.set_description(f"{what} {done}/{total}")


def add_options(parser: argparse.ArgumentParser, row, **texts: str) -> None:
    """A flag for each field of a recipe ``row`` that ``texts`` has, which explains it."""
    for name, text in texts.items():
        value, flag = getattr(row, name), "--" + name.replace("_", "-")
        shown = f"{value:g}" if isinstance(value, float) else value
        parser.add_argument(flag, type=type(value), default=value, help=f"{text} (default {shown})")


def add_base(parser: argparse.ArgumentParser, made_now: bool = True) -> None:
    """Flags that say which model is worked on; ``made_now``: its 4-bit form may be."""
    parser.add_argument("--model", type=Path, help="diffusers pipeline folder (default: the shipped demo model)")
    parser.add_argument("--quantized", type=Path, help="4-bit file made from that model by nibble quantize")
    if made_now:
        parser.add_argument(
            "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the base (default 4-bit)"
        )
        parser.add_argument("--base-rank", type=int, default=32, help="rank when quantizing the base now (default 32)")
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")


def add_prompts(parser: argparse.ArgumentParser, count: int) -> None:
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line (default: the pack's own list)")
    parser.add_argument("--domain", help="this domain's prompts instead, e.g. food")
    parser.add_argument("--samples", type=int, default=count, help=f"how many prompts (default {count})")


def precision_of(args: argparse.Namespace) -> str:
    return PRECISIONS[0] if args.quantized is not None else args.precision


def rate_of(args: argparse.Namespace, usual: float, demo: float) -> float:
    """The learning rate that a person set, or what suits the model: ``demo`` where it is the shipped one."""
    given = demo if args.model is None else usual
    return given if args.rate is None else args.rate


def recipe(row, args: argparse.Namespace, **more):
    """``row`` with what ``args`` say, and ``more``."""
    told = {f.name: getattr(args, f.name) for f in fields(row) if getattr(args, f.name, None) is not None}
    return type(row)(**{**vars(row), **told, **more})


def place_of(args: argparse.Namespace):
    """Where a training command's file goes, and beside it what an unfinished one keeps."""
    from ..training.job import Place, to_file

    root = args.work or args.out.with_name(f".{args.out.name}.work")
    return Place(root, args.out.stem, to_file(args.out))


def require_room(out: Path, size: int = 0) -> None:
    """Raises ValueError where ``out`` exists, or does not fit on the disk."""
    from ..checkpoints.save import require_free
    from ..writing.room import check_room

    require_free(out)
    check_room(out, size)
