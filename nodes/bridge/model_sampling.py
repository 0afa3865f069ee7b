"""What presets do to a MODEL, in ComfyUI's terms: its model_sampling, the guidance bias of an LCM, sampler objects.

Every function returns a clone; the model that came in stays as it was. Where a stock node does the thing, it is called.
"""

from __future__ import annotations

import copy

import comfy.lora
import comfy.model_sampling
import comfy.samplers
import torch
from comfy_extras import nodes_flux, nodes_model_advanced
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open

from ...checkpoints import header
from ...families.preset import Preset
from ...quant import kernels
from ...sampling.detect import GUIDANCE_KEY
from ...sampling.samplers import omega_bias, sample_perflow, sample_tcd
from ...sampling.schedules import TRAIN, Plan

FLUX_SHIFTS = (1.15, 0.5)  # FLUX.1's at 4096 and at 256 tokens; the model's authors' values
TIME_LAYER = "diffusion_model.time_embed.0"
OMEGA = "nibble.lcm_guidance"  # attachment of a MODEL whose time layer holds an LCM's guidance already
CLOSE = 1e-5  # relative difference at which ComfyUI still calls two sigmas equal (Sampler.max_denoise)


class ConsistencyV(nodes_model_advanced.LCM):
    """LCM's boundary conditions around a v-prediction network; ComfyUI's own class knows epsilon only."""

    def calculate_denoised(self, sigma, model_output, model_input):
        x0 = comfy.model_sampling.V_PREDICTION.calculate_denoised(self, sigma, model_output, model_input)
        level = comfy.model_sampling.reshape_sigma(sigma, model_output.ndim)
        return super().calculate_denoised(sigma, (model_input - x0) / level, model_input)


class ConsistencyVSampling(nodes_model_advanced.ModelSamplingDiscreteDistilled, ConsistencyV):
    """LCM's 50-point grid and boundary for a v-prediction model (LCM paper, SD 2.1 at 768)."""


class RectifiedFlow(comfy.model_sampling.CONST):
    """A flow whose network predicts data - noise: ComfyUI's CONST with the sign turned. Source: InstaFlow."""

    def calculate_denoised(self, sigma, model_output, model_input):
        return super().calculate_denoised(sigma, -model_output, model_input)


class RectifiedFlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, RectifiedFlow):
    """timestep = 1000 sigma, as the official pipeline counts."""


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The same for a network that predicts noise - data."""


class PeRFlowSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """PeRFlow tells its network t where the noise is that of timestep t - 1: 1000, 750, 500, 250 for four steps."""

    def timestep(self, sigma):
        return super().timestep(sigma) + 1

    def sigma(self, timestep):
        return super().sigma(timestep - 1)


def with_sampling(model, model_sampling):
    """A clone of ``model`` that samples by ``model_sampling``."""
    m = model.clone()
    m.add_object_patch("model_sampling", model_sampling)
    return m


def noise_table(model_sampling) -> torch.Tensor:
    """(1000,) sigmas of timesteps 0 ... 999. Raises ValueError for a model that has no such table."""
    discrete = isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if not discrete or len(model_sampling.sigmas) != TRAIN:
        raise ValueError(
            "this needs the 1000 noise levels of an SD 1.5, SD 2 or SDXL model as it was loaded: take "
            "ModelSamplingDiscrete (lcm), ModelSamplingContinuous and the like out of the MODEL line before it"
        )
    return model_sampling.sigmas


def rectified_flow(model, shift: float = 1.0, data_minus_noise: bool = True):
    """A MODEL sampled as a rectified flow with timestep 1000 sigma."""
    kind = RectifiedFlowSampling if data_minus_noise else FlowSampling
    model_sampling = kind(None)
    model_sampling.set_parameters(shift=shift, multiplier=1000)
    return with_sampling(model, model_sampling)


def _own(model, row: Preset, size):
    noise_table(model.get_model_object("model_sampling"))
    return model


def _lcm(model, row: Preset, size):
    own = model.get_model_object("model_sampling")
    if isinstance(own, comfy.model_sampling.V_PREDICTION):
        return with_sampling(model, ConsistencyVSampling(model.model.model_config))
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]


def _x0(model, row: Preset, size):
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "x0", False)[0]


def _rectified(model, row: Preset, size):
    return rectified_flow(model)


def _perflow(model, row: Preset, size):
    return with_sampling(model, PeRFlowSampling(model.model.model_config))


def _flow(model, row: Preset, size):
    if row.size_shift:
        return nodes_model_advanced.ModelSamplingFlux().patch(model, *FLUX_SHIFTS, *size)[0]
    if row.shift is None:
        return model
    scale = getattr(model.get_model_object("model_sampling"), "multiplier", 1.0)
    return nodes_model_advanced.ModelSamplingSD3().patch(model, row.shift, multiplier=scale)[0]


PATCHES = {
    "epsilon": _own,
    "lcm": _lcm,
    "x0": _x0,
    "flow": _flow,
    "rectified_flow": _rectified,
    "diff_eps": _perflow,
    "ddim_eps": _perflow,
    "velocity": _perflow,
}


def patched(model, row: Preset, size: tuple[int, int]):
    """``model`` as ``row`` wants it sampled. ``size``: the picture's (width, height) in pixels."""
    return PATCHES[row.prediction](model, row, size)


def sigmas_of(plan: Plan, model, size: tuple[int, int]) -> torch.Tensor:
    """The plan's SIGMAS, (keep + 1,) float32 on the CPU ending in 0; empty for no step."""
    if plan.keep == 0:
        return torch.FloatTensor([])
    model_sampling = model.get_model_object("model_sampling")
    if plan.scheduler == "flux2":
        full = nodes_flux.get_schedule(plan.total, round(size[0] * size[1] / 256))
    elif plan.scheduler:
        full = comfy.samplers.calculate_sigmas(model_sampling, plan.scheduler, plan.total)
    elif plan.sigmas:
        full = torch.tensor([*plan.sigmas, 0.0])
    else:
        full = model_sampling.sigma(torch.tensor(plan.timesteps))
        full = torch.cat([full, full.new_zeros(1)])
    return full.cpu()[-(plan.keep + 1) :]


class _FromNoise:
    """In front of a model_sampling: sampling may start at ``first`` from pure noise."""

    first = 0.0

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        starts = float(torch.as_tensor(sigma).min()) >= self.first * (1 - CLOSE)
        return super().noise_scaling(sigma, noise, latent_image, max_denoise or starts)


def from_noise(model, first: float):
    """``model`` as it is where sampling starts at sigma ``first`` from pure noise, below the model's highest sigma.

    ComfyUI then adds noise * first to the latent; trained one-step models expect sqrt(1 + first^2), so that the network
    sees unit variance. Source: diffusers, whose schedulers hand the noise itself to the network.
    """
    own = model.get_model_object("model_sampling")
    if first >= float(own.sigma_max) * (1 - CLOSE):
        return model
    model_sampling = copy.copy(own)
    model_sampling._buffers = dict(own._buffers)
    model_sampling.__class__ = type("FromNoise", (_FromNoise, type(own)), {"first": first})
    return with_sampling(model, model_sampling)


def guidance_projection(path: str) -> torch.Tensor:
    """The (C, 256) guidance embedding of the LCM file at ``path``. Raises ValueError when it holds none."""
    header.read(path)
    with safe_open(path, framework="pt") as f:
        name = next((k for k in f.keys() if k.endswith(GUIDANCE_KEY)), None)  # noqa: SIM118
        if name is None:
            raise ValueError(
                "this file has no guidance embedding (time_embedding.cond_proj): choose the diffusers-format file of a "
                "full LCM, such as LCM_Dreamshaper_v7's unet"
            )
        return f.get_tensor(name)


def lcm_guidance(model, path: str, scale: float):
    """``model`` with the guidance ``scale`` of the full LCM at ``path`` in the bias of its first time layer."""
    key = f"{TIME_LAYER}.weight"
    time_embed = getattr(model.model.diffusion_model, "time_embed", None)
    if time_embed is None:
        raise ValueError("this model has no time_embed layer: LCM guidance is for SD 1.5, SD 2 and SDXL UNets")
    weight = time_embed[0].weight
    if isinstance(weight, QuantizedTensor):
        weight = kernels.dense(weight)
    weight = comfy.lora.calculate_weight(model.patches.get(key, []), weight.detach().float().clone(), key)
    bias = omega_bias(scale, guidance_projection(path), weight)
    m = model.clone()
    m.add_patches({f"{TIME_LAYER}.bias": ("diff", (bias,))}, 1.0)
    m.set_attachments(OMEGA, scale)
    return m


def _table_at_run(model) -> torch.Tensor:
    """The noise table of the model that a running sampler was handed (ComfyUI's inpaint wrapper)."""
    return noise_table(model.inner_model.model_patcher.get_model_object("model_sampling"))


def tcd_sampler(eta: float):
    """TCD as a SAMPLER."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sample_tcd(model, x, sigmas, extra_args, callback, disable, table=_table_at_run(model), eta=eta)

    return comfy.samplers.KSAMPLER(sample)


def perflow_sampler(prediction: str):
    """PeRFlow as a SAMPLER."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        table = _table_at_run(model)
        return sample_perflow(model, x, sigmas, extra_args, callback, disable, table=table, prediction=prediction)

    return comfy.samplers.KSAMPLER(sample)


def sampler_of(row: Preset):
    """The row's SAMPLER: ours, or ComfyUI's by name."""
    if row.sampler == "tcd":
        return tcd_sampler(row.eta)
    if row.sampler == "perflow":
        return perflow_sampler(row.prediction)
    return comfy.samplers.sampler_object(row.sampler)
