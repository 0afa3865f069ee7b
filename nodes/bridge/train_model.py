"""A ComfyUI MODEL as training sees it (training/denoise.py): conditions, noise levels, and its diffusion model.

Conditions are made as ComfyUI's samplers make them (``extra_conds``), so every model that samples can be trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...training import eight_bit, job
from ...training.denoise import Denoiser
from ...training.ordinary import alias, ordinary
from .build import patched_layers, weight_of
from .sampling import facts_of


def resident(model):
    """``model`` where all its weights lie on the device while it trains: dynamic VRAM may move them between a forward
    and its backward pass, so such a model is loaded once more without it. Raises ValueError where that cannot be done.
    """
    if not model.is_dynamic():
        return model.clone()
    if model.cached_patcher_init is None:
        raise ValueError("This model was made inside the workflow, so it cannot be loaded again for training. Save "
                         "it and load the file, or start ComfyUI with --disable-dynamic-vram")  # fmt: skip
    return model.clone(disable_dynamic=True)


@contextmanager
def unfused() -> Iterator[None]:
    """Inside it ComfyUI leaves out kernels that have no gradient, and with them those that take an activation and a
    linear in one (``comfy.ops.linear_input_act``), which no hook of the linear sees. The numbers stay the same.
    """
    mm = comfy.model_management
    before, mm.in_training = mm.in_training, True
    try:
        yield
    finally:
        mm.in_training = before


@contextmanager
def learning(model) -> Iterator[None]:
    """Inside it ``model``, loaded, can be trained: inference mode is left, and ComfyUI leaves out kernels that have no
    gradient. Afterwards all is as it was.
    """
    with unfused(), ordinary(model.model):
        yield


@contextmanager
def placed(model, compress: bool) -> Iterator[None]:
    """Inside it ``model`` is loaded whole and can be trained. ``compress``: what a quantized one keeps in 16 bits, and
    no LoRA changes, is held in 8 bits; its 16-bit bytes stay on the offload device.
    """
    mm, module = comfy.model_management, model.model.diffusion_model
    with ExitStack() as stack:
        if compress and eight_bit.is_quantized(module):
            mm.unload_model_and_clones(model)  # what is loaded already holds them, perhaps with another LoRA's change
            stack.enter_context(eight_bit.in_8_bits(module, patched_layers(model)))
            stack.callback(mm.unload_model_and_clones, model)  # before they are put back
        mm.load_models_gpu([model], force_full_load=True)
        stack.enter_context(learning(model))
        yield


def clean(found) -> Tensor:
    """A tensor made in inference mode as an ordinary one."""
    return alias(found.detach()) if isinstance(found, Tensor) else found


def condition(model, cond: list, latent: Tensor) -> dict:
    """name -> ComfyUI's COND object of one encoded caption, for a picture of ``latent``'s (C, h, w) size."""
    device = model.load_device
    converted = comfy.sampler_helpers.convert_cond([cond[0]])
    made = comfy.samplers.encode_model_conds(
        model.model.extra_conds, converted, latent[None].to(device), device, "positive"
    )
    out = {}
    for name, value in made[0]["model_conds"].items():
        inner = value.cond
        inner = [clean(t) for t in inner] if isinstance(inner, list) else clean(inner)
        out[name] = value._copy_with(inner)
    return out


def together(conds: Sequence[dict]) -> dict | None:
    """The conditions of a batch, or None when ComfyUI cannot put them into one."""
    first, rest = conds[0], conds[1:]
    if any(c.keys() != first.keys() or not all(first[k].can_concat(c[k]) for k in first) for c in rest):
        return None
    return {k: first[k].concat([c[k] for c in rest]) if rest else first[k].cond for k in first}


def denoiser(model) -> Denoiser:
    """``model``, loaded, as a `Denoiser` whose conditions `condition` makes."""
    base, sampling = model.model, model.model.model_sampling
    options = model.model_options.get("transformer_options", {})

    def predict(x: Tensor, sigma: Tensor, conds: Sequence[dict]) -> Tensor:
        joined = together(conds)
        if joined is None:
            return torch.cat([predict(x[i : i + 1], sigma[i : i + 1], [c]) for i, c in enumerate(conds)])
        more = {k: on(v, x.device) for k, v in joined.items()}
        return base.apply_model(x, sigma, transformer_options={**options}, **more)

    def mix(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        wide = sigma.view(-1, *[1] * (x0.dim() - 1))
        return sampling.noise_scaling(wide, noise, x0, False)

    sigmas = sampling.sigmas.detach().float().cpu().clone()
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    return Denoiser(predict, mix, sigmas, flow, model.load_device)


def on(value, device):
    if isinstance(value, list):
        return [on(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def digest_of(model) -> str:
    """Of a MODEL's linears as they are, and of its patches."""
    strengths = {str(key): [p[0] for p in value] for key, value in model.patches.items()}
    return job.digest_of(model.model.diffusion_model, strengths, lambda n: weight_of(model, f"{n}.weight"))


def base_of(model, digest: str = "") -> job.Base:
    """``model``, loaded, as a job sees it. ``digest``: of the MODEL that it was made of."""
    module, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
    return job.Base(module, denoiser(model), dtype, family=facts_of(model, []).family, digest=digest)
