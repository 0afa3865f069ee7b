"""``nibble distill`` and ``nibble refine``: fewer steps, and better 4-bit weights, for diffusers pipelines."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from . import train

log = logging.getLogger(__name__)
# training.distill.MODES, said again as --help needs it
WAYS = ("lcm", "lcf", "phased", "reflow", "one_step", "progressive")


def add_command(subparsers) -> None:
    """Adds ``distill`` and ``refine`` to the command line."""
    out = subparsers.add_parser("distill", help="train a LoRA for few steps, on 4-bit weights")
    out.add_argument("--way", choices=WAYS, default=WAYS[0], help="lcf learns from --pictures, the others from a model")
    out.add_argument("--out", type=Path, required=True, help="the LoRA to write (.safetensors); never overwritten")
    out.add_argument("--pictures", type=Path, help="folder of captioned pictures to learn from (for lcf)")
    out.add_argument("--precision", choices=train.PRECISIONS, default=train.PRECISIONS[0], help="of the base")
    out.add_argument("--updates", type=int, default=300, help="updates of the LoRA (default 300)")
    out.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    out.add_argument("--rate", type=float, default=1e-4, help="learning rate (default 0.0001)")
    out.add_argument("--steps", type=int, default=4, help="steps that are aimed at (default 4)")
    out.add_argument("--start", type=int, default=16, help="progressive: steps of the first teacher (default 16)")
    out.add_argument("--pairs", type=int, default=64, help="pictures the teacher draws (default 64)")
    out.add_argument("--teacher-steps", type=int, default=25, help="steps of each of those (default 25)")
    out.add_argument("--work", type=Path, help="folder of what is resumed (default: beside --out)")
    _common(out)
    out.set_defaults(run=run_distill)
    out = subparsers.add_parser("refine", help="bring a 4-bit file closer to its 16-bit original, without data")
    out.add_argument("--out", type=Path, required=True, help="the 4-bit file to write; never overwritten")
    out.add_argument("--updates", type=int, default=450, help="updates (default 450)")
    out.add_argument("--rate", type=float, default=1e-3, help="learning rate, as a share (default 0.001)")
    out.add_argument("--stops", type=int, default=6, help="noise levels of each prompt (default 6)")
    _common(out, samples=200, batch=12)
    out.set_defaults(run=run_refine)


def _common(out: argparse.ArgumentParser, samples: int = 32, batch: int = 4) -> None:
    out.add_argument("--model", type=Path, help="diffusers pipeline folder (default: the shipped demo model)")
    out.add_argument("--quantized", type=Path, help="4-bit file made from that model by nibble quantize")
    out.add_argument("--base-rank", type=int, default=32, help="rank when quantizing the base now (default 32)")
    out.add_argument("--prompts", type=Path, help="text file, a prompt a line (default: the pack's own list)")
    out.add_argument("--domain", help="this domain's prompts instead, e.g. food")
    out.add_argument("--samples", type=int, default=samples, help=f"how many prompts (default {samples})")
    out.add_argument("--batch", type=int, default=batch, help=f"pictures or states an update (default {batch})")
    out.add_argument("--cfg", type=float, default=3.0, help="guidance scale, as the model is sampled (default 3)")
    out.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    out.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class Both:
    """The 4-bit (or 16-bit) pipeline that is trained, its 16-bit teacher, and one condition a prompt."""

    pipe: object
    teacher: object
    cond: list
    empty: object

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size


def load(args: argparse.Namespace) -> Both:
    """Both pipelines, frozen, and the encoded prompts. Raises ValueError for pipelines without a UNet."""
    import torch

    from . import calibrate

    plain = argparse.Namespace(**{**vars(args), "quantized": None, "precision": train.PRECISIONS[1]})
    teacher = train.load(plain)
    same = args.quantized is None and args.precision == train.PRECISIONS[1]
    pipe = teacher if same else train.load(args)
    for one in (pipe, teacher):
        one.unet.requires_grad_(False).to(one.vae.device)
    config = pipe.unet.config
    like = torch.zeros(config.in_channels, config.sample_size, config.sample_size)
    texts = calibrate.texts(args.prompts, args.domain, args.samples, args.seed)
    return Both(pipe, teacher, [train.encode(pipe, t, like) for t in texts], train.encode(pipe, "", like))


def distill(args: argparse.Namespace, both: Both, watch, tell, work: Path | None = None):
    """(adapters, outcome) as ``args`` want it. ``work``: see `training.distill.run`."""
    import torch

    from ..training import adapters, denoise, lora, paths
    from ..training import distill as core
    from ..training.consistency import Consistency
    from ..training.loop import Plan

    unet = both.pipe.unet
    loras = adapters.Adapters(unet, lora.usual(list(adapters.linears(unet))), args.rank, seed=args.seed)
    model, path = paths.view(denoise.diffusers_unet(unet, both.pipe.scheduler))
    other, _ = paths.view(denoise.diffusers_unet(both.teacher.unet, both.teacher.scheduler))

    def teacher(*asked):
        with loras.off():
            return other(*asked)

    cond, pictures = both.cond, None
    if args.pictures is not None:
        found, _ = train.samples(both.pipe, train.Pictures(args.pictures, train.side_of(both.pipe), 0.0))
        cond, pictures = [s.cond for s in found], torch.stack([s.latent for s in found])
    task = core.Task(model, teacher, loras.parameters(), path, cond, both.empty, both.shape, pictures, both.pipe.device)
    plan = Plan(args.way, args.updates, args.batch, args.rate, warmup=min(50, args.updates // 10), weight_decay=0.0,
                ema=0.95, seed=args.seed, loss_scale=_scale(unet))  # fmt: skip
    guided = max(0.0, args.cfg - 1)
    settings = core.Settings(args.way, plan, args.cfg, args.steps, args.start, args.pairs, args.teacher_steps,
                             json.dumps(_about(args), sort_keys=True), Consistency(omega=(guided, guided)))  # fmt: skip
    with loras.attached(watch.check):
        return loras, core.run(task, settings, work, watch, tell)


def _scale(module) -> float:
    """Gradients in float16 vanish unless the loss is scaled up."""
    import torch

    return 1024.0 if module.dtype == torch.float16 else 1.0


def _about(args: argparse.Namespace) -> dict:
    """What a run's pairs depend on besides their own settings; no local paths."""
    named = {n: getattr(args, n) for n in ("model", "quantized", "prompts")}
    return {"samples": args.samples, "domain": args.domain} | {n: v and v.name for n, v in named.items()}


def run_distill(args: argparse.Namespace) -> None:
    """``nibble distill``: see `add_command`."""
    from ..checkpoints.save import record, save
    from ..sampling import distilled
    from ..training import lora
    from ..training.distill import EXTRA
    from ..training.loop import Watch
    from ..writing.room import check_room
    from . import few_steps

    _free(args.out)
    both = load(args)
    size = lora.file_bytes(both.pipe.unet, args.rank)
    check_room(args.out, size)
    need = 2 * train.STATES * size + (args.pairs + EXTRA) * 2 * math.prod(both.shape)
    with _bar(args.updates) as bar, train.unfinished_run(args, args.pictures, need) as kept:
        step, tell = _shown(bar)
        loras, outcome = distill(args, both, Watch(step), tell, kept.folder)
    about = {k: getattr(args, k) for k in ("way", "updates", "batch", "rank", "rate", "cfg", "steps", "seed")}
    info = {"modelspec.title": args.out.stem, distilled.KEY: json.dumps(about, sort_keys=True)}
    state = loras.state_dict(rename=train.native_names(both.pipe.unet))
    sampled = distilled.record(args.way, args.steps, few_steps.family(both.pipe))
    with kept.writing(outcome.kept):
        save(args.out, state, info | record(method=f"distill {args.way}", **sampled))
    kept.finish()
    for note in kept.notes:
        log.warning(note)
    train.say(f"{args.way}: {outcome.before:.5f} -> {outcome.after:.5f} in {outcome.seconds:.0f} s\n{args.out}")


def run_refine(args: argparse.Namespace) -> None:
    """``nibble refine``: see `add_command`."""
    from ..training import denoise, paths, refine
    from ..training.loop import Plan, Watch
    from ..training.loop import train as loop
    from ..training.tuned import Tuner
    from ..writing.room import check_room

    _free(args.out)
    if args.quantized is None:
        raise ValueError("Refining needs a 4-bit file: give --quantized, made by nibble quantize")
    args.precision = train.PRECISIONS[0]
    both = load(args)
    check_room(args.out, args.quantized.stat().st_size)
    prompts, device = (both.cond, both.empty), both.pipe.device
    with _bar(args.updates) as bar:
        step, tell = _shown(bar)
        teacher, path = paths.view(denoise.diffusers_unet(both.teacher.unet, both.teacher.scheduler))
        walk = refine.Walk(both.shape, args.stops, args.cfg, args.seed)
        made = refine.states(teacher, path, prompts, walk, device, lambda d, n: tell("states of the teacher", d, n))
        model, _ = paths.view(denoise.diffusers_unet(both.pipe.unet, both.pipe.scheduler))
        learn, held = (refine.of_prompts(made, rows) for rows in refine.split(both.cond))
        tuner, check = Tuner(both.pipe.unet), held if len(held) else learn
        plan = Plan("refine", args.updates, args.batch, args.rate, warmup=min(20, args.updates // 10),
                    weight_decay=0.0, ema=0.95, seed=args.seed, loss_scale=_scale(both.pipe.unet))  # fmt: skip
        with tuner.attached():
            before = refine.measure(model, path, prompts, check, device)
            loss = refine.objective(model, path, prompts, learn, (args.batch, device))
            loop(plan, tuner.parameters(), loss, None, Watch(step))
            after = refine.measure(model, path, prompts, check, device)
    about = {k: getattr(args, k) for k in ("updates", "batch", "rate", "stops", "cfg", "seed", "samples")}
    write(args, {train.native_names(both.pipe.unet)(n): w for n, w in tuner.weights().items()},
          {**about, "output_error": [before, after]})  # fmt: skip
    train.say(f"output error {before:.6f} -> {after:.6f} ({after / before - 1:+.1%})\n{args.out}")


def write(args: argparse.Namespace, weights: dict, about: dict) -> None:
    """The file ``args.quantized`` again with ``weights`` (by native layer) in place, as ``args.out``."""
    from dataclasses import replace

    from ..checkpoints.formats import comfy_quant
    from ..checkpoints.load import load as read
    from ..checkpoints.save import RECORD, record, save

    checkpoint = read(args.quantized)
    tensors = dict(checkpoint.dense)
    for name, stored in checkpoint.layers.items():
        native = name.removeprefix("model.diffusion_model.")
        weight = stored.weight
        if native in weights:
            weight = weights[native].to(weight.wscales.dtype)
            weight = replace(weight, qweight=stored.weight.qweight)
        tensors |= comfy_quant.write(name, weight, stored.tiled)
    old = {k: v for k, v in json.loads(checkpoint.metadata.get(RECORD, "{}")).items() if k != "tool"}
    kept = {k: v for k, v in checkpoint.metadata.items() if k.startswith("modelspec.")}
    save(args.out, tensors, kept | record(**{**old, "refined": about}))


def _free(out: Path) -> None:
    from ..writing.room import check_room

    if out.exists():
        raise ValueError(f"{out.name}: there is a file of this name already. Choose another name")
    check_room(out, 0)


def _bar(total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc="updates", file=sys.stderr, leave=False)


def _shown(bar):
    """(step, tell) for the loop and for what comes before it."""

    def step(done: int, _total: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4f}")
        bar.update(done - bar.n)

    return step, lambda what, done, total: bar.set_description(f"{what} {done}/{total}")
