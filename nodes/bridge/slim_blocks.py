"""The blocks of a ComfyUI UNet: where its self-attentions and 3x3 convolutions are, and modules that stand in for them.

A slimmed MODEL is a clone with object patches: ComfyUI puts a `StandIn` into the shared module when the clone is
loaded, and the original back when another clone is. The originals stay in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import comfy.lora
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample

from ...slim.choose import Key, UNetBlock
from ...slim.operations import Conv
from .build import PREFIX

FEWEST = 32  # channels: the first and the last convolution are too thin to factor


class StandIn(torch.nn.Module):
    """Runs ``run`` in the place of ``original``, and is ``original`` to everything that asks for its weights: names
    of LoRAs, merges and saved files stay what they were. ComfyUI loads ``run`` only.
    """

    OF_ORIGINAL = ("weight", "bias", "in_channels", "out_channels", "kernel_size", "stride", "padding", "groups",
                   "in_features", "out_features", "heads", "dim_head", "quant_format")  # fmt: skip

    def __init__(self, original: torch.nn.Module, run: torch.nn.Module):
        super().__init__()
        object.__setattr__(self, "original", original)  # no submodule: it must not be moved, or counted twice
        self.run = run

    def forward(self, x, *args, **kwargs):
        return self.run(x)

    def maker(self) -> Callable[[torch.nn.Module], StandIn]:
        """Makes the same stand-in for another model's layer; holds nothing of this one's."""
        run = self.run
        return lambda layer: StandIn(layer, run)

    def __getattr__(self, name: str):
        if name in StandIn.OF_ORIGINAL:
            return getattr(self.original, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        """Dynamic VRAM puts weights back by name when a stand-in is there already."""
        if name in ("weight", "bias"):
            setattr(self.original, name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args, **kwargs):
        return self.original.state_dict(*args, **kwargs)


class Nothing(torch.nn.Module):
    """What a layer that was left out adds."""

    def forward(self, x):
        return torch.zeros_like(x)


class NoAttention(StandIn):
    """Stands in for a self-attention, also where ComfyUI calls its projections one by one."""

    def __init__(self, original: torch.nn.Module):
        super().__init__(original, Nothing())
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, StandIn(getattr(original, name), torch.nn.Identity()))
        self.to_out = torch.nn.Sequential(StandIn(original.to_out[0], Nothing()))

    def maker(self) -> Callable[[torch.nn.Module], StandIn]:
        return NoAttention


@dataclass(frozen=True)
class Block:
    """``convolutions`` and ``attentions``: names of modules below the diffusion model."""

    place: UNetBlock
    convolutions: tuple[str, ...]
    attentions: tuple[str, ...]


def original(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, also while another clone's stand-in is in its place."""
    return module.original if isinstance(module, StandIn) else module


def blocks(model) -> list[Block]:
    """Every block of ``model``. Raises ValueError in a sentence for a compiled model or one that is no UNet."""
    unet = model.model.diffusion_model
    if hasattr(unet, "_orig_mod") or "torch.compile" in model.object_patches:
        raise ValueError("This model is compiled, which hides its layers. Put TorchCompileModel after Slim UNet")
    if not isinstance(unet, UNetModel):
        raise ValueError(f"Slim UNet changes the blocks of SD 1.5, SD 2 and SDXL, and {type(unet).__name__} has none")
    if any(isinstance(m, SpatialVideoTransformer) for m in unet.modules()):
        raise ValueError("This UNet makes videos, and Slim UNet knows those of pictures only")
    return [_block(model, key, level, path, module) for key, level, path, module in _walk(unet)]


def _walk(unet) -> Iterator[tuple[Key, int, str, torch.nn.Module]]:
    """(block, how often it is halved, its name, module); a block that halves counts with what it makes."""
    level = 0
    for i, block in enumerate(unet.input_blocks):
        level += any(isinstance(m, Downsample) for m in block)
        yield ("input", i), level, f"input_blocks.{i}", block
    if unet.middle_block is not None:
        yield ("middle", 0), level, "middle_block", unet.middle_block
    for i, block in enumerate(unet.output_blocks):
        yield ("output", i), level, f"output_blocks.{i}", block
        level -= any(isinstance(m, Upsample) for m in block)


def _block(model, key: Key, level: int, path: str, module: torch.nn.Module) -> Block:
    convolutions, attentions = [], []
    for name, m in module.named_modules(prefix=path):
        if PREFIX + name in model.object_patches:  # slimmed already, or another pack's
            continue
        m = original(m)
        if isinstance(m, torch.nn.Conv2d) and _three(m):
            convolutions.append(name)
        elif isinstance(m, BasicTransformerBlock) and not m.disable_self_attn:
            attentions += [f"{name}.attn1"] if f"{PREFIX}{name}.attn1" not in model.object_patches else []
    place = UNetBlock(key, level, bool(attentions), bool(convolutions))
    return Block(place, tuple(convolutions), tuple(attentions))


def _three(conv: torch.nn.Conv2d) -> bool:
    square = (conv.kernel_size, conv.padding, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    plain = conv.padding_mode == "zeros" and conv.stride[0] == conv.stride[1]
    return square and plain and min(conv.in_channels, conv.out_channels) >= FEWEST


def parent(model, name: str) -> torch.nn.Module:
    """The module ``name`` of the model as it is without any stand-in of another clone."""
    return original(model.get_model_object(PREFIX + name))


def weight(model, name: str) -> torch.Tensor | None:
    """A float tensor of a layer as ``model`` samples it, patches (LoRA) merged; None where the layer has no such."""
    layer, _, part = name.rpartition(".")
    key = PREFIX + name
    value = model.backup[key].weight if key in model.backup else getattr(parent(model, layer), part)
    if value is None or key not in model.patches:
        return value
    merged = value.detach().to(torch.float32, copy=True)
    return comfy.lora.calculate_weight(model.patches[key], merged, key)


def shape(conv: torch.nn.Conv2d, size: tuple[int, int]) -> Conv:
    return Conv(conv.in_channels, conv.out_channels, conv.stride[0], size)
