"""LoftQ, distillation and refinement on the demo model: the figures of docs/distillation.md.

    python benchmarks/distill.py [--only loftq lcm ...] [--updates 150] [--json distill.json]

Base: the demo quantized to 4 bits at ``--rank``. Teacher: the demo in 16 bits. Pictures of few steps are compared with
the teacher's from the same noise, on pairs that were not trained on; smaller is better.
"""

# ruff: noqa: TID251
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from comfyui_nibble import demo
from comfyui_nibble.checkpoints.convert import plan_source
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.demo import dataset, recognise
from comfyui_nibble.headless import base as headless
from comfyui_nibble.headless import pipeline
from comfyui_nibble.quant.schemes import KEEP
from comfyui_nibble.training import consistency, denoise, distill, job, loftq, loop, paths, recipes, refine, reflow
from comfyui_nibble.training.consistency import Consistency

CFG, RANK, SHAPE = 3.0, 16, (4, 16, 16)


@dataclass(frozen=True)
class Row:
    """One figure. ``share``: after / before; ``wanted``: what it must not exceed, infinite where it is only told."""

    what: str
    before: float
    after: float
    wanted: float
    seconds: float

    @property
    def share(self) -> float:
        return self.after / self.before


class Bench:
    """The two models, prompts and a folder for pairs."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work = args, work
        self.teacher_pipe, self.pipe = (pipeline.load_pipeline(demo.MODEL) for _ in range(2))
        pipeline.quantize(self.pipe, args.rank)
        for one in (self.teacher_pipe, self.pipe):
            one.unet.requires_grad_(False)
        known = [e.captions for e in dataset.load(args.data)[0]] if args.data else recognise.load("noto").names
        self.names = [names[0] for names in known[: args.prompts]]
        like = torch.zeros(SHAPE)
        self.cond = [headless.encode(self.pipe, name, like) for name in self.names]
        self.empty = headless.encode(self.pipe, "", like)
        self.model, self.path = paths.view(denoise.diffusers_unet(self.pipe.unet, self.pipe.scheduler))
        self.teacher, _ = paths.view(denoise.diffusers_unet(self.teacher_pipe.unet, self.teacher_pipe.scheduler))

    def plan(self, name: str, rate: float = 1e-3) -> loop.Plan:
        return loop.Plan(name, self.args.updates, self.args.batch, rate, warmup=10, weight_decay=0.0, ema=0.95)

    def follow(self, name: str) -> loop.Watch:
        def step(done: int, total: int, loss: float) -> None:
            if done % 25 == 0:
                print(f"{name} {done}/{total} {loss:.5f}", file=sys.stderr, flush=True)

        return loop.Watch(step)

    def ode(self, model, noise: torch.Tensor, cond: list, cfg: float, steps: int) -> torch.Tensor:
        answer = paths.guided(model, cond, [self.empty] * len(cond), cfg)
        return paths.follow(answer, self.path, noise, paths.even(1000, steps))[1][-1]

    def distil(self, mode: str, more: Callable | None = None, **settings) -> list[Row]:
        """The mode's own measure before and after; ``more(task, made)`` gives further rows, the LoRA in place."""
        loras = job.adapters_of(headless.base_of(self.pipe), RANK, 0)
        pictures = None
        if mode == "lcf":
            latents = [headless.latent_of(self.pipe, p) for p in self.pictures()]
            pictures = torch.stack(latents)
        task = distill.Task(self.model, self.teacher, loras.parameters(), self.path, self.cond, self.empty, SHAPE,
                            pictures)  # fmt: skip
        row = recipes.Distill(mode, **{**dict(cfg=CFG, pairs=self.args.pairs, teacher_steps=50), **settings})
        plan = self.plan(mode, RATES.get(mode, 1e-3))
        chosen = distill.Settings(row, plan, consistency=Consistency(omega=(2.0, 2.0)))
        began = time.monotonic()
        with loras.attached():
            out = distill.train_task(task, chosen, self.work / mode, self.follow(mode))
            rows = [Row(f"{mode}: {MEASURES[mode]}", out.before, out.after, WANTED[mode], time.monotonic() - began)]
            return rows + (more(loras) if more else [])

    def pictures(self) -> list[torch.Tensor]:
        """Eight pictures in a style that the base does not know, at 128 x 128, in [-1, 1]."""
        found = recognise.load("twemoji").thumbnails[:8]
        tensors = torch.as_tensor(found).permute(0, 3, 1, 2).float() * 2 - 1
        return list(torch.nn.functional.interpolate(tensors, (128, 128), mode="bilinear"))

    def lcm(self) -> list[Row]:
        return self.distil("lcm", lambda loras: self._against(loras, "lcm", self._lcm_steps))

    def phased(self) -> list[Row]:
        return self.distil("phased", lambda loras: self._against(loras, "phased", self._euler_steps))

    def _lcm_steps(self, noise: torch.Tensor, cond: list) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        return consistency.sample(self.model, self.path, noise, cond, paths.times(1000, 4, 50), g)

    def _euler_steps(self, noise: torch.Tensor, cond: list) -> torch.Tensor:
        return self.ode(self.model, noise, cond, 1.0, 4)

    @torch.no_grad()
    def _against(self, loras, way: str, steps: Callable) -> list[Row]:
        """Four ``steps`` with the LoRA against every sampler of four steps without, on 16 new noises."""
        noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(99))
        cond = [self.cond[i % len(self.cond)] for i in range(16)]
        truth = self.ode(self.teacher, noise, cond, CFG, 50)
        got = steps(noise, cond)
        with loras.off():
            before = {
                "the same base, Euler at cfg 1": self._euler_steps(noise, cond),
                f"the same base, Euler at cfg {CFG:g}": self.ode(self.model, noise, cond, CFG, 4),
                "the same base, LCM sampler at cfg 1": self._lcm_steps(noise, cond),
            }
        after = float((got - truth).square().mean())
        return [Row(f"{way}: 4 steps to the teacher's 50; before: {what}", float((x - truth).square().mean()), after,
                    0.7 if "Euler" in what else float("inf"), 0.0)
                for what, x in before.items()]  # fmt: skip

    def reflow(self) -> list[Row]:
        return self.distil("reflow", self._straightness, steps=2, cfg=1.0)

    @torch.no_grad()
    def _straightness(self, loras) -> list[Row]:
        noise, cond = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(99)), self.cond[:8]
        answer = paths.guided(self.model, cond, None, 1.0)
        after = reflow.straightness(answer, self.path, noise, 25).value
        with loras.off():
            before = reflow.straightness(answer, self.path, noise, 25).value
        return [Row("reflow: S(Z), trajectories without guidance", before, after, 1.0, 0.0)]

    def refine(self) -> list[Row]:
        began, prompts = time.monotonic(), (self.cond, self.empty)
        row = recipes.Refine(self.args.updates, 3 * self.args.batch, self.args.rate, stops=6, cfg=CFG)
        made = refine.states(self.teacher, self.path, prompts, refine.Walk(SHAPE, row.stops, row.cfg))
        done = refine.run(headless.base_of(self.pipe), prompts, made, row, self.follow("refine"))
        what = f"refine: output error on {len(self.cond) // 4} held-out prompts"
        return [Row(what, done.before, done.after, 0.85, time.monotonic() - began)]

    def loftq(self) -> list[Row]:
        began, done = time.monotonic(), {}
        with open_source(demo.MODEL) as source:
            for name, plan in plan_source(source, RANK).items():
                if plan.scheme != KEEP:
                    done[name] = loftq.solve(source.get(f"{name}.weight"), plan, RANK, torch.float16)
        worst = max(done.values(), key=lambda x: x.error / x.residual)
        seconds = time.monotonic() - began
        mean = lambda key: sum(getattr(x, key) for x in done.values()) / len(done)  # noqa: E731
        return [
            Row(f"loftq: mean weight error of {len(done)} layers, to 4 bits alone", mean("quantized"), mean("error"),
                1.0, seconds),
            Row("loftq: to the SVD of the residual", mean("residual"), mean("error"), 1.0, seconds),
            Row("loftq: the layer that gains least, to the SVD", worst.residual, worst.error, 1.0, seconds),
        ]  # fmt: skip


MEASURES = {
    "lcm": "4 LCM steps to the teacher's 50, same sampler before",
    "lcf": "consistency loss on 8 pictures",
    "phased": "4 Euler steps to the teacher's 50, four pairs held out",
    "reflow": "2 Euler steps to the teacher's end",
    "one_step": "1 Euler step to the teacher's end",
    "progressive": "4 Euler steps to the teacher's end",
}
RATES = {"lcf": 3e-3, "phased": 2e-3}
WANTED = {"lcm": 1.0, "lcf": 0.8, "phased": 1.0, "reflow": 1.0, "one_step": 0.7, "progressive": 1.0}
PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "loftq": Bench.loftq,
    "lcm": Bench.lcm,
    "lcf": lambda b: b.distil("lcf"),
    "phased": Bench.phased,
    "reflow": Bench.reflow,
    "one_step": lambda b: b.distil("one_step"),
    "progressive": lambda b: b.distil("progressive", steps=4, start=16),
    "refine": Bench.refine,
}


def table(rows: list[Row]) -> str:
    lines = ["| what | before | after | change | time |", "|---|---|---|---|---|"]
    for r in rows:
        spent = f"{r.seconds:.0f} s" if r.seconds else ""
        lines.append(f"| {r.what} | {r.before:.5f} | {r.after:.5f} | {r.share - 1:+.1%} | {spent} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="LoftQ, distillation and refinement on the demo model.")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4, help="refine takes three times as many states")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8, help="captions of the references; refine wants 160")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder for the two emoji packages (downloaded when absent): prompts "
        "are all 1,026 emoji instead of the 200 references",
    )
    parser.add_argument("--rank", type=int, default=RANK, help=f"of the 4-bit base (default {RANK})")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of refine")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        for name in args.only:
            rows += PARTS[name](bench)
            print(table(rows[-3:]), file=sys.stderr, flush=True)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if all(r.share < r.wanted for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
