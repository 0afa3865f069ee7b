"""LoRA training on the demo model's 4-bit base: the figures of docs/benchmarks.md.

    python benchmarks/training.py --data DIR [--steps 450] [--pictures 40] [--json training.json]

DIR: where demo/dataset.py keeps the two emoji packages (downloaded when absent). The LoRA learns the flat style
(Twemoji) from the first references. Style test: a drawn picture counts when it is nearer to the flat thumbnail of its
emoji than to the shaded (Noto) one that the base knows; captions are the trained ones, other names of the same emoji,
and those of emoji of which no flat picture was seen.
"""

# ruff: noqa: TID251
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import dataset, evaluate, recognise
from comfyui_nibble.headless import base, pipeline
from comfyui_nibble.profiling import work
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.modules import linear_shapes, quantize_module
from comfyui_nibble.quant.policy import plan
from comfyui_nibble.training import adapters, data, denoise, eight_bit, job, lora
from comfyui_nibble.training.loop import Plan, Watch

HELD = 40


@dataclass
class Task:
    """The data, the pipeline and what is drawn from it. ``flat``, ``shaded``: thumbnails of the references."""

    folder: Path
    count: int
    bits: int = 4
    figures: dict = field(default_factory=dict)

    def __post_init__(self):
        self.emoji, self.pictures = dataset.load(self.folder)
        self.rows = evaluate.choose(self.emoji)
        self.flat, self.shaded = (recognise.load(s).thumbnails for s in ("twemoji", "noto"))
        self.pipe = pipeline.load_pipeline(demo.MODEL)
        if self.bits == 4:
            pipeline.quantize(self.pipe, 16)
        self.pipe.unet.requires_grad_(False)

    def sample(self, row: int) -> data.Sample:
        picture = torch.from_numpy(self.pictures["twitter"][row]).permute(2, 0, 1).float().div(127.5).sub(1)
        z = base.latent_of(self.pipe, picture)
        caption = self.emoji[row].captions[0]
        return data.Sample(z, base.encode(self.pipe, caption, z), base.encode(self.pipe, "", z))

    def samples(self):
        learn, held = self.rows[: self.count], self.rows[self.count : self.count + HELD]
        return [self.sample(i) for i in learn], [self.sample(i) for i in held]

    def style(self, captions: list[tuple[int, str]]) -> dict[str, float]:
        """Shares of drawn pictures: in the flat style, and recognised among both styles' references."""
        drawn = evaluate.draw(self.pipe, [c for _, c in captions], 20, evaluate.GUIDANCE)
        small = [recognise.thumbnail(p) for p in drawn]
        both = np.concatenate([self.flat, self.shaded])
        flat = [_gap(s, self.flat[i]) < _gap(s, self.shaded[i]) for s, (i, _) in zip(small, captions, strict=True)]
        near = [int(((both - s) ** 2).mean((1, 2, 3)).argmin()) % len(self.flat) for s in small]
        seen = [n == i for n, (i, _) in zip(near, captions, strict=True)]
        return {"captions": len(captions), "flat style": float(np.mean(flat)), "recognised": float(np.mean(seen))}

    def captions(self) -> dict[str, list[tuple[int, str]]]:
        """(reference, caption) of each kind."""
        named = [self.emoji[i].captions + self.emoji[i].held_out for i in self.rows]
        learned = range(self.count)
        return {
            "trained": [(k, named[k][0]) for k in learned],
            "other names": [(k, named[k][-1]) for k in learned if len(named[k]) > 1],
            "other emoji": [(k, named[k][0]) for k in range(self.count, self.count + HELD)],
        }


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean())


def codes(unet) -> str:
    """Digest of everything inside the 4-bit weights."""
    digest = hashlib.sha256()
    for name, p in unet.named_parameters():
        if kernels.is_ours(p):
            for tensor in kernels.tensors(p).values():
                digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def quality(task: Task, steps: int, say: Callable[[str], None], out: Path | None) -> dict:
    """Validation loss, style and recognition before and after training."""
    found, before = task.samples(), codes(task.pipe.unet)
    recipe = lora.Recipe(Plan("lora", steps, 8, 2e-3, warmup=20, weight_decay=0.0, ema=0.99))

    def step(done: int, total: int, loss: float) -> None:
        if done % 100 == 0:
            say(f"step {done} of {total}: {loss:.4f}")

    model = base.base_of(task.pipe)
    loras = job.adapters_of(model, 16, 0)
    with eight_bit.wanted(task.pipe.unet, True):
        outcome = lora.train_lora(model.denoiser, loras, found, recipe, None, Watch(step))
    if out is not None:
        from comfyui_nibble.checkpoints.save import save

        save(
            out,
            loras.state_dict(rename=model.names),
            lora.metadata(recipe, outcome, task.count, out.stem),
            overwrite=True,
        )
    result = {"validation": [outcome.before, outcome.after], "seconds": outcome.result.seconds}
    result["same codes"] = codes(task.pipe.unet) == before
    with loras.attached():
        for kind, captions in task.captions().items():
            say(kind)
            result[kind] = task.style(captions)
        with loras.off():
            result["other emoji, base"] = task.style(captions)
    return result


def unet(bits: int) -> tuple:
    """(the demo model's UNet, its `Denoiser`, a condition)."""
    pipe = pipeline.load_pipeline(demo.MODEL)
    cond = base.encode(pipe, "red apple", torch.zeros(4, 16, 16))
    unet = pipe.unet.to(torch.bfloat16).requires_grad_(False)
    if bits == 4:
        pipeline.quantize(pipe, 16)
    return unet, denoise.diffusers_unet(unet, pipe.scheduler), cond


def transformer(bits: int) -> tuple:
    """(a random SD3 transformer of about the demo UNet's size, its `Denoiser`, a condition)."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=64,
        num_attention_heads=5, joint_attention_dim=128, caption_projection_dim=320, pooled_projection_dim=128,
        pos_embed_max_size=16,
    )  # fmt: skip
    module.to(torch.bfloat16).requires_grad_(False)
    if bits == 4:
        plans = plan(linear_shapes(module), pipeline.family_of(module).rules, 16)
        quantize_module(module, plans, torch.bfloat16)

    def predict(x, sigma, conds):
        n = len(x)
        text, pooled = (torch.zeros(n, *size, dtype=torch.bfloat16) for size in ((77, 128), (128,)))
        return x - sigma.view(-1, 1, 1, 1) * module(x.bfloat16(), text, pooled, 1000 * sigma).sample.float()

    sigmas = torch.linspace(0.001, 1, 1000)
    return module, denoise.Denoiser(predict, denoise.straight, sigmas, flow=True), {}


def memory(make: Callable, bits: int, checkpointing: bool) -> dict[str, int]:
    """Tensor bytes of LoRA training in bfloat16 (batch 1, rank 8, AdamW, average): the model's, and the most that two
    updates add.
    """
    module, denoiser, cond = make(bits)
    samples = [data.Sample(torch.zeros(4, 16, 16), cond, cond)]
    recipe = lora.Recipe(Plan("lora", 2, 1, 1e-3, warmup=1), checkpointing=checkpointing)
    with eight_bit.wanted(module, True):
        weights = kernels.held(module)
        with work.LiveBytes() as made:
            loras = adapters.Adapters(module, job.usual(list(adapters.linears(module))), 8)
            lora.train_lora(denoiser, loras, (samples, []), recipe)
    return {"weights": weights, "training": made.peak, "together": weights + made.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--only", choices=("quality", "memory"))
    parser.add_argument("--lora", type=Path, help="write the trained LoRA here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures: dict = {}
    if args.only != "quality":
        for make, checkpointing in itertools.product((unet, transformer), (False, True)):
            rows = {bits: memory(make, bits, checkpointing) for bits in (16, 4)}
            ratio = rows[4]["together"] / rows[16]["together"]
            figures[f"memory, {make.__name__}, checkpointing {checkpointing}"] = {**rows, "ratio": ratio}
    if args.only != "memory":
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        figures["quality"] = quality(Task(args.data, args.pictures), args.steps, say, args.lora)
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
