"""The layers of a 4-bit model with what is not 4-bit in them made trainable; codes, smoothing and bias stay.

    svdquant_w4a4   y = Qa((x + shift) / s) (codes wscales (1 + gain))^T + (x down) up^T + bias      gain, down, up
    awq_w4a16       y = x ((codes - 8) wscales (1 + gain) + wzeros + wscales zero)^T + bias          gain, zero

down and up are moved by shares of their size. Qa's gradient is straight through. Of each layer only its input is kept
for the backward pass: codes are unpacked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from ..quant import kernels, svdquant
from ..quant.awq import AWQWeight
from ..quant.packing import unpack_signed, unpack_unsigned
from ..quant.schemes import GROUP
from ..quant.svdquant import SVDQuantWeight
from .adapters import Frozen, blocks, forwards, linears


class _Product(torch.autograd.Function):
    """The 4-bit product of a layer. Only its input is kept for the backward pass; codes are unpacked again there."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, w: SVDQuantWeight) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.w = w
        return (_seen(x, w) @ _matrix(w, gain, x.dtype).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gain = ctx.saved_tensors
        w = ctx.w
        rows = grad.flatten(0, -2)
        back = (rows @ _matrix(w, gain, grad.dtype)).reshape(x.shape) / w.smooth_factor.to(grad)
        # d y / d gain: the product of codes and stored scales, summed over the columns of a group
        full = rows.t().float() @ _seen(x, w).flatten(0, -2).float()
        share = full * _matrix(w, None, torch.float32)
        return back.to(x.dtype), share.unflatten(1, (-1, GROUP)).sum(-1).t(), None


def _seen(x: Tensor, w: SVDQuantWeight) -> Tensor:
    return svdquant.quantize_activation(x, w).to(x.dtype)


def _matrix(w: SVDQuantWeight, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, K): codes times scales, in the smoothed domain."""
    wscales = w.wscales.float() if gain is None else w.wscales.float() * (1 + gain)
    codes = unpack_signed(w.qweight).float().unflatten(1, (-1, GROUP))
    return (codes * wscales.t().unsqueeze(-1)).flatten(1).to(dtype)


class Tuned(nn.Module):
    """One layer's trainable part. All three are zero at first: the layer is as it was."""

    def __init__(self, w: SVDQuantWeight):
        super().__init__()
        self.w = w
        self.down0, self.up0 = w.proj_down.float().clone(), w.proj_up.float().clone()
        self.sizes = tuple(float(t.square().mean().sqrt()) if t.numel() else 0.0 for t in (self.down0, self.up0))
        self.gain = nn.Parameter(torch.zeros(w.wscales.shape, device=w.wscales.device))
        self.down, self.up = (nn.Parameter(torch.zeros_like(t)) for t in (self.down0, self.up0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down (K, R), up (N, R)) float32."""
        return self.down0 + self.sizes[0] * self.down, self.up0 + self.sizes[1] * self.up

    def forward(self, x: Tensor) -> Tensor:
        down, up = (t.to(x.dtype) for t in self.factors())
        return _Product.apply(x, self.gain, self.w) + (x @ down) @ up.t()

    @torch.no_grad()
    def weight(self) -> SVDQuantWeight:
        """The layer as it ships: the same codes, scales and factors in their own dtype again."""
        down, up = self.factors()
        dtype = self.w.wscales.dtype
        wscales = (self.w.wscales.float() * (1 + self.gain)).to(dtype)
        return replace(self.w, wscales=wscales, proj_down=down.to(dtype), proj_up=up.to(dtype))


class _Affine(torch.autograd.Function):
    """The dense product of an awq_w4a16 layer with its scales and zeros moved; only the input is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, zero: Tensor, w: AWQWeight) -> Tensor:
        ctx.save_for_backward(x, gain, zero)
        ctx.w = w
        return x @ _affine(w, gain, zero, x.dtype).t()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gain, zero = ctx.saved_tensors
        w, full = ctx.w, grad.flatten(0, -2).t().float() @ x.flatten(0, -2).float()
        groups, steps = full.unflatten(1, (-1, GROUP)), w.wscales.float()
        codes = unpack_unsigned(w.qweight).float().unflatten(1, (-1, GROUP)) - 8
        moved = (groups * codes).sum(-1).t() * steps, groups.sum(-1).t() * steps
        return grad @ _affine(w, gain, zero, grad.dtype), *moved, None


def _affine(w: AWQWeight, gain: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K): (codes - 8) scales (1 + gain) + zeros + scales zero."""
    steps = w.wscales.float()
    scales, zeros = ((steps * (1 + gain)).t(), (w.wzeros.float() + steps * zero).t())
    codes = unpack_unsigned(w.qweight).float().unflatten(1, (-1, GROUP)) - 8
    return (codes * scales.unsqueeze(-1) + zeros.unsqueeze(-1)).flatten(1).to(dtype)


class TunedAffine(nn.Module):
    """`Tuned` of an awq_w4a16 layer; a branch beside it stays as it is."""

    def __init__(self, w: AWQWeight):
        super().__init__()
        self.w = w
        self.gain, self.zero = (nn.Parameter(torch.zeros(w.wscales.shape, device=w.wscales.device)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = _Affine.apply(x, self.gain, self.zero, self.w)
        if self.w.proj_down is None:
            return y
        return y + (x @ self.w.proj_down.to(x.dtype)) @ self.w.proj_up.to(x.dtype).t()

    @torch.no_grad()
    def weight(self) -> AWQWeight:
        steps, dtype = self.w.wscales.float(), self.w.wscales.dtype
        zeros = self.w.wzeros.float() + steps * self.zero
        return replace(self.w, wscales=(steps * (1 + self.gain)).to(dtype), wzeros=zeros.to(dtype))


TUNED = {SVDQuantWeight: Tuned, AWQWeight: TunedAffine}


class Tuner:
    """The svdquant_w4a4 and awq_w4a16 layers of ``module``, trainable inside `attached`. Raises ValueError for a module
    without.
    """

    def __init__(self, module: nn.Module):
        self.all = linears(module)
        ours = {n: kernels.unwrap(m.weight.detach()) for n, m in self.all.items() if kernels.is_ours(m.weight)}
        plain = {n: w for n, w in ours.items() if type(w) in TUNED}
        if not any(isinstance(w, SVDQuantWeight) for w in plain.values()):
            raise ValueError("This model has no svdquant_w4a4 layer. Quantize it first, or load a 4-bit file")
        with torch.inference_mode(False):
            self.layers = {n: TUNED[type(w)](_ordinary(w)) for n, w in plain.items()}

    def parameters(self) -> list[nn.Parameter]:
        return [p for t in self.layers.values() for p in t.parameters()]

    def weights(self) -> dict[str, SVDQuantWeight | AWQWeight]:
        return {n: t.weight() for n, t in self.layers.items()}

    @contextmanager
    def attached(self, check: Callable[[], None] = lambda: None) -> Iterator[Tuner]:
        """While it is entered the module computes with the tuned layers; ``check`` is called in every layer and may
        raise. Afterwards the module is as it was.
        """

        def made(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
            return self._tuned(layer, name, check) if name in self.layers else _kept(layer, layer.forward, check)

        with forwards(self.all, made):
            yield self

    def _tuned(self, layer: nn.Module, name: str, check: Callable[[], None]) -> Callable[[Tensor], Tensor]:
        tuned = self.layers[name]

        def forward(x: Tensor) -> Tensor:
            check()
            y = tuned(x)
            return y if layer.bias is None else y + layer.bias.to(y)

        return forward


def _kept(layer: nn.Module, product: Callable, check: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    """A layer that is not tuned: its own forward, the gradient of its dense product."""

    def effective(dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        check()
        return blocks(layer, dtype, device)

    return lambda x: Frozen.apply(x, product, effective)


def _ordinary(w: SVDQuantWeight | AWQWeight) -> SVDQuantWeight | AWQWeight:
    """Copies outside inference mode of everything but the codes, which autograd never sees."""
    sides = {f.name: getattr(w, f.name) for f in fields(w) if f.name != "qweight"}
    return replace(w, **{n: v.clone() for n, v in sides.items() if isinstance(v, Tensor)})
