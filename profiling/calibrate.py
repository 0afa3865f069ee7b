"""Constants of estimates, fitted from measured runs: what kernels and the allocator add to the simulated bytes, and how
fast a machine really is.

    bytes of activations = activation_fixed + activation_factor x simulated live bytes
    seconds of a run     = run_fixed + run_per_pixel x pixels + evaluations x (evaluation_fixed + FLOPs /
    flops_per_second)

Fitted by least squares of the relative error, with no negative constant. A row belongs to one engine, family, dtype,
attention, weight storage and device: kernels differ in each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from .report import build

FORMAT = "nibble-calibration-1"
SHIPPED = Path(__file__).with_name("constants.json")
MAX_BYTES = 2**20
ENGINES = ("comfyui", "diffusers")
STORAGE = ("16-bit", "4-bit")


@dataclass(frozen=True)
class Key:
    """What a constant belongs to. ``attention``: fused or matrix; ``weights``: 4-bit or 16-bit (any dense storage)."""

    engine: str
    family: str
    dtype: str
    attention: str
    weights: str
    device: str


@dataclass(frozen=True)
class Measurement:
    """One measured run of ``evaluations`` model evaluations. ``pixels``: of all its pictures; ``flops``, ``live``: of
    one evaluation, simulated (`work.Work`); ``activation``: its measured peak bytes, 0 where not measured.
    """

    pixels: int
    flops: int
    live: int
    activation: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Constants:
    """A fitted row. ``runs``: how many measurements; ``memory_error``, ``time_error``: the largest relative miss of the
    fit on them (memory_error is -1 when no run had a measured peak; then the factor is 1: simulated bytes as they are).
    ``context``: bytes the driver takes besides, 0 when not measured. ``flops_least``, ``flops_most``: of the
    evaluations that were measured, 0 when not known.
    """

    key: Key
    activation_fixed: float
    activation_factor: float
    run_fixed: float
    run_per_pixel: float
    evaluation_fixed: float
    flops_per_second: float
    runs: int
    memory_error: float = -1.0
    time_error: float = 0.0
    context: int = 0
    flops_least: int = 0
    flops_most: int = 0

    def activation(self, live: int) -> int:
        return round(self.activation_fixed + self.activation_factor * live)

    def seconds(self, pixels: int, flops: int, evaluations: int) -> float:
        once = self.run_fixed + self.run_per_pixel * pixels
        return once + evaluations * (self.evaluation_fixed + flops / self.flops_per_second)


def least_squares(columns: Sequence[Sequence[float]], target: Sequence[float], needed: int) -> list[float]:
    """Weights >= 0, one a column, that explain ``target`` with the least relative error; column ``needed`` takes part.

    With few columns every subset is tried: exact, and the same on every machine. Raises ValueError for no target.
    """
    if not len(target):
        raise ValueError("a fit needs at least one measurement")
    y = np.asarray(target, np.float64)
    x = np.asarray(columns, np.float64).T / y[:, None]
    scale = np.maximum(np.abs(x).max(0), 1e-300)
    best, best_error = None, np.inf
    for count in range(1, min(len(columns), len(y)) + 1):
        for chosen in combinations(range(len(columns)), count):
            if needed not in chosen:
                continue
            part = x[:, chosen] / scale[list(chosen)]
            found = np.linalg.lstsq(part, np.ones(len(y)), rcond=1e-9)[0]
            error = float(((part @ found - 1) ** 2).sum())
            if (found >= 0).all() and found[chosen.index(needed)] > 0 and error < best_error * (1 - 1e-9):
                best, best_error = (chosen, found), error
    out = [0.0] * len(columns)
    for i, value in zip(*best, strict=True):
        out[i] = float(value / scale[i])
    return out


def fit(key: Key, measured: Iterable[Measurement], context: int = 0) -> Constants:
    """The constants that explain ``measured`` best. Raises ValueError without measurements or for times of zero."""
    measured = list(measured)
    if not measured:
        raise ValueError(f"no measured run of {key.family} on {key.device}: record one first")
    if any(m.seconds <= 0 or m.flops <= 0 or m.evaluations <= 0 for m in measured):
        raise ValueError(f"a measured run of {key.family} took no time or did nothing: it cannot be used")
    peaks = [m for m in measured if m.activation > 0]
    fixed, factor = 0.0, 1.0
    if peaks:
        columns = [[1.0] * len(peaks), [m.live for m in peaks]]
        fixed, factor = least_squares(columns, [m.activation for m in peaks], needed=1)
    columns = [[1.0] * len(measured), [m.pixels for m in measured], [m.evaluations for m in measured],
               [m.evaluations * m.flops for m in measured]]  # fmt: skip
    once, per_pixel, each, per_flop = least_squares(columns, [m.seconds for m in measured], needed=3)
    out = Constants(key, fixed, factor, once, per_pixel, each, 1 / per_flop, len(measured), context=context)
    memory = max((abs(out.activation(m.live) / m.activation - 1) for m in peaks), default=-1.0)
    time = max(abs(out.seconds(m.pixels, m.flops, m.evaluations) / m.seconds - 1) for m in measured)
    work = [m.flops for m in measured]
    return replace(out, memory_error=memory, time_error=time, flops_least=min(work), flops_most=max(work))


def to_json(rows: Iterable[Constants]) -> str:
    return json.dumps({"format": FORMAT, "rows": [asdict(r) for r in rows]}, indent=1)


def from_json(text: str, name: str = "the calibration") -> list[Constants]:
    """Rows from their JSON. Raises ValueError in one sentence, naming ``name``, for anything else."""
    what = f"{name}: it is not a calibration that nibble profile wrote"
    if len(text) > MAX_BYTES:
        raise ValueError(f"{what}. Delete it or measure again")
    try:
        data = json.loads(text)
        if data.pop("format", None) != FORMAT:
            raise TypeError("unknown format")
        rows = [build(Constants, row) for row in data["rows"]]
        if any(r.flops_per_second <= 0 or r.activation_factor < 0 for r in rows):
            raise ValueError("constants must be positive")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"{what} ({e}). Delete it or measure again") from e
    return rows


def shipped() -> list[Constants]:
    """The rows that come with the pack."""
    return from_json(SHIPPED.read_text(encoding="utf-8"), SHIPPED.name) if SHIPPED.exists() else []


def find(rows: Sequence[Constants], key: Key) -> tuple[Constants | None, str]:
    """(the row for ``key``, how it was found, in words). The device must be the same: a speed measured elsewhere is no
    measurement here. Weights of the other kind come before another engine; of several rows the last wins.
    """
    same = [r for r in rows if r.key.device == key.device]
    for wanted in (("engine", "weights"), ("engine",), ("weights",), ()):
        names = ("family", "dtype", "attention", *wanted)
        hits = [r for r in same if all(getattr(r.key, n) == getattr(key, n) for n in names)]
        if hits:
            row = hits[-1]
            how = f"fitted on {row.runs} measured run{'s' * (row.runs > 1)} of {key.family} on this machine"
            how += "" if row.key.engine == key.engine else f" in {row.key.engine}"
            return row, how + ("" if row.key.weights == key.weights else f", with {row.key.weights} weights")
    return None, f"no run of {key.family} in {key.dtype} was measured on {key.device}"
