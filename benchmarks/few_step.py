"""How many steps the demo model needs with its LCM LoRA, in 16 and in 4 bits: the figures of docs/benchmarks.md.

    python benchmarks/few_step.py [--pictures 200] [--json few_step.json]

Each of the reference emoji is drawn from its caption, picture i from the noise of seed + i in every row. Recognised:
how often the nearest reference is the captioned one. PSNR: to the 16-bit picture of 25 guided steps from the same
noise.
"""

# ruff: noqa: TID251
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from comfyui_nibble import demo
from comfyui_nibble.demo import evaluate, recognise
from comfyui_nibble.headless import pipeline
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.read import read_file
from comfyui_nibble.metrics.images import mean_psnr

STEPS = (1, 2, 4, 8)
SIXTEEN, FOUR = "16-bit", "4-bit"
ENOUGH = 0.9  # 4 steps at 4 bits: at least this share of the recognition at 16 bits


@dataclass(frozen=True)
class Row:
    """One line of the table. ``psnr``: dB to the 25-step 16-bit pictures; None for those themselves."""

    precision: str
    steps: int
    cfg: float
    recognised: float
    psnr: float | None


@dataclass(frozen=True)
class Task:
    """What is drawn: the first ``pictures`` references' captions; any reference can be the answer."""

    open_pipe: Callable[[], object]
    lora: Path
    references: recognise.References
    pictures: int
    rank: int

    @property
    def prompts(self) -> list[str]:
        return [names[0] for names in self.references.names[: self.pictures]]


def measure(task: Task, say: Callable[[str], None]) -> list[Row]:
    """Every row, 16-bit first; the LoRA and the LCM scheduler join after the guided 25 steps."""
    rows, truth = [], None
    for precision in (SIXTEEN, FOUR):
        pipe = task.open_pipe()
        if precision == FOUR:
            pipeline.quantize(pipe, task.rank)
        say(f"{precision}: {evaluate.STEPS} guided steps")
        pictures = evaluate.draw(pipe, task.prompts, evaluate.STEPS, evaluate.GUIDANCE)
        truth = pictures if truth is None else truth
        rows.append(_row(precision, evaluate.STEPS, evaluate.GUIDANCE, pictures, truth, task))
        report = apply(pipeline.denoiser(pipe), read_file(task.lora), 1.0)
        if not report.applied:
            raise ValueError(f"{task.lora.name}: no layer of the model is in it ({report.summary()})")
        pipeline.use_few_steps(pipe)
        for steps in STEPS:
            say(f"{precision}: {steps} LCM steps")
            pictures = evaluate.draw(pipe, task.prompts, steps, 1.0)
            rows.append(_row(precision, steps, 1.0, pictures, truth, task))
    return rows


def _row(precision: str, steps: int, cfg: float, pictures: np.ndarray, truth: np.ndarray, task: Task) -> Row:
    hits = [task.references.recognised(p, caption) for p, caption in zip(pictures, task.prompts, strict=True)]
    psnr = None if pictures is truth else mean_psnr(list(truth), list(pictures))
    return Row(precision, steps, cfg, sum(hits) / len(hits), psnr)


def ratio(rows: list[Row], steps: int = 4) -> float:
    """Recognition at 4 bits as a share of that at 16 bits."""
    share = {r.precision: r.recognised for r in rows if r.steps == steps}
    return share[FOUR] / share[SIXTEEN] if share[SIXTEEN] else 0.0


def table(rows: list[Row], pictures: int, rank: int) -> str:
    """The section of docs/benchmarks.md."""
    about = f"{pictures} captions, rank {rank}, same noise in every row; PSNR to the 16-bit picture of {evaluate.STEPS}"
    lines = [
        "## Few steps: the LCM LoRA on the demo model", "", f"{about} guided steps. `python "
        "benchmarks/few_step.py`", "",
        "| precision | steps | cfg | recognised | PSNR |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        psnr = "reference" if r.psnr is None else f"{r.psnr:.2f} dB"
        lines.append(f"| {r.precision} | {r.steps} | {r.cfg:g} | {r.recognised:.1%} | {psnr} |")
    return "\n".join([*lines, "", f"4 steps: 4-bit recognises {ratio(rows):.2f} of what 16-bit does."])


def main() -> int:
    parser = argparse.ArgumentParser(description="Recognition and PSNR of the demo model's LCM LoRA by steps and bits.")
    parser.add_argument("--pictures", type=int, default=evaluate.REFERENCES, help="how many of the reference captions")
    parser.add_argument("--rank", type=int, default=16, help="rank of the 4-bit model's low-rank branch")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if not (demo.MODEL / "unet").exists():
        sys.exit("the demo model is not there: train it with python -m comfyui_nibble.demo.train")
    task = Task(
        lambda: pipeline.load_pipeline(demo.MODEL), demo.LORAS["lcm"], recognise.load("noto"), args.pictures, args.rank
    )
    rows = measure(task, lambda text: print(text, file=sys.stderr))
    print(table(rows, len(task.prompts), args.rank))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if ratio(rows) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
