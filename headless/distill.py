"""``nibble distill`` and ``nibble refine``: fewer steps, and better 4-bit weights, for diffusers pipelines."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..training.recipes import DEMO_RATE, DEMO_RATES, DISTILL, PRECISIONS, REFINE, WAYS
from .shown import (
    add_base,
    add_options,
    add_prompts,
    bar,
    follow,
    place_of,
    precision_of,
    rate_of,
    recipe,
    require_room,
    say,
)

log = logging.getLogger(__name__)


def add_command(subparsers) -> None:
    """Adds ``distill`` and ``refine`` to the command line."""
    out = subparsers.add_parser("distill", help="train a LoRA for few steps, on 4-bit weights")
    out.add_argument(
        "--way", choices=list(WAYS), default=DISTILL.way, help="lcf learns from --pictures, others from a model"
    )
    out.add_argument("--out", type=Path, required=True, help="the LoRA to write (.safetensors); never overwritten")
    out.add_argument("--pictures", type=Path, help="folder of captioned pictures to learn from (for lcf)")
    out.add_argument("--rate", type=float, help=f"learning rate (default {DISTILL.rate:g}; {DEMO_RATE:g} for the demo)")
    add_options(
        out,
        DISTILL,
        updates="updates of the LoRA",
        rank="rank of the LoRA",
        batch="pictures an update",
        cfg="guidance scale, as the model is sampled",
        steps="steps that are aimed at",
        start="progressive: steps of the first teacher",
        pairs="pictures the teacher draws",
        teacher_steps="steps of each of those",
        seed="of noise, order and first values",
    )
    out.add_argument("--work", type=Path, help="folder of what is resumed (default: beside --out)")
    add_base(out)
    add_prompts(out, 32)
    out.set_defaults(run=run_distill)
    out = subparsers.add_parser("refine", help="bring a 4-bit file closer to its 16-bit original, without data")
    out.add_argument("--out", type=Path, required=True, help="the 4-bit file to write; never overwritten")
    add_options(
        out,
        REFINE,
        updates="updates",
        batch="states an update",
        rate="learning rate, as a share",
        stops="noise levels of each prompt",
        cfg="guidance scale, as the model is sampled",
        seed="of noise and order",
    )
    add_base(out, made_now=False)
    add_prompts(out, 200)
    out.set_defaults(run=run_refine)


def run_distill(args: argparse.Namespace) -> None:
    from ..training import distill, job
    from ..training.loop import Watch
    from . import base

    require_room(args.out)
    row = recipe(DISTILL, args, rate=rate_of(args, DISTILL.rate, DEMO_RATES.get(args.way, DEMO_RATE)))
    teacher = base.load(args, PRECISIONS[1])
    precision = precision_of(args)
    pipe = teacher if precision == PRECISIONS[1] else base.load(args, precision)
    require_room(args.out, job.file_bytes(pipe.unet, row.rank))
    for one in (pipe, teacher):
        one.unet.to(one.vae.device)
    models = base.base_of(pipe), None if pipe is teacher else base.base_of(teacher)
    with bar(row.updates, "updates") as progress:
        step, tell = follow(progress)
        prompts = base.prompts(pipe, args, args.pictures)
        made = distill.run(models, prompts, row, place_of(args), Watch(step), tell)
    for note in filter(None, made.notes):
        log.warning(note)
    say(made.text, args.out)


def run_refine(args: argparse.Namespace) -> None:
    from ..training import refine
    from ..training.loop import Watch
    from . import base

    require_room(args.out)
    if args.quantized is None:
        raise ValueError("Refining needs a 4-bit file: give --quantized, made by nibble quantize")
    require_room(args.out, args.quantized.stat().st_size)
    row = recipe(REFINE, args)
    teacher, pipe = base.load(args, PRECISIONS[1]), base.load(args, PRECISIONS[0])
    for one in (pipe, teacher):
        one.unet.to(one.vae.device)
    with bar(row.updates, "updates") as progress:
        step, tell = follow(progress)
        prompts = base.prompts(pipe, args)
        asked = (prompts.cond, prompts.empty)
        made = refine.ask(base.base_of(teacher), asked, prompts.shape, row, tell)
        done = refine.run(base.base_of(pipe), asked, made, row, Watch(step))
    write(args.quantized, args.out, done, row)
    say(done.text, args.out)


def write(source: Path, out: Path, done, row) -> None:
    """The 4-bit file ``source`` again as ``out``, with the refined weights in place."""
    from dataclasses import replace

    from ..checkpoints.formats import comfy_quant
    from ..checkpoints.load import load
    from ..checkpoints.save import kept_info, save

    checkpoint = load(source)
    tensors = dict(checkpoint.dense)
    for name, stored in checkpoint.layers.items():
        native, weight = name.removeprefix("model.diffusion_model."), stored.weight
        if native in done.weights:
            weight = replace(done.weights[native].to(weight.wscales.dtype), qweight=weight.qweight)
        tensors |= comfy_quant.write(name, weight, stored.tiled)
    save(out, tensors, done.about(kept_info(checkpoint.metadata), row))
