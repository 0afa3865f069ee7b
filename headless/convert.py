"""``nibble convert``: 4-bit files of other packs, rewritten in ComfyUI's per-layer contract."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shown import bar, say


def add_command(subparsers) -> None:
    """Adds ``convert`` to the command line."""
    convert = subparsers.add_parser("convert", help="rewrite a 4-bit file of another pack for ComfyUI, codes unchanged")
    convert.add_argument("source", type=Path, help="nunchaku, Nunchaku Lite, bitsandbytes or GGUF file or folder")
    convert.add_argument("--out", type=Path, required=True, help="the safetensors file to write; never overwritten")
    convert.add_argument("--requantize", action="store_true", help="make int4 of GGUF, NF4 and nvfp4 layers")
    convert.add_argument("--rank", type=int, default=32, help="with --requantize: rank of the branch (default 32)")
    convert.add_argument("--seed", type=int, default=0, help="with --requantize: seed of the randomised SVD")
    convert.add_argument("--tile-packed", action="store_true", help="kitchen's tile-packed order where N %% 128 == 0")
    convert.add_argument("--device", default="cpu", help="with --requantize: where to compute (default cpu)")
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.repack import Options, repack

    options = Options(args.requantize, args.rank, args.seed, args.tile_packed, args.device)
    with bar(None, "layers") as progress:

        def update(done: int, total: int, name: str) -> None:
            progress.total = total
            progress.update(done + 1 - progress.n)

        result = repack(args.source, args.out, options, update)
    say(result.summary(), result.path)
