"""Which noise levels a preset visits. Timesteps are plain ints; ComfyUI's scheduler names are used where they are
exact.

n steps with denoise d < 1 mean what they mean in ComfyUI's KSampler: the last n of int(n / d). LCM and TCD cut their
50-point training grid to int(50 d) points first and take n of those, as diffusers does: only these were trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..families import VARIANTS
from ..families.preset import Preset

TRAIN, GRID = 1000, 50
SKIP = TRAIN // GRID
WINDOWS = 4


@dataclass(frozen=True)
class Plan:
    """SIGMAS to be: the last ``keep`` + 1 of a named scheduler's ``total`` + 1, or timesteps, or sigmas; then a 0.

    ``from_noise``: the first sigma stands for pure noise, wherever it lies.
    """

    keep: int
    scheduler: str = ""
    total: int = 0
    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()
    from_noise: bool = False


def consistency_grid(steps: int, strength: float = 1.0) -> tuple[int, ...]:
    """``steps`` of LCM's and TCD's training timesteps 19, 39 ... 999, evenly by index from the top.

    Source: diffusers LCMScheduler.set_timesteps. Raises ValueError when ``strength`` leaves fewer than ``steps``.
    """
    points = int(GRID * strength)
    if not 0 < steps <= points:
        raise ValueError(
            f"{steps} steps do not fit into the {points} trained timesteps that denoise {strength:g} leaves: "
            f"raise denoise to {math.ceil(100 * steps / GRID) / 100:g} or more, or use at most {points} steps"
        )
    return tuple((points - math.floor(i * (points / steps))) * SKIP - 1 for i in range(steps))


def trailing(steps: int) -> tuple[int, ...]:
    """Timesteps evenly spaced from 999 down, the last at 1000/n - 1. Source: diffusers timestep_spacing="trailing".

    Rounds halves to even, as NumPy does there.
    """
    return tuple(round(TRAIN - i * (TRAIN / steps)) - 1 for i in range(steps))


def tenths(steps: int, denoise: float = 1.0) -> tuple[int, ...]:
    """999, 899, 799 ...: the turbo demo's timesteps. Source: generative-models turbo.py, ComfyUI SDTurboScheduler."""
    start = 10 - int(10 * denoise)
    if not 0 < steps <= 10 - start:
        raise ValueError(
            f"this schedule has {10 - start} steps at denoise {denoise:g}, not {steps}: use fewer steps or more denoise"
        )
    return tuple(TRAIN - 1 - 100 * i for i in range(start, start + steps))


def windows(steps: int) -> tuple[int, ...]:
    """PeRFlow's timesteps 1000 ... 1, even inside each of four windows; the first windows take what does not divide.

    Source: piecewise-rectified-flow scheduler_perflow.py. Raises ValueError for fewer steps than windows.
    """
    if steps < WINDOWS:
        raise ValueError(
            f"PeRFlow takes one step or more in each of its {WINDOWS} windows: use {WINDOWS} or more steps"
        )
    width, out = TRAIN // WINDOWS, []
    for w in range(WINDOWS):
        n = steps // WINDOWS + (w < steps % WINDOWS)
        out += [int(TRAIN - width * w - i * width / n) for i in range(n)]
    return tuple(out)


def total_of(steps: int, denoise: float) -> int:
    """How many steps a whole run has whose last ``steps`` start at ``denoise``, as KSampler counts."""
    return steps if denoise > 0.9999 else int(steps / denoise)


def _lcm(preset: Preset, steps: int, denoise: float) -> Plan:
    grid = consistency_grid(steps, denoise)
    # On the 50-point LCM sampling ComfyUI's "simple" is this grid exactly, bit for bit what KSampler does.
    return Plan(steps, "simple", steps) if denoise == 1.0 else Plan(steps, timesteps=grid)


def _tcd(preset: Preset, steps: int, denoise: float) -> Plan:
    return Plan(steps, timesteps=consistency_grid(steps, denoise))


def _trailing(preset: Preset, steps: int, denoise: float) -> Plan:
    total = total_of(steps, denoise)
    # ComfyUI's "simple" is the trailing grid exactly where n divides 1000; elsewhere it rounds the other way.
    if TRAIN % total == 0:
        return Plan(steps, "simple", total)
    return Plan(steps, timesteps=trailing(total)[-steps:])


def _tenths(preset: Preset, steps: int, denoise: float) -> Plan:
    return Plan(steps, timesteps=tenths(steps, denoise))


def _listed(preset: Preset, steps: int, denoise: float) -> Plan:
    return Plan(steps, timesteps=preset.timesteps, from_noise=True)


def _windows(preset: Preset, steps: int, denoise: float) -> Plan:
    return Plan(steps, timesteps=windows(total_of(steps, denoise))[-steps:])


def _uniform(preset: Preset, steps: int, denoise: float) -> Plan:
    total = total_of(steps, denoise)
    return Plan(steps, sigmas=tuple(1 - i / total for i in range(total))[-steps:])


def _named(preset: Preset, steps: int, denoise: float) -> Plan:
    return Plan(steps, preset.schedule, total_of(steps, denoise))


PLANS: dict[str, Callable[[Preset, int, float], Plan]] = {
    "lcm": _lcm,
    "tcd": _tcd,
    "trailing": _trailing,
    "tenths": _tenths,
    "listed": _listed,
    "windows": _windows,
    "uniform": _uniform,
    "simple": _named,
    "normal": _named,
    "sgm_uniform": _named,
    "flux2": _named,
}


def plan(preset: Preset, steps: int = 0, denoise: float = 1.0) -> Plan:
    """How ``preset`` visits ``steps`` noise levels (0: its usual number), starting at ``denoise`` of the noise.

    Raises ValueError where the preset has no such run. Denoise 0 is no step at all.
    """
    steps = steps or preset.steps
    if preset.fixed and steps != preset.steps:
        raise ValueError(f"preset {preset.id} draws in one step only, not in {steps}: set steps to 1")
    if denoise <= 0.0:
        return Plan(0)
    if preset.fixed and denoise < 1.0:
        raise ValueError(
            f"preset {preset.id} draws in one step from pure noise and has no image-to-image form: "
            "set denoise to 1 or choose another preset"
        )
    return PLANS[preset.schedule](preset, steps, denoise)


def parse_timesteps(text: str) -> tuple[float, ...]:
    """Descending timesteps from "999, 749, 499" (commas, spaces, a JSON list). Raises ValueError naming the bad one."""
    words = text.replace(",", " ").strip(" []\n").split()
    if not words or len(words) > TRAIN:
        raise ValueError(f"timesteps: got {len(words)} numbers, expected 1 to {TRAIN} such as '999, 749, 499, 249'")
    out: list[float] = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            raise ValueError(f"timesteps: {word[:40]!r} is not a number; write for example '999, 749, 499'") from None
        if not 0 <= value < TRAIN:
            raise ValueError(f"timesteps: {word} is outside 0 to {TRAIN - 1}")
        if out and value >= out[-1]:
            raise ValueError(f"timesteps: {word} comes after {out[-1]:g}; write them from high to low")
        out.append(value)
    return tuple(out)


def last_part(timesteps: tuple[float, ...], strength: float) -> tuple[float, ...]:
    """What image-to-image at ``strength`` keeps of a list: its last int(n strength), as diffusers counts.

    Raises ValueError when nothing is left.
    """
    keep = min(int(len(timesteps) * strength), len(timesteps))
    if keep < 1:
        raise ValueError(f"strength {strength:g} leaves none of {len(timesteps)} timesteps: raise it, or list more")
    return timesteps[-keep:]


# As numbers: what a preset visits, for whoever has no ComfyUI that makes them by name.
SIZE_SHIFT = ((256, 0.5), (4096, 1.15))  # FLUX.1's: (tokens, logarithm of the shift), a line through both
TOKEN = 256  # pixels of a token


def shifted(u: float, shift: float) -> float:
    """The sigma that a flow model of ``shift`` has where one of shift 1 has ``u``."""
    return shift * u / (1 + (shift - 1) * u)


def size_shift(size: tuple[int, int]) -> float:
    """FLUX.1's shift for a picture of ``size`` pixels."""
    (few, low), (many, high) = SIZE_SHIFT
    return math.exp(low + (high - low) * (size[0] * size[1] / TOKEN - few) / (many - few))


def flux2_shift(size: tuple[int, int], steps: int) -> float:
    """FLUX.2's for a whole run of ``steps``. Source: ComfyUI nodes_flux.compute_empirical_mu."""
    tokens = round(size[0] * size[1] / TOKEN)
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(at_200)
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(at_200 + (at_10 - at_200) * (200 - steps) / 190)


def visits(row: Preset, steps: int = 0, denoise: float = 1.0, size: tuple[int, int] = (1024, 1024)) -> tuple:
    """What `schedules.plan` plans, in descending numbers without the 0 at the end: timesteps of a UNet's preset (999 to
    0; PeRFlow's 1000 to 1), sigmas (1 to 0) where `Preset.has_sigmas`. ``size``: the picture's (width, height).

    Raises ValueError where the preset has no such run.
    """
    planned = plan(row, steps, denoise)
    if planned.keep == 0 or not planned.scheduler:
        return planned.timesteps or planned.sigmas
    if row.schedule == "lcm":
        return consistency_grid(planned.keep)
    if not row.has_sigmas:
        return trailing(planned.total)[-planned.keep :]
    return _flow(row, planned, size)[-planned.keep :]


def _flow(row: Preset, planned: Plan, size: tuple[int, int]) -> tuple[float, ...]:
    """All sigmas of a whole run."""
    n = planned.total
    if planned.scheduler == "flux2":
        shift = flux2_shift(size, n)
    elif row.size_shift:
        shift = size_shift(size)
    else:
        shift = row.shift or VARIANTS[row.family].shift
    # ComfyUI's "normal" and "sgm_uniform" are even in timesteps, which are sigmas: the shift counts twice
    last = shifted(0.001, shift)
    if planned.scheduler == "normal":
        even = [1 - (1 - last) * i / (n - 1) for i in range(n)] if n > 1 else [1.0]
    elif planned.scheduler == "sgm_uniform":
        even = [1 - (1 - last) * i / n for i in range(n)]
    else:
        even = [1 - i / n for i in range(n)]
    return tuple(shifted(u, shift) for u in even)
