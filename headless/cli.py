"""The command line: ``nibble demo | quantize | generate | inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..reading.names import shown
from . import convert, distill, doctor, generate, profile, prompts, quiet, train

OFFERED = ("data_free", "fast", "best")  # quant.calib.presets.OFFERED, said again so that --help need not load torch
TARGETS = (
    "svdquant_w4a4",
    "nvfp4",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "int8_tensorwise",
)  # quant.policy.TARGETS, likewise


def _add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="run the main job on the shipped model, in a minute on a CPU")
    demo.add_argument(
        "--out", type=Path, default=Path("nibble-demo"), help="folder for demo.png, profile.png, report.json"
    )
    demo.set_defaults(run=run_demo)


def _add_quantize(commands) -> None:
    quantize = commands.add_parser("quantize", help="write a 4-bit file of a checkpoint or diffusers folder")
    quantize.add_argument(
        "source", type=Path, help="safetensors checkpoint, diffusers pipeline folder, or its unet/transformer"
    )
    quantize.add_argument("--out", type=Path, required=True, help="the safetensors file to write; never overwritten")
    quantize.add_argument("--rank", type=int, default=32, help="rank of the low-rank branch (default 32)")
    quantize.add_argument("--seed", type=int, default=0, help="seed of the randomised SVD (default 0)")
    quantize.add_argument(
        "--target", choices=TARGETS, default=TARGETS[0], help="format; stock ComfyUI runs all but the first"
    )
    quantize.add_argument("--tile-packed", action="store_true", help="kitchen's tile-packed order where N %% 128 == 0")
    quantize.add_argument("--device", help="where to compute: cuda or cpu (default: a GPU if there is one)")
    quantize.add_argument(
        "--preset",
        choices=OFFERED,
        default="data_free",
        help="how hard to try; fast and best draw prompts with the pipeline folder given as source (default data_free)",
    )
    quantize.add_argument("--prompts", type=Path, help="text file, a prompt a line (default: the pack's own list)")
    quantize.add_argument("--domain", help="calibrate with this domain's prompts, e.g. food")
    quantize.add_argument("--samples", type=int, default=16, help="prompts to draw while calibrating (default 16)")
    quantize.add_argument("--levels", type=int, default=8, help="sampling steps of each (default 8)")
    quantize.add_argument("--cfg", type=float, default=3.0, help="guidance scale while calibrating (default 3)")
    quantize.add_argument("--budget", type=float, default=0, metavar="MIB", help="the file takes at most so much")
    quantize.add_argument("--report", type=Path, help="HTML page to write: the error of each layer")
    quantize.set_defaults(run=run_quantize)


def _add_inspect(commands) -> None:
    inspect = commands.add_parser("inspect", help="say what a model file is, layer by layer")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=run_inspect)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="nibble", description="4-bit diffusion: quantize, generate, inspect.")
    commands = top.add_subparsers(dest="command", required=True)
    for add in (_add_demo, _add_quantize, _add_inspect):
        add(commands)
    for topic in (generate, convert, prompts, profile, train, distill, doctor):
        topic.add_command(commands)
    return top


def bar(total: int, what: str):
    from tqdm import tqdm

    return tqdm(total=total, desc=what, file=sys.stderr, leave=False)


def run_demo(args) -> None:
    from . import demo

    with bar(2 * demo.STEPS, "steps") as progress:
        report = demo.run(args.out, progress.set_description, progress.update)
    print(demo.table(report))
    for name in ("demo.png", "profile.png", "report.json"):
        print(args.out / name)


def run_quantize(args) -> None:
    from ..checkpoints.convert import Options, quantize
    from ..checkpoints.save import require_free
    from ..checkpoints.source import open_source
    from .pipeline import device_and_dtype

    require_free(args.out)
    if args.preset != "data_free":
        if args.target != TARGETS[0]:
            raise ValueError("--target goes with --preset data_free: calibration is for svdquant_w4a4")
        return run_calibrate(args)
    if args.budget or args.report or args.prompts or args.domain:
        raise ValueError("--budget, --report, --prompts and --domain measure layers: add --preset fast or best")
    device, _ = device_and_dtype(args.device)
    with open_source(args.source) as source, bar(len(source.shapes), source.family.title) as progress:

        def update(done: int, total: int, name: str) -> None:
            progress.update(done + 1 - progress.n)

        tiled, target = args.tile_packed, args.target
        options = Options(rank=args.rank, seed=args.seed, tiled=tiled, device=device, target=target)
        result = quantize(source, args.out, options, update)
    print(result.summary())
    print(result.path)


def run_calibrate(args) -> None:
    """``nibble quantize --preset fast``: the pipeline draws prompts while its layers are watched."""
    from ..checkpoints.convert import Options
    from ..checkpoints.source import open_source
    from ..quant.calib import report
    from ..quant.calib.presets import preset
    from ..writing import whole
    from . import calibrate, pipeline

    texts = calibrate.texts(args.prompts, args.domain, args.samples, args.seed)
    with open_source(args.source) as source, bar(1, "loading") as progress:
        pipe = pipeline.load_pipeline(calibrate.pipeline_folder(args.source, source), args.device)

        def say(layer, done: int, total: int) -> None:
            progress.total = total
            progress.set_description(layer.name)
            progress.update(done - progress.n)

        inputs = calibrate.Inputs(texts, args.levels, args.cfg, args.seed)
        options = Options(rank=args.rank, seed=args.seed, tiled=args.tile_packed, device=str(pipe.device))
        budget = round(args.budget * 2**20)
        result, layers = calibrate.run(source, pipe, inputs, preset(args.preset), options, args.out, budget, say)
    print(report.summary(layers, args.preset))
    print(result.summary())
    if args.report:
        whole.text(args.report, report.page(layers, args.preset, f"{args.out.name}: error by layer"))
        print(args.report)
    print(result.path)


def run_inspect(args) -> None:
    from ..checkpoints.inspect import inspect

    found = inspect(args.file)
    print(found.to_json() if args.json else found.table())


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
