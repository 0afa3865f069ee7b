"""One model evaluation without running it: ComfyUI's own class again on the meta device, with empty inputs.

So FLOPs and live bytes are those of the code that will run, whatever this ComfyUI's version of it does.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules import attention

from ...families import FAMILIES
from ...profiling import work

INPUTS = {family.module: family.inputs for family in FAMILIES if family.inputs}  # of ComfyUI's classes


def parameters(module) -> int:
    """Logical weights of a module: a 4-bit one counts what it stands for."""
    return sum(p.numel() for p in module.parameters())


def factor(base) -> int:
    """Picture pixels per pixel of the latent of ComfyUI's model ``base``."""
    return base.latent_format.spacial_downscale_ratio


def knows(base) -> bool:
    """Whether a model of ``base``'s class can be simulated."""
    return type(base.diffusion_model).__name__ in INPUTS


def evaluation(base, shape: tuple[int, ...], dtype: torch.dtype, kind: str, tokens: int = 0) -> work.Work:
    """The work of one evaluation of ComfyUI's model ``base`` (a BaseModel whose class `knows`).

    ``shape``: the latent's (B, C, H, W), guidance rows included; C 0 for the model's own. ``kind``: of attention.
    ``tokens``: of text, 0 for one prompt's usual number.
    """
    config = {**base.model_config.unet_config, "dtype": dtype}
    module = type(base.diffusion_model)(**config, device="meta", operations=comfy.ops.disable_weight_init)
    module.requires_grad_(False).eval()

    def meta(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    sizes = INPUTS[type(module).__name__](config)
    if tokens:
        sizes["context"] = (tokens, sizes["context"][1])
    rows, channels = shape[0], shape[1] or config["in_channels"]
    x, t = meta(rows, channels, *shape[2:]), torch.empty(rows, device="meta")
    rest = {name: meta(rows, *size) for name, size in sizes.items()}
    options = {"optimized_attention_override": _one_kernel}
    return work.simulate(module, lambda: module(x, t, transformer_options=options, **rest), kind)


def _one_kernel(function, q, k, v, heads, mask=None, **options):
    """Attention through torch's own function, which the simulation counts in its stead."""
    options.pop("transformer_options", None)
    return attention.attention_pytorch(q, k, v, heads, mask, **options)
