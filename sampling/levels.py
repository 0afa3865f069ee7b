"""The timesteps or sigmas that a preset visits, as numbers: for whoever has no ComfyUI that makes them by name."""

from __future__ import annotations

import math

from ..families import VARIANTS
from ..families.preset import Preset
from .schedules import Plan, consistency_grid, plan, trailing

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
