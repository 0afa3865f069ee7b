"""``nibble quantize``: a 4-bit file of a checkpoint or a diffusers folder, from its weights alone or calibrated."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..quant.calib.presets import OFFERED
from ..quant.schemes import TARGETS
from .shown import add_prompts, bar, say

FREE = OFFERED[0]


def add_command(commands) -> None:
    """Adds ``quantize`` to the command line."""
    out = commands.add_parser("quantize", help="write a 4-bit file of a checkpoint or diffusers folder")
    out.add_argument(
        "source", type=Path, help="safetensors checkpoint, diffusers pipeline folder, or its unet/transformer"
    )
    out.add_argument("--out", type=Path, required=True, help="the safetensors file to write; never overwritten")
    out.add_argument("--rank", type=int, default=32, help="rank of the low-rank branch (default 32)")
    out.add_argument("--seed", type=int, default=0, help="seed of the randomised SVD (default 0)")
    out.add_argument(
        "--target", choices=TARGETS, default=TARGETS[0], help="format; stock ComfyUI runs all but the first"
    )
    out.add_argument("--tile-packed", action="store_true", help="kitchen's tile-packed order where N %% 128 == 0")
    out.add_argument("--device", help="where to compute: cuda or cpu (default: a GPU if there is one)")
    out.add_argument(
        "--preset",
        choices=OFFERED,
        default=FREE,
        help="how hard to try; fast and best draw prompts with the pipeline folder given as source (default data_free)",
    )
    add_prompts(out, 16)
    out.add_argument("--levels", type=int, default=8, help="sampling steps of each (default 8)")
    out.add_argument("--cfg", type=float, default=3.0, help="guidance scale while calibrating (default 3)")
    out.add_argument("--budget", type=float, default=0, metavar="MIB", help="the file takes at most so much")
    out.add_argument("--report", type=Path, help="HTML page to write: the error of each layer")
    out.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.save import require_free

    require_free(args.out)
    if args.preset != FREE:
        return run_calibrate(args)
    if args.budget or args.report or args.prompts or args.domain:
        raise ValueError("--budget, --report, --prompts and --domain measure layers: add --preset fast or best")
    from ..checkpoints.convert import Options, quantize
    from ..checkpoints.source import open_source
    from .pipeline import device_and_dtype

    device, _ = device_and_dtype(args.device)
    with open_source(args.source) as source, bar(len(source.shapes), source.family.title) as progress:

        def update(done: int, total: int, name: str) -> None:
            progress.update(done + 1 - progress.n)

        options = Options(args.rank, args.seed, args.tile_packed, device, target=args.target)
        result = quantize(source, args.out, options, update)
    say(result.summary(), result.path)


def run_calibrate(args: argparse.Namespace) -> None:
    """``--preset fast``: the pipeline draws prompts while its layers are watched."""
    from ..calibration import report
    from ..checkpoints.source import open_source
    from ..writing import whole
    from . import calibrate, pipeline

    texts = calibrate.texts(args.prompts, args.domain, args.samples, args.seed)
    settings = calibrate.Settings(
        args.preset, args.target, args.rank, round(args.budget * 2**20), args.levels, args.cfg, args.seed
    )
    with open_source(args.source) as source, bar(1, "loading") as progress:
        pipe = pipeline.load_pipeline(calibrate.pipeline_folder(args.source, source), args.device)

        def update(layer, done: int, total: int) -> None:
            progress.total = total
            progress.set_description(layer.name)
            progress.update(done - progress.n)

        subject = calibrate.subject_of(source, pipe, texts, settings)
        done = calibrate.run(source, subject, settings, args.out, args.tile_packed, update)
    say(report.summary(done.layers, args.preset), done.made.summary())
    if args.report:
        whole.text(args.report, report.page(done.layers, args.preset, f"{args.out.name}: error by layer"))
        say(args.report)
    say(done.made.path)
