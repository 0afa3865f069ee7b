"""What a weight must be before it is rounded, what must come of it, and how far off a layer's output is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Of the outputs' square. One rounding to bfloat16 brings as much: outputs that differ by less are equal ones.
EQUAL = 2.0**-16


def require_float(weight: Tensor) -> None:
    """Raises ValueError for a tensor that holds codes: taken for numbers they quantize without a complaint."""
    if not weight.is_floating_point():
        raise ValueError(f"the weight is {weight.dtype}, codes of a layer that is quantized already")


def require_finite(weight: Tensor) -> None:
    """Raises ValueError for NaN, infinity, and numbers whose squares leave float32: no error of such can be told."""
    if torch.isfinite(weight.float().norm()):
        return
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    raise ValueError(f"the weight's values, up to {_largest(weight)}, are too large to quantize")


def require_shapes(weight, format: str, **expected: tuple[int, ...]) -> None:
    """Raises ValueError where a tensor of ``weight`` (N, K) has another shape than ``expected``: name -> shape."""
    n, k = weight.shape
    for name, shape in expected.items():
        got = getattr(weight, name)
        got = None if got is None else tuple(got.shape)
        if got != shape:
            raise ValueError(f"{format}: {name} has shape {got}, expected {shape} for N={n}, K={k}")


def require_range(parts: Iterable[Tensor], weight: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError when ``parts`` of what a finite ``weight`` became left the range of ``dtype``."""
    if not all(bool(torch.isfinite(p).all()) for p in parts):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"the weight's values, up to {_largest(weight)}, leave the range of {name}")


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite ``weight`` in ``dtype``. Raises ValueError when it leaves its range."""
    out = weight.to(dtype)
    require_range((out,), weight, dtype)
    return out


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Inside it a ValueError says which layer it is about."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"layer {layer}: {e}") from e


def _largest(weight: Tensor) -> str:
    return f"{float(weight.abs().amax()):.3g}"


def relative_error(got: Tensor, y: Tensor) -> float:
    """||got - y||^2 / ||y - mean y||^2 over the rows (tokens) of (T, N) outputs; a bias in both cancels.

    Rows that are all alike have no spread to compare with: then it is of ||y||^2, as for a single row. NaN where ``y``
    is all zeros and ``got`` is not.
    """
    missed, power = float((got - y).square().sum()), float(y.square().sum())
    spread = float((y - y.mean(0)).square().sum())
    whole = spread if spread > EQUAL * power else power
    if missed == 0:
        return 0.0
    return missed / whole if whole > 0 else float("nan")
