"""Takes rows (output features) out of a quantized weight: for models that keep apart what a file has fused."""

from __future__ import annotations

from dataclasses import replace

from .awq import AWQWeight
from .svdquant import SVDQuantWeight


def rows(weight: SVDQuantWeight | AWQWeight, start: int, stop: int) -> SVDQuantWeight | AWQWeight:
    """Rows [start, stop) of a quantized (N, K) weight; smooth_factor and proj_down are shared with the whole."""
    n = weight.shape[0]
    if not 0 <= start < stop <= n:
        raise ValueError(f"rows {start} to {stop} of a weight with {n}")
    cut = dict(qweight=weight.qweight[start:stop].contiguous(), wscales=weight.wscales[:, start:stop].contiguous())
    if isinstance(weight, AWQWeight):
        cut["wzeros"] = weight.wzeros[:, start:stop].contiguous()
    if weight.proj_up is not None:
        cut["proj_up"] = weight.proj_up[start:stop].contiguous()
    return replace(weight, **cut)
