"""Measures a diffusers pipeline: seconds at a few step counts and sizes, the memory peak of one evaluation, and what
the simulation says of the same evaluation. Fits `profiling.calibrate` constants and checks them on runs they never saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from .. import demo
from ..profiling import calibrate, chart, memory, work
from ..profiling.calibrate import Constants, Key, Measurement
from ..profiling.tables import seconds, size, table
from ..writing import whole
from ..writing.room import check_room
from . import pipeline

PRECISIONS = {"both": ("16-bit", "4-bit"), "16-bit": ("16-bit",), "4-bit": ("4-bit",)}
PROMPT, SEED = "red apple", 0
FILES = ("profile.calibration.json", "profile.md", "profile.png")


@dataclass(frozen=True)
class Check:
    """A run that the fit never saw: what it predicted and what it took, seconds and bytes of activations."""

    precision: str
    pixels: int
    steps: int
    predicted: float
    measured: float
    predicted_bytes: int
    measured_bytes: int

    @property
    def miss(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Result:
    rows: tuple[Constants, ...]
    checks: tuple[Check, ...]
    text: str
    files: tuple[Path, ...]


def profile(args, say: Callable[[str], None] = lambda _: None) -> Result:
    """Runs ``nibble profile``. ``args``: the command line's. Raises ValueError for a wish that cannot be measured."""
    if min(args.steps, default=0) < 2 or len(set(args.steps)) < 2 or args.repeat < 1 or args.batch < 1:
        raise ValueError("a fit needs two different step counts of 2 or more, and at least one picture and repeat")
    files = [args.out / name for name in FILES]
    if files[0].exists():
        raise ValueError(f"{files[0].name}: there is a calibration in {args.out.name} already. Give another --out")
    check_room(files[0], 0)
    rows, checks = [], []
    for precision in PRECISIONS[args.precision]:
        bench = Bench(args, precision)
        row, seen = bench.fit(say)
        rows.append(row)
        checks += seen
    text = report(rows, checks)
    whole.text(files[0], calibrate.to_json(rows))
    whole.text(files[1], text + "\n")
    whole.picture(files[2], drawing(checks))
    return Result(tuple(rows), tuple(checks), text, tuple(files))


class Bench:
    """One pipeline in one precision."""

    def __init__(self, args, precision: str):
        self.args, self.precision = args, precision
        self.pipe = pipeline.load_pipeline(args.model or demo.MODEL, args.device)
        self.module = pipeline.denoiser(self.pipe)
        with torch.device("meta"):
            empty = type(self.module).from_config(self.module.config)
        self.empty = empty.to(self.module.dtype).requires_grad_(False).eval()
        if precision == "4-bit":
            pipeline.quantize(self.pipe, args.rank)
        self.probe = memory.probe(self.pipe.device)
        self.cuda = self.probe.device.kind == "cuda"

    def fit(self, say: Callable[[str], None]) -> tuple[Constants, list[Check]]:
        """Fits on ``--steps`` at every size; then says what ``--check`` steps at the first size should have taken."""
        own = self.module.config.sample_size * getattr(self.pipe, "vae_scale_factor", 8)
        sizes = self.args.size or [own, 2 * own]
        fitted, unseen, measured = set(self.args.steps), set(self.args.check), {}
        for pixels in sizes:
            steps = sorted(fitted | (unseen if pixels == sizes[0] else set()))
            say(f"{self.precision}, {pixels} x {pixels}: {', '.join(map(str, steps))} steps")
            for m in self.runs(pixels, steps):
                measured[pixels, m.evaluations] = m
        family, dtype = pipeline.family_of(self.module).id, str(self.module.dtype).removeprefix("torch.")
        key = Key("diffusers", family, dtype, work.FUSED, self.precision, self.probe.device.name)
        row = calibrate.fit(key, (m for (_, n), m in measured.items() if n in fitted), self.context())
        checks = []
        for n in sorted(unseen - fitted):
            m = measured[sizes[0], n]
            guess = row.seconds(m.pixels, m.flops, n), row.activation(m.live)
            checks.append(Check(self.precision, sizes[0], n, guess[0], m.seconds, guess[1], m.activation))
        return row, checks

    def runs(self, pixels: int, steps: list[int]) -> list[Measurement]:
        """One measurement a step count: the fastest of ``--repeat`` rounds, since other programs only ever add.

        Rounds take turns between the step counts, so that a busy minute hits all of them.
        """
        simulated, peak = self.evaluation(pixels)
        rounds = [[self.sample(pixels, n) for n in steps] for _ in range(self.args.repeat)]
        area = self.args.batch * pixels * pixels
        return [
            Measurement(area, simulated.flops, simulated.live, peak, n, min(taken))
            for n, taken in zip(steps, zip(*rounds, strict=True), strict=True)
        ]

    def evaluation(self, pixels: int) -> tuple[work.Work, int]:
        """(what one evaluation should take, by simulation; the bytes it really took). Also the size's warm-up run."""
        seen: list[tuple] = []
        hook = self.module.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
        try:
            self.sample(pixels, 1)
        finally:
            hook.remove()
        args, kwargs = seen[0]
        a, k = tree_map(_to_meta, args), tree_map(_to_meta, kwargs)
        simulated = work.simulate(self.empty, lambda: self.empty(*a, **k), work.FUSED)
        with torch.no_grad():
            return simulated, self.peak(lambda: self.module(*args, **kwargs))

    def peak(self, call: Callable) -> int:
        """Bytes that one evaluation needs beyond what is there: the card's allocator, or every tensor on a CPU."""
        if not self.cuda:
            return work.measure(call)
        self.probe.wait()
        self.probe.restart()
        before = torch.cuda.memory_allocated()
        call()
        self.probe.wait()
        return self.probe.read().allocated - before

    def sample(self, pixels: int, steps: int) -> float:
        """Seconds of a whole run: text, steps and VAE."""
        start = time.perf_counter()
        pipeline.sample(self.pipe, [PROMPT] * self.args.batch, steps, self.args.cfg, SEED, width=pixels, height=pixels)
        self.probe.wait()
        return time.perf_counter() - start

    def context(self) -> int:
        """Bytes the driver takes besides torch's own; 0 where nobody can say."""
        if not self.cuda:
            return 0
        now = self.probe.read()
        return max(0, now.process - torch.cuda.memory_reserved()) if now.process else 0


def _to_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def report(rows: list[Constants], checks: list[Check]) -> str:
    """Markdown: the fitted constants, then predictions against runs."""
    head = ("family", "weights", "dtype", "activations", "once", "evaluation", "speed", "worst fit, time")
    body = [(
        r.key.family, r.key.weights, r.key.dtype,
        f"{size(r.activation_fixed)} + {r.activation_factor:.3f} x simulated", f"{seconds(r.run_fixed)} + "
        f"{seconds(1e6 * r.run_per_pixel)} a megapixel",
        seconds(r.evaluation_fixed), f"{r.flops_per_second / 1e9:,.1f} GFLOP/s", f"{r.time_error:.0%}",
    ) for r in rows]  # fmt: skip
    lines = [f"Measured on {rows[0].key.device}.", "", *table(head, body)]
    if checks:
        head = ("weights", "size", "steps", "predicted", "measured", "miss", "activations predicted", "measured")
        lines += ["", *table(head, [(
            c.precision, c.pixels, c.steps, seconds(c.predicted), seconds(c.measured), f"{c.miss:+.1%}",
            size(c.predicted_bytes), size(c.measured_bytes),
        ) for c in checks])]  # fmt: skip
    return "\n".join(lines)


def drawing(checks: list[Check]):
    """Predicted and measured seconds as bars."""
    rows = []
    for i, c in enumerate(checks):
        name = f"{c.precision}, {c.steps} steps"
        rows += [(f"{name}: predicted", c.predicted, seconds(c.predicted), i), (f"{name}: measured", c.measured,
                 seconds(c.measured), i)]  # fmt: skip
    return chart.bars("nibble profile: seconds", rows)
