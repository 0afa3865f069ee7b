"""``nibble demo``: the whole idea on the shipped model. Quantize, LoRA in the low-rank branch, short prompts, 4 steps.

Writes demo.png (16-bit over 4-bit pictures of the same noise), profile.png and report.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import demo as shipped
from ..checkpoints.save import version
from ..demo import recognise
from ..lora.apply import Report, apply
from ..lora.read import read_file
from ..metrics.images import mean_psnr
from ..profiling import chart
from ..profiling.recorder import Recorder
from ..prompts import domain, expand
from ..writing import whole
from ..writing.room import check_room
from . import pipeline, sheet

SUBJECTS = ("red apple", "fox face")
PICTURES = 4  # of each subject
STEPS, CFG, RANK, SEED = 4, 1.0, 16, 7
LORAS = (("style", 1.0), ("lcm", 1.0))
SIXTEEN, FOUR = "16-bit", "4-bit"


@dataclass(frozen=True)
class Variant:
    """One precision's pictures and the bytes of its denoiser."""

    pictures: list[np.ndarray]
    bytes: pipeline.Bytes
    loras: tuple[Report, ...]


def run(out: Path, say: Callable[[str], None] = lambda _: None, on_step: Callable[[], None] = lambda: None) -> dict:
    """Runs the demo, writes its three files to ``out``, and returns the report."""
    check_room(out / "demo.png", 0)
    recorder = Recorder()
    style = domain.load("emoji")
    prompts = [expand.expand(style, s, SEED + i) + ", flat style" for s in SUBJECTS for i in range(PICTURES)]
    captions = [s for s in SUBJECTS for _ in range(PICTURES)]
    variants = {name: _variant(name, prompts, recorder, say, on_step) for name in (SIXTEEN, FOUR)}
    report = _report(variants, prompts, captions, recorder)
    whole.text(out / "report.json", json.dumps(report, indent=1) + "\n")
    whole.picture(out / "demo.png", _contact(variants), optimize=True)
    profile = chart.profile("nibble demo", recorder.stages, _parts(variants))
    whole.picture(out / "profile.png", profile, optimize=True)
    return report


def _variant(name: str, prompts: list[str], recorder: Recorder, say, on_step) -> Variant:
    with recorder.stage("load", name):
        say(f"{name}: loading the demo model")
        pipe = pipeline.load_pipeline(shipped.MODEL)
    if name == FOUR:
        with recorder.stage("quantize", name):
            say(f"{name}: quantizing {len(pipeline.planned(pipe, RANK))} layers")
            pipeline.quantize(pipe, RANK)
    size = pipeline.measure(pipeline.denoiser(pipe))
    with recorder.stage("apply LoRAs", name):
        reports = tuple(
            apply(pipeline.denoiser(pipe), read_file(shipped.LORAS[key]), strength) for key, strength in LORAS
        )
    pipeline.use_few_steps(pipe)
    say(f"{name}: {len(prompts)} pictures in {STEPS} steps")

    def step():
        recorder.tick()
        on_step()

    with recorder.stage("sample", name):
        pictures = pipeline.sample(pipe, prompts, STEPS, CFG, SEED, on_step=step)
    return Variant(pictures, size, reports)


def _report(variants: dict[str, Variant], prompts, captions, recorder: Recorder) -> dict:
    references = recognise.load("twemoji")
    sixteen, four = variants[SIXTEEN], variants[FOUR]

    def share(variant: Variant) -> float:
        hits = [references.recognised(p, c) for p, c in zip(variant.pictures, captions, strict=True)]
        return sum(hits) / len(hits)

    return {
        "version": version(),
        "prompts": prompts,
        "seed": SEED,
        "steps": STEPS,
        "rank": RANK,
        "quantized_layers": four.bytes.layers,
        "weights_ratio": round(four.bytes.quantized / four.bytes.quantized_16bit, 4),
        "bytes": {name: v.bytes.quantized + v.bytes.other for name, v in variants.items()},
        "psnr_db": round(mean_psnr(sixteen.pictures, four.pictures), 2),
        "recognised": {name: share(v) for name, v in variants.items()},
        "loras": {name: r.summary() for (name, _), r in zip(LORAS, four.loras, strict=True)},
        "stages": recorder.to_dict(),
    }


def _contact(variants: dict[str, Variant]):
    rows = []
    for i, subject in enumerate(SUBJECTS):
        for name, v in variants.items():
            rows.append((f"{subject.replace(' ', chr(10))}\n{name}", v.pictures[i * PICTURES : (i + 1) * PICTURES]))
    return sheet.contact(f"nibble demo: {STEPS} steps, LoRA in the low-rank branch, same noise", rows)


def _parts(variants: dict[str, Variant]) -> list[tuple[str, str, int]]:
    out = []
    for name, v in variants.items():
        linears = v.bytes.quantized if name == FOUR else variants[FOUR].bytes.quantized_16bit
        rest = v.bytes.other if name == FOUR else v.bytes.other - linears
        out += [(name, "attention and feed-forward", linears), (name, "convolutions and the rest", rest)]
    return out


def table(report: dict) -> str:
    """The report in a few lines for a terminal."""
    seen, size = report["recognised"], report["bytes"]
    sampled = {s["group"]: s["seconds"] for s in report["stages"] if s["name"] == "sample"}
    lines = [f"{'':26}{SIXTEEN:>10}{FOUR:>10}"]
    lines.append(f"{'denoiser, MiB':26}{size[SIXTEEN] / 2**20:>10.1f}{size[FOUR] / 2**20:>10.1f}")
    lines.append(f"{'sampling, s':26}{sampled[SIXTEEN]:>10.1f}{sampled[FOUR]:>10.1f}")
    lines.append(f"{'pictures recognised':26}{seen[SIXTEEN]:>10.0%}{seen[FOUR]:>10.0%}")
    share = f"{report['weights_ratio']:.2f}x their 16-bit bytes at rank {report['rank']}"
    lines.append(f"4-bit layers: {report['quantized_layers']}, {share}")
    lines.append(f"4-bit against 16-bit pictures: {report['psnr_db']:.1f} dB")
    lines += [f"LoRA {name}: {text}" for name, text in report["loras"].items()]
    return "\n".join(lines)
