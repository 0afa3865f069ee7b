"""``nibble train``: a LoRA from a folder of captioned pictures, on a diffusers pipeline in 4 or 16 bits."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help need not load torch
    from torch import Tensor

log = logging.getLogger(__name__)
PRECISIONS = ("4-bit", "16-bit")
STATES = 8  # sizes of a LoRA that an unfinished run takes at most: value, average, two moments, and all that twice
OPTIMIZERS = ("adamw", "adafactor", "galore")  # training.optimizers', said again so that --help need not load torch


def add_command(subparsers) -> None:
    """Adds ``train`` to the command line."""
    out = subparsers.add_parser("train", help="train a LoRA on a folder of captioned pictures, on 4-bit weights")
    out.add_argument("folder", type=Path, help="pictures with captions: .txt beside each, or a .jsonl or .csv")
    out.add_argument("--out", type=Path, required=True, help="the LoRA to write (.safetensors); never overwritten")
    out.add_argument("--model", type=Path, help="diffusers pipeline folder (default: the shipped demo model)")
    out.add_argument("--quantized", type=Path, help="4-bit file made from that model by nibble quantize")
    out.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the base (default 4-bit)")
    out.add_argument("--base-rank", type=int, default=32, help="rank when quantizing the base now (default 32)")
    out.add_argument("--steps", type=int, default=500, help="updates of the LoRA (default 500)")
    out.add_argument("--batch", type=int, default=4, help="pictures a step (default 4)")
    out.add_argument("--rank", type=int, default=8, help="rank of the LoRA (default 8); 0: whole matrices")
    out.add_argument("--rate", type=float, default=1e-3, help="learning rate (default 0.001)")
    out.add_argument("--side", type=int, help="train at about side x side pixels (default: the model's own)")
    out.add_argument("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0])
    out.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="after the warm-up")
    out.add_argument("--accumulate", type=int, default=1, help="batches to an update (default 1)")
    out.add_argument("--dropout", type=float, default=0.1, help="share of captions left empty (default 0.1)")
    out.add_argument("--ema", type=float, default=0.99, help="decay of the weights' average, 0 for none (default 0.99)")
    out.add_argument("--hold-out", type=float, default=0.1, help="share of pictures to validate with (default 0.1)")
    out.add_argument("--checkpointing", action="store_true", help="less memory, about a third slower")
    out.add_argument("--keep-16-bit", action="store_true", help="do not hold convolutions of a 4-bit base in 8 bits")
    out.add_argument("--work", type=Path, help="folder of the state to resume from (default: beside --out)")
    out.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    out.add_argument("--seed", type=int, default=0)
    out.set_defaults(run=run_train)


@dataclass(frozen=True)
class Pictures:
    """Where the pictures are and how large they are trained on; ``share`` of them is held out."""

    folder: Path
    side: int
    share: float = 0.1
    seed: int = 0


def side_of(pipe) -> int:
    """The size in pixels that the pipeline's model draws at by default."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def load(args: argparse.Namespace):
    """The pipeline with its denoiser as ``args`` want it, which is still on the CPU. Raises ValueError for one that has
    no UNet.
    """
    from .. import demo
    from . import pipeline

    pipe = pipeline.load_pipeline(args.model or demo.MODEL, args.device, waiting=True)
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no UNet, and only those are trained here. Train it in ComfyUI")
    if args.quantized is not None:
        pipeline.install_file(pipe, args.quantized)
    elif args.precision == PRECISIONS[0]:
        pipeline.quantize(pipe, args.base_rank)
    return pipe


def latent_of(pipe, picture: Tensor) -> Tensor:
    """(C, h, w) float32 on the CPU of a picture (3, H, W) in [-1, 1]."""
    import torch

    with torch.no_grad():
        found = pipe.vae.encode(picture[None].to(pipe.vae.device, pipe.vae.dtype))
    z = found.latents if hasattr(found, "latents") else found.latent_dist.mean
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return ((z.float() - shift) * pipe.vae.config.scaling_factor)[0].cpu()


def encode(pipe, caption: str, latent: Tensor) -> dict[str, Tensor]:
    """A caption's condition: the text, and for SDXL its pooled form and the picture's size."""
    import torch

    with torch.no_grad():
        found = pipe.encode_prompt(
            caption, device=pipe.vae.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    cond = {"context": found[0].float()}
    if len(found) == 4:
        h, w = (n * pipe.vae_scale_factor for n in latent.shape[-2:])
        sizes = torch.tensor([[h, w, 0, 0, h, w]], dtype=torch.float32, device=pipe.vae.device)
        cond |= {"text_embeds": found[2].float(), "time_ids": sizes}
    return cond


def samples(pipe, pictures: Pictures):
    """(to train on, held out) of a folder, as latents and conditions."""
    from ..training import data

    found = data.examples(pictures.folder)
    out = []
    for example in found:
        latent = latent_of(pipe, data.fitted(example.path, pictures.side))
        out.append(data.Sample(latent, encode(pipe, example.caption, latent), encode(pipe, "", latent)))
    learn, held = data.split(len(out), pictures.share, pictures.seed)
    return [out[i] for i in learn], [out[i] for i in held]


def native_names(unet) -> Callable[[str], str]:
    """A diffusers layer's name -> ComfyUI's, in which LoRA files are written."""
    from ..lora.apply import rules_of

    table = {
        r.sources[0].removesuffix(".weight"): r.native.removesuffix(".weight")
        for r in rules_of(unet)
        if r.native.endswith(".weight") and len(r.sources) == 1
    }
    return lambda name: table.get(name, name)


def train(pipe, found, recipe, rank: int, work: Path | None = None, watch=None, compress: bool = True):
    """(adapters, outcome) of LoRA training on the pipeline's UNet, which goes where the rest of the pipeline is.
    ``found``: what `samples` gave. ``compress``: see eight_bit.py.
    """
    from ..training import adapters, denoise, eight_bit, lora
    from ..training.loop import Watch

    unet = pipe.unet.requires_grad_(False)
    with eight_bit.wanted(unet, compress):
        unet.to(pipe.vae.device)
        names = lora.usual(list(adapters.linears(unet)))
        loras = adapters.Adapters(unet, names, rank, seed=recipe.plan.seed)
        denoiser = denoise.diffusers_unet(unet, pipe.scheduler)
        outcome = lora.train_lora(denoiser, loras, found, recipe, work, watch or Watch())
    unet.to(pipe.vae.device)
    return loras, outcome


def plan_of(args: argparse.Namespace, pipe):
    """What `run_train` was told, as the loop's plan and the rest of a recipe."""
    import torch

    from ..training import lora
    from ..training.loop import Plan

    plan = Plan(
        "lora", args.steps, args.batch, args.rate, warmup=min(100, args.steps // 10), weight_decay=0.0, ema=args.ema,
        seed=args.seed, schedule=args.schedule, accumulate=args.accumulate, optimizer=args.optimizer,
        loss_scale=1024.0 if pipe.unet.dtype == torch.float16 else 1.0,
    )  # fmt: skip
    return lora.Recipe(plan, args.dropout, args.checkpointing)


def unfinished_run(args: argparse.Namespace, folder: Path | None, need: int):
    """What this very run keeps: same model, settings and pictures in ``folder``. ``need``: bytes at most."""
    from ..checkpoints import resume
    from ..training.data import examples
    from ..writing import unfinished

    found = [] if folder is None else examples(folder)
    pictures = [[e.path.name, e.path.stat().st_size, e.path.stat().st_mtime_ns, e.caption] for e in found]
    told = {k: str(v) for k, v in vars(args).items() if k not in ("run", "out", "work", "device")}
    root = args.work or args.out.with_name(f".{args.out.name}.work")
    return unfinished.run(root, resume.signature(pictures=pictures, told=told), f"nibble {args.command}", need)


def run_train(args: argparse.Namespace) -> None:
    """``nibble train``: see `add_command`."""
    from tqdm import tqdm

    from ..checkpoints.save import save
    from ..training import lora
    from ..training.data import examples
    from ..training.loop import Watch
    from ..writing.room import check_room

    if args.out.exists():
        raise ValueError(f"{args.out.name}: there is a file of this name already. Choose another name")
    check_room(args.out, 0)
    examples(args.folder)  # what is wrong with it is said before the model is loaded
    pipe = load(args)
    size = lora.file_bytes(pipe.unet, args.rank)
    check_room(args.out, size)
    recipe = plan_of(args, pipe)
    found = samples(pipe, Pictures(args.folder, args.side or side_of(pipe), args.hold_out, args.seed))
    with (
        tqdm(total=args.steps, desc="steps", file=sys.stderr, leave=False) as bar,
        unfinished_run(args, args.folder, STATES * size) as kept,
    ):

        def step(done: int, _total: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update(done - bar.n)

        loras, outcome = train(pipe, found, recipe, args.rank, kept.folder, Watch(step), not args.keep_16_bit)
        state = loras.state_dict(rename=native_names(pipe.unet))
        with kept.writing(outcome.result.kept):
            save(args.out, state, lora.metadata(recipe, outcome, sum(map(len, found)), args.out.stem))
        kept.finish()
    for note in kept.notes:
        log.warning(note)
    say(lora.report(recipe, outcome, (len(found[0]), len(found[1])), len(loras.factors)))
    say(str(args.out))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
