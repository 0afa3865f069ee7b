"""Presets for diffusers: one of its schedulers that visits exactly what the row lists, whatever a pipeline asks it for.

Pipelines make their own timesteps: evenly spaced, cut by image-to-image, shifted by size. A `visiting` scheduler keeps
to its list, so every pipeline that diffusers has samples as the table, and so ComfyUI, says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ..families.preset import Preset
from ..sampling.samplers import perflow_velocity
from ..sampling.schedules import TRAIN

# What Stable Diffusion was trained with, for a pipeline whose scheduler does not say
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None,
           "rescale_betas_zero_snr": False, "prediction_type": "epsilon"}  # fmt: skip
# sampler -> (its scheduler, settings); "leading": it starts from noise of unit variance, as models were trained
KINDS = {
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading"}),
    "lcm": (LCMScheduler, {"clip_sample": False}),
    "tcd": (TCDScheduler, {"clip_sample": False}),
}


def scheduler(row: Preset, visits: Sequence[float], own: Mapping):
    """A diffusers scheduler that samples as ``row`` says and visits ``visits`` (see `sampling.schedules`).

    ``own``: the configuration of the pipeline's scheduler, which knows the noise that the model was trained with.
    Raises ValueError for another number of noise levels than 1000.
    """
    if row.prediction == "flow":
        return _flow(row, visits)
    if (levels := own.get("num_train_timesteps", TRAIN)) != TRAIN:
        raise ValueError(f"preset {row.id} counts {TRAIN} noise levels, and this pipeline's scheduler has {levels}")
    trained = {key: own.get(key, usual) for key, usual in TRAINED.items()}
    if row.prediction == "rectified_flow":
        return RectifiedFlow(visits, trained)
    if row.sampler == "perflow":
        return PeRFlow(visits, trained, row.prediction)
    kind, settings = KINDS[row.sampler]
    if row.prediction == "x0":
        settings = {**settings, "prediction_type": "sample"}
    made = visiting(kind)(**{**trained, **settings})
    made.visits, made.eta = tuple(visits), row.eta
    return made


class _Visiting:
    """In front of a scheduler: a list of its own, ``visits``, in place of whatever a pipeline wants set."""

    visits: tuple[float, ...] = ()
    eta: float | None = None  # of TCD: the row's, whatever the pipeline would say

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **_):
        self.num_inference_steps = len(self.visits)
        self._step_index = self._begin_index = None
        if isinstance(self, (LCMScheduler, TCDScheduler)):
            self.timesteps = torch.tensor(self.visits, device=device, dtype=torch.long)
            return
        if isinstance(self, FlowMatchEulerDiscreteScheduler):
            levels = np.array(self.visits)
            self.timesteps = torch.tensor(levels * TRAIN, device=device, dtype=torch.float32)
        else:
            table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
            levels = table[np.array(self.visits, dtype=int)]
            self.timesteps = torch.tensor(self.visits, device=device, dtype=torch.float32)
        self.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        more = {} if self.eta is None else {"eta": self.eta}
        return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict, **more)


def visiting(kind: type) -> type:
    """The scheduler ``kind`` as a `_Visiting` one, under its name: pipelines and configurations know it by that."""
    return type(kind.__name__, (_Visiting, kind), {})


def _flow(row: Preset, visits: Sequence[float]):
    # "lcm" on a flow: the predicted picture under new noise. What is left is Euler: res_multistep is ComfyUI's own.
    made = visiting(FlowMatchEulerDiscreteScheduler)(shift=1.0, stochastic_sampling=row.sampler == "lcm")
    made.visits = tuple(visits)
    return made


class _Line(DDIMScheduler):
    """A straight line from each of ``visits`` to the next; DDIM lends the noise table and the interface."""

    def __init__(self, visits: Sequence[float], trained: Mapping):
        super().__init__(clip_sample=False, **trained)
        self.visits = tuple(visits)

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, **_):
        self.num_inference_steps = len(self.visits)
        self.timesteps = torch.tensor([v * self.scale for v in self.visits], device=device, dtype=torch.float32)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        here = int((self.timesteps - timestep).abs().argmin())
        at, to = self.visits[here], (*self.visits, 0.0)[here + 1]
        moved = self.moved(model_output.float(), sample.float(), at, to).to(model_output.dtype)
        return DDIMSchedulerOutput(moved) if return_dict else (moved,)


class RectifiedFlow(_Line):
    """``visits``: sigmas. The network says data - noise at timestep 1000 sigma. Source: InstaFlow pipeline_rf.py."""

    scale = TRAIN

    def moved(self, output, z, at, to):
        return z + (at - to) * output

    def add_noise(self, original_samples, noise, timesteps):
        share = (timesteps / TRAIN).to(original_samples).view(-1, *[1] * (original_samples.dim() - 1))
        return (1 - share) * original_samples + share * noise


class PeRFlow(_Line):
    """``visits``: timesteps 1000 ... 1, where the noise is that of the timestep before; see `sample_perflow`."""

    scale = 1

    def __init__(self, visits: Sequence[float], trained: Mapping, prediction: str):
        super().__init__(visits, trained)
        self.prediction = prediction

    def moved(self, output, z, at, to):
        velocity = perflow_velocity(self.prediction, z, output, at / TRAIN, self.alphas_cumprod.double())
        return z + (to - at) / TRAIN * velocity

    def add_noise(self, original_samples, noise, timesteps):
        return super().add_noise(original_samples, noise, (timesteps - 1).long())
