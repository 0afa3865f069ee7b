"""What the demo's IP-Adapters do to CLIP-T and CLIP-I, in 16 and in 4 bits: the table of docs/benchmarks.md.

    python benchmarks/image_prompt.py [--pictures 16] [--json image_prompt.json]

Picture prompts are the flat-style emoji of demo/twemoji, a style that the demo model never drew. Picture i starts from
the noise of seed i in every row. CLIP-T: mean cosine of a drawn picture with its caption; CLIP-I: with its picture
prompt (for "text only": with the picture prompts that the rows below get). Both by the demo's own encoders.
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
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import evaluate, image_prompt, tower
from comfyui_nibble.headless import pipeline
from comfyui_nibble.image_prompt import attach
from comfyui_nibble.image_prompt import read as read_adapter
from comfyui_nibble.metrics.features import paired_cosine
from comfyui_nibble.reading import picture
from safetensors.torch import load_file

SIXTEEN, FOUR = "16-bit", "4-bit"
OWN, OTHER, ALONE = "its own picture", "another emoji's picture", "a picture without text"
NEXT = 7  # the picture prompt of caption i in OTHER is picture i + 7
# What is drawn with an adapter: (case, weight). The first two hold the line of HELD.
CASES = ((OWN, 0.5), (OTHER, 0.75), (OTHER, 1.0), (ALONE, 1.0))
HELD, LINE = CASES[:2], 0.1  # CLIP-T stays within a tenth of text only, and CLIP-I rises; weights picked on 16 pictures


@dataclass(frozen=True)
class Row:
    """One line of the table. ``text``, ``image``: CLIP-T and CLIP-I; their bases are text only's, None without text."""

    precision: str
    adapter: str
    case: str
    weight: float
    text: float
    image: float
    text_base: float | None
    image_base: float | None

    @property
    def holds(self) -> bool:
        return self.image > self.image_base and abs(self.text / self.text_base - 1) <= LINE


@dataclass(frozen=True)
class Task:
    """Captions, their pictures' embeddings (n, d), and the tower with which everything is scored."""

    captions: tuple[str, ...]
    called: torch.Tensor
    shown: torch.Tensor
    vision: object

    def seen(self, drawn: np.ndarray) -> torch.Tensor:
        return tower.embeddings(self.vision, torch.from_numpy(drawn).permute(0, 3, 1, 2).float())

    def prompt(self, case: str) -> tuple[list[str], torch.Tensor]:
        """(captions, embeddings of the picture prompts) of a case."""
        if case == OTHER:
            return list(self.captions), self.shown.roll(-NEXT, 0)
        return [""] * len(self.captions) if case == ALONE else list(self.captions), self.shown


def task(pictures: int) -> Task:
    """The first ``pictures`` of the shipped folder."""
    lines = (demo.PICTURES / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:pictures]
    rows = [json.loads(line) for line in lines]
    vision, projection = tower.load()
    opened = [np.asarray(picture.read(demo.PICTURES / r["file_name"]), np.float32) / 255 for r in rows]
    shown = tower.embeddings(vision, torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2))
    pipe, captions = pipeline.load_pipeline(demo.MODEL), tuple(r["text"] for r in rows)
    called = tower.pooled(pipe.text_encoder, pipe.tokenizer, list(captions), "cpu") @ projection.t()
    return Task(captions, called, shown, vision)


def measure(given: Task, rank: int, say: Callable[[str], None]) -> list[Row]:
    """Every row, 16-bit first."""
    rows = []
    for precision in (SIXTEEN, FOUR):
        pipe = pipeline.load_pipeline(demo.MODEL).to("cpu")
        if precision == FOUR:
            pipeline.quantize(pipe, rank)
        say(f"{precision}: text only")
        plain = given.seen(evaluate.draw(pipe, list(given.captions), evaluate.STEPS, evaluate.GUIDANCE))
        for name, path in demo.IP_ADAPTERS.items():
            adapter = read_adapter({k: v.float() for k, v in load_file(path).items()})
            attach(pipe.unet, adapter)
            for case, weight in CASES:
                say(f"{precision}: {name}, {case} at {weight}")
                rows.append(_row((precision, name, case, weight), pipe, adapter, plain, given))
    return rows


def _row(what: tuple[str, str, str, float], pipe, adapter, plain: torch.Tensor, given: Task) -> Row:
    *_, case, weight = what
    captions, shown = given.prompt(case)
    seen = given.seen(image_prompt.draw(pipe, adapter, captions, shown, weight))
    base = None if case == ALONE else plain

    def mean(a: torch.Tensor | None, b: torch.Tensor) -> float | None:
        return None if a is None else float(paired_cosine(a, b).mean())

    return Row(*what, mean(seen, given.called), mean(seen, shown), mean(base, given.called), mean(base, shown))


def table(rows: list[Row]) -> str:
    lines = ["| precision | adapter | picture prompt | weight | CLIP-T | text only | CLIP-I | text only |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        text = f"{r.text_base:.3f} ({r.text / r.text_base - 1:+.1%})" if r.text_base else "-"
        image = f"{r.image_base:.3f} ({r.image - r.image_base:+.3f})" if r.image_base else "-"
        lines.append(f"| {r.precision} | {r.adapter} | {r.case} | {r.weight:g} | {r.text:.3f} | {text} | "
                     f"{r.image:.3f} | {image} |")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="CLIP-T and CLIP-I of the demo model's IP-Adapters, by bits.")
    parser.add_argument("--pictures", type=int, default=16, help="how many of the shipped flat-style emoji")
    parser.add_argument("--rank", type=int, default=16, help="rank of the 4-bit model's low-rank branch")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = measure(task(args.pictures), args.rank, lambda text: print(text, file=sys.stderr))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if all(r.holds for r in rows if (r.case, r.weight) in HELD) else 1


if __name__ == "__main__":
    sys.exit(main())
