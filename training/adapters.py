"""LoRA factors beside the linears of a torch module, trainable on weights of any kind: dense, this pack's 4-bit ones,
or ComfyUI's quantized ones.

    y = frozen(x) + scale (x down^T) up^T      down (r, K), up (N, r) float32, scale = alpha / r
    dL/dx = dL/dy W + ...                      W the frozen layer's effective dense weight

``frozen`` is the module's own forward: the real kernel, with whatever it rounds activations to, so training sees what
sampling will do. Its gradient is straight-through: that of the dense product, with some rows of W at a time made for
it and dropped again. The frozen weight is never written to, and nothing of a layer's inner work is kept for the
backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ..quant import kernels, parts

ELEMENTS = 2**23  # of a 4-bit weight that are made dense at a time
PREFIX = "diffusion_model."


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> every linear of ``module``, whatever its weight is stored as."""
    named = ((n, m, getattr(m, "weight", None)) for n, m in module.named_modules())
    return {n: m for n, m, w in named if hasattr(m, "in_features") and isinstance(w, Tensor) and w.dim() == 2}


@contextmanager
def forwards(layers: Mapping[str, nn.Module], made: Callable[[str, nn.Module], Callable]) -> Iterator[None]:
    """While it is entered each layer's forward is ``made(name, layer)``; afterwards its own, whatever was raised."""
    before = {n: layer.__dict__.get("forward") for n, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.forward = made(name, layer)
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__.pop("forward", None)
            if before[name] is not None:
                layer.forward = before[name]


def blocks(layer: nn.Module, dtype: torch.dtype, device: torch.device | str) -> Iterator[Tensor]:
    """The effective (N, K) weight of a linear on ``device``, of a large 4-bit one some rows at a time."""
    weight = layer.weight.detach()
    if not kernels.is_ours(weight):
        there = weight.to(device=device)
        yield (there.dequantize() if isinstance(there, QuantizedTensor) else there).to(dtype)
        return
    whole = kernels.unwrap(weight.to(device=device))
    if isinstance(whole, parts.Parts | parts.CoreLowRankWeight):
        yield parts.dequantize(whole, dtype)
        return
    n, k = whole.shape
    step = max(1, ELEMENTS // (16 * k)) * 16  # whole tiles of nvfp4's scales
    for start in range(0, n, step):
        yield parts.dequantize(parts.take_rows(whole, start, min(start + step, n)), dtype)


def dense(layer: nn.Module, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The effective (N, K) weight of a linear, made on ``device``."""
    return torch.cat(list(blocks(layer, dtype, device)))


class Frozen(torch.autograd.Function):
    """A frozen linear: its own forward, the gradient of the dense product."""

    @staticmethod
    def forward(ctx, x: Tensor, product: Callable[[Tensor], Tensor], effective: Callable[..., Iterator[Tensor]]):
        ctx.effective, ctx.dtype = effective, x.dtype
        y = product(x)
        return y.clone() if y._base is not None else y  # models add to it in place, which autograd forbids on views

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, start = None, 0
        for block in ctx.effective(grad.dtype, grad.device):
            stop = start + block.shape[0]
            part, start = grad[..., start:stop] @ block, stop
            out = part if out is None else out.float() + part
        return out.to(ctx.dtype), None, None


class Product(torch.autograd.Function):
    """x W^T in x's dtype of a float32 W that is trained. Only x and W itself are kept, no copy of W in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        back = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows, seen = grad.reshape(-1, grad.shape[-1]), x.to(grad.dtype).reshape(-1, x.shape[-1])
        return back, (rows.t() @ seen).to(weight.dtype)


class Factors(nn.Module):
    """One layer's LoRA. New ones are peft's: ``down`` uniform in +-1/sqrt(K), ``up`` zero, so nothing changes yet."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        n, k = shape
        down = torch.empty(rank, k)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(n, rank))
        self.alpha, self.rank = alpha, rank

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(Product.apply(x, self.down), self.up) * (self.alpha / self.rank)

    def tensors(self) -> dict[str, Tensor]:
        alpha = torch.tensor(float(self.alpha))
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": alpha}


class Whole(nn.Module):
    """One layer's whole update (N, K), zero at first: a partial fine-tune of a base that stays as it is."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.diff = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.diff)

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.diff}


class Adapters:
    """LoRAs for the linears ``names`` of ``module``. They act only inside `attached`, and not inside `off`. With rank 0
    they are whole matrices (`Whole`).

    Raises ValueError for a name that is no linear of the module.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        rank: int,
        alpha: float | None = None,
        seed: int = 0,
    ):
        found = linears(module)
        names = list(names)
        unknown = [n for n in names if n not in found]
        if unknown or not names:
            raise ValueError(f"The model has no linear layer {unknown[0]!r}" if unknown else "No layer to train")
        self.layers = found  # all: a quantized linear has no gradient of its own
        self.module, self.active, self.check = module, True, lambda: None
        generator = torch.Generator().manual_seed(seed)
        # Outside inference mode: a node runs in it, and tensors made there can never be trained.
        with torch.inference_mode(False):
            self.factors = {
                n: Factors(tuple(found[n].weight.shape), rank, rank if alpha is None else alpha, generator)
                if rank
                else Whole(tuple(found[n].weight.shape))
                for n in names
            }
            self.to(found[names[0]].weight.device)

    def parameters(self) -> list[nn.Parameter]:
        return [p for f in self.factors.values() for p in f.parameters()]

    def to(self, device: torch.device | str) -> Adapters:
        for factors in self.factors.values():
            factors.to(device)
        return self

    @contextmanager
    def attached(self, check: Callable[[], None] = lambda: None) -> Iterator[Adapters]:
        """While it is entered the module computes with the LoRAs, and ``check`` is called in every layer's forward and
        backward pass; it may raise to stop. Afterwards the module is as it was, whatever was raised.
        """
        self.check = check
        try:
            with forwards(self.layers, lambda n, layer: self._forward(layer, layer.forward, self.factors.get(n))):
                yield self
        finally:
            self.check = lambda: None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside it the module computes as without the LoRAs: a teacher that takes no memory of its own."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def _forward(self, layer: nn.Module, product: Callable, factors: nn.Module | None) -> Callable[[Tensor], Tensor]:
        def effective(dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
            self.check()
            return blocks(layer, dtype, device)

        def forward(x: Tensor) -> Tensor:
            self.check()
            y = Frozen.apply(x, product, effective)
            return y if factors is None or not self.active else y + factors(x).to(y.dtype)

        return forward

    def state_dict(self, prefix: str = PREFIX, rename: Callable[[str], str] = lambda name: name) -> dict[str, Tensor]:
        """The tensors of a LoRA file that stock loaders read: ``<prefix><layer>.lora_down.weight``, ``.lora_up.weight``
        and ``.alpha``, or ``.diff``, in float32 on the CPU. ``rename``: a module's layer name -> the file's.
        """
        return {
            f"{prefix}{rename(name)}.{part}": tensor.detach().cpu().clone()
            for name, factors in self.factors.items()
            for part, tensor in factors.tensors().items()
        }

    @torch.no_grad()
    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Sets layers' (down (r, K), up (N, r)); others keep theirs."""
        for name, (down, up) in factors.items():
            self.factors[name].down.copy_(down)
            self.factors[name].up.copy_(up)
