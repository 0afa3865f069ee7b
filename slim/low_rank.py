"""A 3x3 convolution as a 3x1 to r channels and a 1x3 from them: W[o, i, y, x] = sum_r B[o, r, x] A[r, i, y].

The best B and A are those of the singular value decomposition of W as a matrix with rows (o, x) and columns (i, y),
(3 O x 3 I). Source: Jaderberg et al., 1405.3866, scheme 2. Cost: 3 r (I + O) for 9 I O; the full rank, 3 min(I, O),
costs twice the original.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.calib.low_rank import balanced, truncated
from .op import Conv, ConvOp, Stage


def full(conv: Conv) -> int:
    return 3 * min(conv.inputs, conv.outputs)


def factor(weight: Tensor, rank: int, stride: int, seed: int) -> tuple[Stage, ...]:
    """``weight`` (O, I, 3, 3). The stages are float32, the singular values shared evenly between them."""
    o, i = weight.shape[:2]
    matrix = weight.float().permute(0, 3, 1, 2).reshape(3 * o, 3 * i)
    up, down = balanced(*truncated(matrix, rank, seed))
    r = up.shape[1]
    first = down.t().reshape(r, i, 3, 1).contiguous()
    second = up.reshape(o, 3, r).permute(0, 2, 1).reshape(o, r, 1, 3).contiguous()
    return Stage(first, (stride, 1), (1, 0)), Stage(second, (1, stride), (0, 1))


def shapes(conv: Conv, rank: int) -> tuple[Stage, ...]:
    first = torch.empty(rank, conv.inputs, 3, 1, device="meta")
    second = torch.empty(conv.outputs, rank, 1, 3, device="meta")
    return Stage(first, (conv.stride, 1), (1, 0)), Stage(second, (1, conv.stride), (0, 1))


OP = ConvOp("low rank", "3x1 then 1x3 through fewer channels, by singular values", full, factor, shapes)
