"""The two layouts that comfy-kitchen has kernels for, svdquant_w4a4 and awq_w4a16, from plain tensors.

AWQ has no low-rank branch in kitchen, and a LoRA needs one, so that layout is ours:

    NibbleAWQLowRankLayout   Params = kitchen's AWQ params + proj_down (K, R), proj_up (N, R)
                             y = awq(x) + (x proj_down) proj_up^T
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout
from comfy_kitchen.tensor.base import register_layout_class, register_layout_op
from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout
from torch import Tensor

from . import packing
from .awq import AWQWeight
from .svdquant import SVDQuantWeight

SVDQUANT_LAYOUT = "TensorCoreSVDQuantW4A4Layout"
AWQ_LAYOUT = "TensorCoreAWQW4A16Layout"
AWQ_LOW_RANK_LAYOUT = "NibbleAWQLowRankLayout"


class NibbleAWQLowRankLayout(TensorCoreAWQW4A16Layout):
    """awq_w4a16 with a low-rank branch; see the file header."""

    @dataclass(frozen=True)
    class Params(TensorCoreAWQW4A16Layout.Params):
        proj_down: Tensor = None
        proj_up: Tensor = None

        def _tensor_fields(self) -> list[str]:
            return ["scale", "zeros", "proj_down", "proj_up"]

    @classmethod
    def dequantize(cls, qdata: Tensor, params) -> Tensor:
        return super().dequantize(qdata, params) + (params.proj_up @ params.proj_down.t()).to(params.orig_dtype)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params) -> dict[str, Tensor]:
        return super().state_dict_tensors(qdata, params) | {"_proj_down": params.proj_down, "_proj_up": params.proj_up}


register_layout_class(AWQ_LOW_RANK_LAYOUT, NibbleAWQLowRankLayout)


def _awq_low_rank(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    p = weight._params
    plain = dataclasses.replace(p, transposed=False)
    shape = tuple(p.orig_shape[::-1]) if p.transposed else p.orig_shape
    plain = TensorCoreAWQW4A16Layout.Params(plain.scale, p.orig_dtype, shape, plain.zeros, p.group_size)
    y = torch.nn.functional.linear(x, QuantizedTensor(weight._qdata, AWQ_LAYOUT, plain), bias)
    return y + (x.to(p.proj_down.dtype) @ p.proj_down) @ p.proj_up.t()


@register_layout_op(torch.ops.aten.t.default, NibbleAWQLowRankLayout)
def _t(qt, args, kwargs):
    p = args[0]._params
    flipped = dataclasses.replace(p, orig_shape=tuple(p.orig_shape[::-1]), transposed=not p.transposed)
    return QuantizedTensor(args[0]._qdata, AWQ_LOW_RANK_LAYOUT, flipped)


@register_layout_op(torch.ops.aten.linear.default, NibbleAWQLowRankLayout)
def _linear(qt, args, kwargs):
    return _awq_low_rank(args[0], args[1], args[2] if len(args) > 2 else None)


@register_layout_op(torch.ops.aten.mm.default, NibbleAWQLowRankLayout)
def _mm(qt, args, kwargs):
    return _awq_low_rank(args[0], args[1], None)


@register_layout_op(torch.ops.aten.addmm.default, NibbleAWQLowRankLayout)
def _addmm(qt, args, kwargs):
    return _awq_low_rank(args[1], args[2], args[0])


def wrap(weight: SVDQuantWeight | AWQWeight, dtype: torch.dtype | None = None, tiled: bool = False) -> QuantizedTensor:
    """A QuantizedTensor of logical shape (N, K) and ``dtype`` (default: the side tensors') that shares ``weight``'s
    memory. ``tiled``: svdquant_w4a4 in kitchen's tile-packed order (N % 128 == 0).
    """
    dtype = weight.wscales.dtype if dtype is None else dtype
    if isinstance(weight, AWQWeight):
        common = (weight.wscales, dtype, weight.shape, weight.wzeros)
        if weight.proj_down is None:
            return QuantizedTensor(weight.qweight, AWQ_LAYOUT, TensorCoreAWQW4A16Layout.Params(*common))
        params = NibbleAWQLowRankLayout.Params(*common, proj_down=weight.proj_down, proj_up=weight.proj_up)
        return QuantizedTensor(weight.qweight, AWQ_LOW_RANK_LAYOUT, params)
    qweight, scale, up = weight.qweight, weight.wscales, weight.proj_up
    if tiled:
        qweight, scale, up = packing.tile_weight(qweight), packing.tile_scales(scale), packing.tile_up(up)
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=scale,
        orig_dtype=dtype,
        orig_shape=weight.shape,
        proj_down=weight.proj_down,
        proj_up=up,
        smooth_factor=weight.smooth_factor,
        act_unsigned=weight.act_unsigned,
    )
    return QuantizedTensor(qweight, SVDQUANT_LAYOUT, params)
