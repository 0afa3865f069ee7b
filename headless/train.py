"""``nibble train``: a LoRA from a folder of captioned pictures, on a diffusers pipeline in 4 or 16 bits."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..training.recipes import DEMO_RATE, LORA, OPTIMIZERS, SCHEDULES
from .shown import add_base, add_options, bar, follow, place_of, precision_of, rate_of, recipe, require_room, say

log = logging.getLogger(__name__)


def add_command(subparsers) -> None:
    """Adds ``train`` to the command line."""
    out = subparsers.add_parser("train", help="train a LoRA on a folder of captioned pictures, on 4-bit weights")
    out.add_argument("folder", type=Path, help="pictures with captions: .txt beside each, or a .jsonl or .csv")
    out.add_argument("--out", type=Path, required=True, help="the LoRA to write (.safetensors); never overwritten")
    add_base(out)
    out.add_argument("--steps", dest="updates", type=int, default=LORA.updates,
                     help=f"updates of the LoRA (default {LORA.updates})")  # fmt: skip
    out.add_argument("--rate", type=float, help=f"learning rate (default {LORA.rate:g}; {DEMO_RATE:g} for the demo)")
    out.add_argument("--side", type=int, help="train at about side x side pixels (default: the model's own)")
    out.add_argument("--optimizer", choices=OPTIMIZERS, default=LORA.optimizer)
    out.add_argument("--schedule", choices=SCHEDULES, default=LORA.schedule, help="after the warm-up")
    add_options(
        out,
        LORA,
        batch="pictures a step",
        rank="rank of the LoRA; 0: whole matrices",
        accumulate="batches to an update",
        dropout="share of captions left empty",
        ema="decay of the weights' average, 0 for none",
        hold_out="share of pictures to validate with",
        seed="of order, noise and first values",
    )
    out.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=LORA.checkpointing,
                     help="less memory, about a third slower")  # fmt: skip
    out.add_argument("--keep-16-bit", dest="compress", action="store_false",
                     help="do not hold convolutions of a 4-bit base in 8 bits")  # fmt: skip
    out.add_argument("--work", type=Path, help="folder of the state to resume from (default: beside --out)")
    out.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..training import data, eight_bit, job, lora
    from ..training.loop import Watch
    from . import base

    require_room(args.out)
    pictures = data.examples(args.folder)  # what is wrong with it is said before the model is loaded
    pipe = base.load(args, precision_of(args))
    require_room(args.out, job.file_bytes(pipe.unet, args.rank))
    rate = rate_of(args, LORA.rate, DEMO_RATE)
    row = recipe(LORA, args, rate=rate, side=args.side or base.side_of(pipe))
    samples = base.samples(pipe, args.folder, row.side)
    with bar(row.updates, "steps") as progress, eight_bit.wanted(pipe.unet, row.compress):
        pipe.unet.to(pipe.vae.device)
        watch = Watch(follow(progress)[0])
        made = lora.run(base.base_of(pipe), samples, pictures, row, place_of(args), watch)
    for note in filter(None, made.notes):
        log.warning(note)
    say(made.text, args.out)
