"""The two layouts that comfy-kitchen has kernels for, svdquant_w4a4 and awq_w4a16, from plain tensors.

Kitchen's svdquant layout runs its CUDA kernel on every GPU, also where it has no body (below sm 80: zeros come out),
where rows are not aligned, and on AMD's; AWQ has no low-rank branch, and a LoRA needs one. So two layouts are ours:

    NibbleSVDQuantLayout     kitchen's, with the kernel where `machine` says that there is one, else its reference
    NibbleAWQLowRankLayout   Params = kitchen's AWQ params + proj_down (K, R), proj_up (N, R)
                             y = awq(x) + (x proj_down) proj_up^T
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import comfy_kitchen
import torch
from comfy_kitchen.backends import eager
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout
from comfy_kitchen.tensor.base import register_layout_class, register_layout_op
from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout
from torch import Tensor

from . import machine, packing, svdquant
from .awq import AWQWeight
from .svdquant import SVDQuantWeight

SVDQUANT_LAYOUT = "NibbleSVDQuantLayout"
AWQ_LAYOUT = "TensorCoreAWQW4A16Layout"
AWQ_LOW_RANK_LAYOUT = "NibbleAWQLowRankLayout"


class NibbleSVDQuantLayout(TensorCoreSVDQuantW4A4Layout):
    """svdquant_w4a4 with a choice of who multiplies; see the file header."""

    @classmethod
    def dequantize(cls, qdata: Tensor, params) -> Tensor:
        """(N, K), branch included; whoever asked transposes it. Kitchen sends an identity through 4-bit activations."""
        shape = tuple(params.orig_shape[::-1]) if params.transposed else params.orig_shape
        plain = dataclasses.replace(params, orig_shape=shape, transposed=False)
        return svdquant.dequantize(unwrap(QuantizedTensor(qdata, SVDQUANT_LAYOUT, plain))).to(params.orig_dtype)


def _svdquant(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    p, q = weight._params, weight._qdata
    n = p.orig_shape[1] if p.transposed else p.orig_shape[0]
    rows = x.reshape(-1, x.shape[-1])
    by = _multiplier(rows, n)
    main, raw = (rows + svdquant.SHIFT, rows) if p.act_unsigned else (rows, None)
    codes, scales, down = by.quantize_svdquant_w4a4(
        main.contiguous(), smooth=p.smooth_factor, lora_down=p.proj_down, act_unsigned=p.act_unsigned, lora_x=raw
    )
    y = by.scaled_mm_svdquant_w4a4(
        act=codes, wgt=q, ascales=scales, wscales=p.scale, lora_act_in=down, lora_up=p.proj_up, bias=bias,
        act_unsigned=p.act_unsigned,
    )  # fmt: skip
    return y[: rows.shape[0]].reshape(*x.shape[:-1], n)


def _multiplier(x: Tensor, n: int):
    """What multiplies x (M, K) by an int4 (N, K) weight: kitchen's kernel, whatever its registry picks, or its
    reference.
    """
    if not x.is_cuda or machine.is_amd():
        return comfy_kitchen
    if x.dtype == torch.float32 or n % machine.ALIGNED_ROWS:
        return eager
    return machine.int4_kernels(x.device) or eager


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


register_layout_class(SVDQUANT_LAYOUT, NibbleSVDQuantLayout)
register_layout_class(AWQ_LOW_RANK_LAYOUT, NibbleAWQLowRankLayout)


def _awq_low_rank(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    p = weight._params
    plain = dataclasses.replace(p, transposed=False)
    shape = tuple(p.orig_shape[::-1]) if p.transposed else p.orig_shape
    plain = TensorCoreAWQW4A16Layout.Params(plain.scale, p.orig_dtype, shape, plain.zeros, p.group_size)
    y = torch.nn.functional.linear(x, QuantizedTensor(weight._qdata, AWQ_LAYOUT, plain), bias)
    return y + (x.to(p.proj_down.dtype) @ p.proj_down) @ p.proj_up.t()


def _t(qt, args, kwargs):
    p = args[0]._params
    flipped = dataclasses.replace(p, orig_shape=tuple(p.orig_shape[::-1]), transposed=not p.transposed)
    return QuantizedTensor(args[0]._qdata, args[0]._layout_cls, flipped)


def register_linear(layout: type, product) -> None:
    """Makes ``product`` (x, weight, bias or None) what F.linear, mm and addmm do with a weight in ``layout``; its t()
    is a flag.
    """
    aten = torch.ops.aten
    register_layout_op(aten.t.default, layout)(_t)
    register_layout_op(aten.linear.default, layout)(
        lambda qt, args, kwargs: product(args[0], args[1], args[2] if len(args) > 2 else None)
    )
    register_layout_op(aten.mm.default, layout)(lambda qt, args, kwargs: product(args[0], args[1], None))
    register_layout_op(aten.addmm.default, layout)(lambda qt, args, kwargs: product(args[1], args[2], args[0]))


register_linear(NibbleSVDQuantLayout, _svdquant)
register_linear(NibbleAWQLowRankLayout, _awq_low_rank)


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
    params = NibbleSVDQuantLayout.Params(
        scale=scale,
        orig_dtype=dtype,
        orig_shape=weight.shape,
        proj_down=weight.proj_down,
        proj_up=up,
        smooth_factor=weight.smooth_factor,
        act_unsigned=weight.act_unsigned,
    )
    return QuantizedTensor(qweight, SVDQUANT_LAYOUT, params)


def unwrap(weight: QuantizedTensor) -> SVDQuantWeight | AWQWeight:
    """The plain tensors of a weight in one of these layouts, in natural order; the inverse of `wrap`."""
    q, p = weight._qdata, weight._params
    if weight._layout_cls != SVDQUANT_LAYOUT:
        return AWQWeight(q, p.scale, p.zeros, getattr(p, "proj_down", None), getattr(p, "proj_up", None))
    scale, up = p.scale, p.proj_up
    if is_tiled(weight):
        q, scale, up = packing.untile_weight(q), packing.untile_scales(scale), packing.untile_up(up)
    return SVDQuantWeight(q, scale, p.smooth_factor, p.proj_down, up, p.act_unsigned)


def is_tiled(weight: QuantizedTensor) -> bool:
    """Whether svdquant_w4a4 codes lie in kitchen's tile-packed order."""
    return weight._qdata.dim() == 4
