"""Frozen weights that are not quantized, held in 8 bits while something else is trained: convolutions above all, which
a 4-bit model keeps in 16 bits and which are most of a small UNet.

    W ~ codes scale      codes int8, scale (N,) one for each output channel: kitchen's int8 layout

Only weights are rounded; the product is that of the model's own precision, with W made for it and dropped again. A
convolution keeps nothing for its backward pass. The weights' own bytes wait where they are: a module is held on the CPU
and moved to a GPU then, which never has them. They are put back at the end, so the module is what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from .adapters import forwards

LAYOUT = "TensorWiseINT8Layout"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # ComfyUI calls a Conv3d with more than its input


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight of ``module`` is stored in 8 bits or fewer."""
    return any(isinstance(p, QuantizedTensor) or p.element_size() == 1 for p in module.parameters())


def holdable(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> every linear and zero-padded convolution whose plain weight goes to the product as it is."""
    return {n: m for n, m in module.named_modules() if _is_plain(m) and (_is_linear(m) or _is_convolution(m))}


def _is_plain(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, QuantizedTensor) or weight.dtype not in FLOATS:
        return False
    # ComfyUI's layers change weight and bias on the way to the product where these are not empty
    return not getattr(layer, "weight_function", None) and not getattr(layer, "bias_function", None)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def wanted(module: nn.Module, asked: bool) -> AbstractContextManager:
    """`in_8_bits` of a quantized ``module`` where it is ``asked`` for, else nothing: who trains on 16 bits has room."""
    return in_8_bits(module) if asked and is_quantized(module) else nullcontext(0)


def rounded(weight: Tensor) -> QuantizedTensor:
    """``weight`` (N, ...) as (N, K) int8 codes with a scale for each row."""
    return QuantizedTensor.from_float(weight.flatten(1), LAYOUT, per_channel=True)


class Convolution(torch.autograd.Function):
    """A frozen convolution. For its gradient it needs the input's shape only, and the weight, which is made again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Callable[[Tensor], Tensor], bias: Tensor | None, geometry: tuple) -> Tensor:
        ctx.weight, ctx.geometry, ctx.shape = weight, geometry, x.shape
        return torch.convolution(x, weight(x), bias, *geometry)

    @staticmethod
    def backward(ctx, grad: Tensor):
        like, only_x = grad.new_empty(1).expand(ctx.shape), (True, False, False)
        found = torch.ops.aten.convolution_backward(grad, like, ctx.weight(grad), None, *ctx.geometry, only_x)
        return found[0], None, None, None


@contextmanager
def in_8_bits(module: nn.Module, but: Container[str] = ()) -> Iterator[int]:
    """While it is entered the weights of ``module``'s `holdable` layers are int8, those named in ``but`` excepted; it
    gives how many layers those are. Whatever is raised, their own weights are put back, where those were: who moved the
    module meanwhile moves it again.
    """
    layers = {n: layer for n, layer in holdable(module).items() if n not in but}
    own = {n: layer.weight for n, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.weight = nn.Parameter(rounded(layer.weight.detach()), requires_grad=False)
        with forwards(layers, lambda name, layer: _product(layer, own[name].shape)):
            yield len(layers)
    finally:
        for name, layer in layers.items():
            layer.weight = own[name]


def _product(layer: nn.Module, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """The forward of ``layer``, whose weight is held."""

    def weight(like: Tensor) -> Tensor:
        held = layer.weight.detach()
        return held._qdata.to(like).mul_(held._params.scale.to(like).view(-1, 1)).view(shape)

    def linear(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight(x), _like(layer.bias, x))

    if _is_linear(layer):
        return linear
    dims = len(shape) - 2
    geometry = (layer.stride, layer.padding, layer.dilation, False, (0,) * dims, layer.groups)
    return lambda x: Convolution.apply(x, weight, _like(layer.bias, x), geometry)


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x)
