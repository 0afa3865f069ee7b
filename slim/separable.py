"""A 3x3 convolution as k 3x3 filters of each input channel and a 1x1: W[o, i, y, x] = sum_j P[o, i, j] D[i, j, y, x].

Each input channel is a matrix (O x 9), and its k best filters are its singular vectors: nothing is shared between
channels. k = 1 is the depthwise separable convolution of MobileNet; k = 9 is exact. Cost: k I (9 + O) for 9 I O.
A filter of each channel has few FLOPs but reads and writes as much as any layer, so cards save less time than FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Conv, ConvOp, Stage


def full(conv: Conv) -> int:
    return min(9, conv.outputs)


def factor(weight: Tensor, rank: int, stride: int, seed: int) -> tuple[Stage, ...]:
    """``weight`` (O, I, 3, 3). The stages are float32; ``seed`` is not needed, all is exact."""
    o, i = weight.shape[:2]
    k = min(rank, 9, o)
    channels = weight.float().permute(1, 0, 2, 3).reshape(i, o, 9)
    u, s, v = torch.linalg.svd(channels, full_matrices=False)  # (I, O, m), (I, m), (I, m, 9)
    root = s[:, :k].clamp(min=0).sqrt()
    filters = (v[:, :k] * root.unsqueeze(2)).reshape(i * k, 1, 3, 3).contiguous()
    points = (u[:, :, :k] * root.unsqueeze(1)).permute(1, 0, 2).reshape(o, i * k, 1, 1).contiguous()
    return Stage(filters, (stride, stride), (1, 1), i), Stage(points, (1, 1), (0, 0))


def shapes(conv: Conv, rank: int) -> tuple[Stage, ...]:
    filters = torch.empty(conv.inputs * rank, 1, 3, 3, device="meta")
    points = torch.empty(conv.outputs, conv.inputs * rank, 1, 1, device="meta")
    return Stage(filters, (conv.stride,) * 2, (1, 1), conv.inputs), Stage(points, (1, 1), (0, 0))


OP = ConvOp("separable", "a few 3x3 filters of each channel, then 1x1", full, factor, shapes)
