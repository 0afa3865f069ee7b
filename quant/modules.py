"""Quantizes weights by a plan: one weight at a time, or the linears of any torch module in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from . import awq, core_formats, datafree, kernels, svdquant
from .checks import naming, require_float
from .policy import LayerPlan
from .schemes import AWQ, KEEP, SVDQUANT


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized weight, the bias that belongs with it, and the error it made."""

    weight: svdquant.SVDQuantWeight | awq.AWQWeight | QuantizedTensor
    bias: Tensor | None
    error: float  # ||W - W_eff|| / ||W||


def quantize_weight(
    weight: Tensor, bias: Tensor | None, plan: LayerPlan, dtype: torch.dtype, seed: int = 0
) -> QuantizedLayer:
    """Data-free quantization of one (N, K) weight, by a scheme of ours or a format of ComfyUI's. Raises ValueError for
    codes, non-finite weights or an unknown scheme.
    """
    require_float(weight)
    if plan.scheme == SVDQUANT.id:
        q = datafree.quantize(weight, plan.rank, dtype, plan.act_unsigned, seed)
        dense, bias = svdquant.dequantize(q), _as(svdquant.stored_bias(q, bias), bias, dtype)
    elif plan.scheme == AWQ.id:
        q = awq.quantize(weight, dtype)
        dense = awq.dequantize(q)
    elif plan.scheme in core_formats.FORMATS:
        q = core_formats.quantize(weight, plan.scheme, dtype)
        dense = q.dequantize().float()
    else:
        raise ValueError(f"no quantizer for scheme {plan.scheme!r}")
    norm = weight.float().norm()
    return QuantizedLayer(q, bias, float((dense - weight.float()).norm() / norm) if norm > 0 else 0.0)


def blank(shape: tuple[int, int], bias: Tensor | None, plan: LayerPlan, dtype: torch.dtype):
    """(weight, bias) that quantizing an (N, K) weight by ``plan`` gives, without values: on torch's meta device.
    ``bias``: the float layer's, there or anywhere. Raises ValueError for an unknown scheme.
    """
    n, k = shape
    if plan.scheme == SVDQUANT.id:
        weight = svdquant.blank(n, k, min(plan.rank, n, k), dtype, plan.act_unsigned)
        if plan.act_unsigned:  # its bias has the shift taken off
            bias = torch.empty(n, dtype=dtype if bias is None else bias.dtype, device="meta")
    elif plan.scheme == AWQ.id:
        weight = awq.blank(n, k, dtype)
    elif plan.scheme in core_formats.FORMATS:
        weight = core_formats.blank(plan.scheme, n, k, dtype)
    else:
        raise ValueError(f"no quantizer for scheme {plan.scheme!r}")
    return weight, bias


def moved(weight, device: torch.device | str):
    """A solved weight of any kind (ours, a QuantizedTensor, a dense tensor) on ``device``; on "meta", without values.

    Kitchen's own `QuantizedTensor.to` does not know "meta".
    """
    if isinstance(weight, QuantizedTensor):
        params = weight._params
        sides = {n: getattr(params, n) for n in params._tensor_fields()}
        params = replace(params, **{n: t.to(device) for n, t in sides.items() if t is not None})
        return QuantizedTensor(weight._qdata.to(device), weight._layout_cls, params)
    if isinstance(weight, Tensor):
        return weight.to(device)
    return replace(weight, **{n: t.to(device) for n, t in vars(weight).items() if isinstance(t, Tensor)})


def _as(new: Tensor | None, old: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if new is None else new.to(dtype if old is None else old.dtype)


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Dotted name -> weight shape of every float linear-like submodule."""
    return {
        name: tuple(m.weight.shape)
        for name, m in module.named_modules()
        if hasattr(m, "in_features")
        and isinstance(getattr(m, "weight", None), Tensor)
        and not kernels.is_ours(m.weight)
    }


def quantize_module(
    module: nn.Module,
    plans: Mapping[str, LayerPlan],
    dtype: torch.dtype,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Replaces the planned linears' weights of ``module`` in place by 4-bit ones in ``dtype``; float weights are freed.

    Returns the weight error of each quantized layer. ``progress`` is called with each layer's name before it is done.
    Raises ValueError that names the layer, as `quantize_weight` does.
    """
    errors = {}
    for name, layer_plan in plans.items():
        if layer_plan.scheme == KEEP:
            continue
        if progress is not None:
            progress(name)
        layer = module.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.detach()
        with naming(name):
            done = quantize_weight(layer.weight.detach(), bias, layer_plan, dtype, seed)
        install(layer, done.weight, done.bias, dtype)
        errors[name] = done.error
    return errors


def install(layer: nn.Module, weight, bias: Tensor | None, dtype: torch.dtype):
    """Puts a weight and its bias into a linear module, both in ``dtype`` as the kernels want them.

    ``weight``: one of ours (plain tensors), a QuantizedTensor in a format of ComfyUI's, or a dense tensor.
    """
    weight = weight.to(dtype)
    if not isinstance(weight, Tensor):
        weight = kernels.wrap(weight, dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
