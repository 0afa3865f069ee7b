"""The one view of a model that training has: ``predict(x, sigma, conds) -> x0``, ComfyUI's and k-diffusion's contract.

x      (B, C, h, w) float32, noised by ``mix``; for VP models x0 + sigma n, for flow models (1 - sigma) x0 + sigma n
sigma  (B,)         from ``sigmas``, ascending
conds  B entries of whatever the maker of the denoiser understands, one a picture
loss   weight(sigma) |x0' - x0|^2, the same for every parametrisation
         VP: min(1 / sigma^2, 5), which is min-SNR-5 (arXiv 2303.09556)      flow: 1 / sigma^2, the velocity's error
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 5.0
SMALLEST = 1e-2  # a flow's velocity at sigma 0 would divide by it


@dataclass(frozen=True)
class Denoiser:
    """See the file header. ``device``: where ``predict`` wants its tensors."""

    predict: Callable[[Tensor, Tensor, Sequence], Tensor]
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]
    sigmas: Tensor
    flow: bool = False
    device: torch.device | str = "cpu"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) noise levels: timesteps uniform for VP, logit-normal for flow (arXiv 2403.03206)."""
        if self.flow:
            share = torch.randn(count, generator=generator).sigmoid()
        else:
            share = torch.rand(count, generator=generator)
        return self.at(share)

    def at(self, share: Tensor) -> Tensor:
        """The noise levels at ``share`` in [0, 1) of the timesteps."""
        rows = (share * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        return self.sigmas[rows].to(self.device)

    def weight(self, sigma: Tensor) -> Tensor:
        """(B,) of the squared error of the clean picture."""
        snr = 1 / sigma.clamp(min=SMALLEST) ** 2
        return snr if self.flow else snr.clamp(max=GAMMA)

    def loss(self, x0: Tensor, noise: Tensor, sigma: Tensor, conds: Sequence) -> Tensor:
        """Scalar; ``x0`` and ``noise`` (B, C, h, w) on ``device``."""
        out = self.predict(self.mix(x0, noise, sigma), sigma, conds)
        error = (out.float() - x0).square().flatten(1).mean(1)
        return (self.weight(sigma) * error).mean()


def variance_preserving(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``mix`` of VP models."""
    return x0 + _wide(sigma, x0) * noise


def straight(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``mix`` of flow models."""
    s = _wide(sigma, x0)
    return (1 - s) * x0 + s * noise


def _wide(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (like.dim() - 1))


def diffusers_unet(unet, scheduler) -> Denoiser:
    """A diffusers UNet2DConditionModel as a `Denoiser`; a cond is a dict of tensors (1, ...): ``context``, for SDXL
    ``text_embeds`` and ``time_ids``, and in a dict ``attention`` whatever its attentions read besides. Raises
    ValueError for a scheduler that predicts neither epsilon nor velocity.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"The scheduler says that the model predicts {kind!r}; epsilon and v_prediction are trained")
    alphas = scheduler.alphas_cumprod.double()
    sigmas = ((1 - alphas) / alphas).sqrt().float()

    def predict(x: Tensor, sigma: Tensor, conds: Sequence) -> Tensor:
        s = _wide(sigma, x)
        t = (sigmas.to(sigma.device) - sigma[:, None]).abs().argmin(1)
        inputs = [{k: v for k, v in c.items() if k != "attention"} for c in conds]
        extra, attention = _joined(inputs), _joined([c.get("attention", {}) for c in conds])
        context = extra.pop("context")
        scaled = (x / (s**2 + 1).sqrt()).to(unet.dtype)
        out = unet(
            scaled, t, context.to(unet.dtype), cross_attention_kwargs=attention or None, added_cond_kwargs=extra or None
        ).sample.float()
        if kind == "epsilon":
            return x - s * out
        return x / (s**2 + 1) - s / (s**2 + 1).sqrt() * out

    return Denoiser(predict, variance_preserving, sigmas, device=unet.device)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
