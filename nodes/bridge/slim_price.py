"""What slimming costs: errors measured on the model itself, one block at a time and all together.

The model is sampled along a short trajectory. At each of its states it answers once as it is and once with each change,
and the difference is the change's price. Changes are switched on by forward hooks and by patches that look at a set,
so weights, LoRAs and 4-bit layers are where they always are, and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ...slim.choose import Key
from .build import PREFIX

Size = tuple[int, int]


@dataclass(frozen=True)
class Change:
    """One operation ``op`` on the layers of one block: ``kind`` attention or convolutions."""

    key: Key
    kind: str
    op: str
    layers: tuple[str, ...]

    @property
    def block(self) -> str:
        return f"{self.key[0]} {self.key[1]}"


@dataclass(frozen=True)
class Plan:
    """``factored``: name of each convolution -> what stands in for it."""

    changes: tuple[Change, ...]
    factored: dict[str, torch.nn.Module]
    strength: float


@dataclass(frozen=True)
class Inputs:
    """What is measured with: conditionings, one a prompt, and a latent for its size. ``levels``: noise levels."""

    prompts: tuple
    latent: torch.Tensor
    levels: int
    seed: int = 0


@dataclass(frozen=True)
class Price:
    """``errors``: relative error of the model's answer for each tuple of changes; ``sizes``: layer -> (height,
    width) of the map that it works on.
    """

    errors: dict[tuple[Change, ...], float]
    sizes: dict[str, Size]


class Switch:
    """The changes that are on. A slimmed model has none of this: all of its changes are always on."""

    def __init__(self):
        self.on: frozenset[Change] = frozenset()
        self.sizes: dict[str, Size] = {}


def measure(model, groups: Sequence[tuple[Change, ...]], switch: Switch, hooks: Callable, inputs: Inputs,
            step: Callable[[], None]) -> Price:  # fmt: skip
    """The price of each group of changes. ``hooks(name) -> hook or None`` gives the hook of a layer; ``model`` has the
    patches that look at ``switch``; ``step`` is called after each evaluation and may raise.
    """
    wrong = dict.fromkeys(groups, 0.0)
    total = 0.0

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        nonlocal total
        rows = x.new_ones([x.shape[0]])
        with ExitStack() as stack:
            _attach(model, groups, switch, hooks, stack)
            for sigma, following in pairwise(sigmas):
                switch.on = frozenset()
                answer = denoise(x, sigma * rows, **extra_args)
                total += answer.double().square().sum().item()
                for group in groups:
                    switch.on = frozenset(group)
                    changed = denoise(x, sigma * rows, **extra_args)
                    wrong[group] += (changed - answer).double().square().sum().item()
                    step()
                x = answer + (x - answer) * (following / sigma)
        return x

    try:
        for i, prompt in enumerate(inputs.prompts):
            _sample(model, sampler, prompt, inputs, inputs.seed + i)
    finally:
        switch.on = frozenset()
    return Price({group: (w / max(total, 1e-30)) ** 0.5 for group, w in wrong.items()}, dict(switch.sizes))


def _attach(model, groups, switch: Switch, hooks: Callable, stack: ExitStack) -> None:
    """Hooks on the layers of all changes: the change itself, and one that notes the size of the map."""
    for change in {c for group in groups for c in group}:
        for name in change.layers:
            module = comfy.utils.get_attr(model.model, PREFIX + name)
            # An attention sees tokens; the map is that of the transformer around it.
            around = name.partition(".transformer_blocks.")[0]
            seen = comfy.utils.get_attr(model.model, PREFIX + around)
            stack.callback(seen.register_forward_pre_hook(_noting(switch, name)).remove)
            hook = hooks(change, name)
            if hook is not None:
                at = module.to_out if change.kind == "attention" else module
                stack.callback(at.register_forward_hook(hook).remove)


def _noting(switch: Switch, name: str):
    def hook(module, args):
        switch.sizes[name] = (args[0].shape[2], args[0].shape[3])

    return hook


def _sample(model, sampler: Callable, prompt, inputs: Inputs, seed: int) -> None:
    mm.throw_exception_if_processing_interrupted()
    latent = comfy.sample.fix_empty_latent_channels(model, inputs.latent[:1])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", inputs.levels)
    comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(latent, seed), 1.0, comfy.samplers.KSAMPLER(sampler), sigmas, prompt, prompt,
        latent, disable_pbar=True, seed=seed,
    )  # fmt: skip
