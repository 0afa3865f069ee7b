"""Image prompts on a MODEL: IP-Adapter's attention beside the text's, and Uni-ControlNet's tokens after the text.

A MODEL's cross-attentions are replaced one by one (``patches_replace``), which ComfyUI calls with q, k and v already
projected: 4-bit layers before and after are run as they are. The adapter itself is used once, on the CPU and in
float32, to turn the image into each layer's keys and values; only those few numbers go where the model is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch.func import functional_call

from ...checkpoints import header
from ...image_prompt import ImagePrompt, load, sites_for
from ...image_prompt.attention import ImageAttention, chosen
from ...image_prompt.projection import EMBEDS
from ...image_prompt.unicontrol import GlobalAdapter
from . import selfcheck

COMBINE = ["concatenate", "average"]
BLOCKS = {"input_blocks": "input", "output_blocks": "output", "middle_block": "middle"}
UNCOND = 1  # in cond_or_uncond, as ComfyUI counts
X, ADDED = "nibble_attention_input", "nibble_added_output"  # what our patches hand each other inside one block


@dataclass(frozen=True)
class How:
    """How an image is used: ``weight``, from ``start`` to ``end`` (0 to 1 of sampling), in which ``blocks``."""

    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    blocks: str = "all"
    combine: str = COMBINE[0]


def adapter(path: str) -> ImagePrompt:
    """The IP-Adapter of a file. Raises ValueError for any other."""
    header.read(path)
    found = load(path)
    if not isinstance(found, ImagePrompt):
        raise ValueError("this is Uni-ControlNet's global adapter, no IP-Adapter. Use the node Uni-ControlNet Global")
    return found


def apply(model, prompt: ImagePrompt, clip_vision, image: torch.Tensor, how: How, mask: torch.Tensor | None = None):
    """A clone of ``model`` that also attends to ``image`` (n, H, W, 3). Weight 0: a clone without any change.

    Raises ValueError when adapter and model, or adapter and CLIP_VISION, do not go together.
    """
    selfcheck.require()
    unet, changed = model.model.diffusion_model, model.clone()
    found = sites_for(unet, prompt, type(model.model.model_config).__name__)
    tokens = _tokens(prompt.image_proj, clip_vision, image, how.combine)
    if how.weight == 0:
        return changed
    sigma = model.get_model_object("model_sampling").percent_to_sigma
    span = None if (how.start, how.end) == (0.0, 1.0) else (sigma(how.start), sigma(how.end))
    shared = _Shared(how.weight, span, tokens, mask)
    layers = dict(zip((s.name for s in found), prompt.layers, strict=True))
    for site in chosen(found, how.blocks):
        block, number, index = _place(site.name)
        before = changed.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        before = before.get((block, number, index), before.get((block, number)))
        added = _Added(shared, layers[site.name], unet.get_submodule(site.name), before)
        changed.set_model_attn2_replace(added, block, number, index)
    if any(layer.to_q_ip is not None or layer.to_out_ip is not None for layer in prompt.layers):
        changed.set_model_attn2_patch(_remember_input)
        changed.set_model_attn2_output_patch(_add_outputs)
    return changed


def _place(name: str) -> tuple[str, int, int]:
    """ComfyUI's key of a block: ("input", 4, 0) of input_blocks.4.1.transformer_blocks.0.attn2; the middle block is
    ("middle", 0, index) whatever its place inside.
    """
    part, number, *_, index, _ = name.split(".")
    return BLOCKS[part], 0 if part == "middle_block" else int(number), int(index)


def _in_float(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``module(x)`` with its 16-bit weights raised to float32 for this call."""
    return functional_call(module, {k: v.float() for k, v in module.state_dict().items()}, (x.float(),))


def _tokens(projection: torch.nn.Module, clip_vision, image: torch.Tensor, combine: str) -> torch.Tensor:
    """(2, T, C) float32: the tokens of the images, and those of no image."""
    features, nothing = _features(clip_vision, image, projection.reads)
    if features.shape[-1] != projection.width:
        raise ValueError(
            f"this IP-Adapter reads {projection.reads.replace('_', ' ')} of width {projection.width}, and this "
            f"CLIP_VISION gives {features.shape[-1]}. Load the CLIP_VISION that the report of Load IP-Adapter names"
        )
    if combine == "average":
        features = features.mean(0, keepdim=True)
    tokens = _in_float(projection, features).flatten(0, 1)
    none = _in_float(projection, nothing)[0]
    return torch.stack([tokens, none.repeat(len(features), 1)])


def _features(clip_vision, image: torch.Tensor, reads: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the images, of no image), on the CPU. No image: zeros for an embedding; else what the tower makes of an
    input of zeros, which is a picture of the mean colour. Source: tencent-ailab/IP-Adapter, ip_adapter.py.
    """
    found = clip_vision.encode_image(image)[reads].cpu()
    if reads == EMBEDS:
        return found, torch.zeros_like(found[:1])
    size = clip_vision.image_size
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    return found, clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1].cpu()


class _Shared:
    """What all layers of one applied adapter have in common."""

    def __init__(
        self, weight: float, span: tuple[float, float] | None, tokens: torch.Tensor, mask: torch.Tensor | None
    ):
        """``span``: sigma at which it begins and at which it ends; None for all of sampling."""
        self.weight, self.span, self.tokens, self.mask = weight, span, tokens, mask
        self._asked: torch.Tensor | None = None
        self._active = True
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def active(self, extra: dict) -> bool:
        """Whether this step lies between start and end. Looked up once a step: it waits for the GPU."""
        sigmas = extra.get("sigmas")
        if self.span is not None and sigmas is not None and sigmas is not self._asked:
            self._asked, (first, last) = sigmas, self.span
            self._active = last <= float(sigmas.max()) <= first
        return self._active

    def weights(self, extra: dict, like: torch.Tensor, each: int) -> torch.Tensor | float:
        """The weight of every token of ``like`` (B, L, N): a number, or (B, L, 1) of the mask in this grid."""
        if self.mask is None:
            return self.weight
        grid = tuple(extra["activations_shape"][-2:])
        if grid not in self._masks:
            frames = self.mask.reshape(-1, 1, *self.mask.shape[-2:]).float()
            small = torch.nn.functional.interpolate(frames, size=grid, mode="area")
            self._masks[grid] = self.weight * small.flatten(1).unsqueeze(-1)
        frames = self._masks[grid].to(like)
        return _rows(frames, [row % each % len(frames) for row in range(len(like))])


class _Added:
    """Replaces one cross-attention: what was there before, plus the image's."""

    def __init__(self, shared: _Shared, layer: ImageAttention, attn, before):
        self.shared, self.layer, self.attn, self.before = shared, layer, attn, before
        self.k = _in_float(layer.to_k_ip, shared.tokens)
        self.v = _in_float(layer.to_v_ip, shared.tokens)
        self._here: dict[tuple, tuple] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict) -> torch.Tensor:
        out = _attend(q, k, v, extra) if self.before is None else self.before(q, k, v, extra)
        if not self.shared.active(extra):
            return out
        chunks = extra.get("cond_or_uncond") or [0]
        each = max(1, len(q) // len(chunks))
        rows = [int(chunks[min(row // each, len(chunks) - 1)] == UNCOND) for row in range(len(q))]
        image = _attend(self._query(q, extra), *self._keys_values(q, rows), extra)
        image = image * self.shared.weights(extra, image, each)
        if self.layer.to_out_ip is not None:
            extra.setdefault(ADDED, []).append(self._low_rank(self.layer.to_out_ip, image))
        return out + image

    def _keys_values(self, like: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """K' and V' (B, T, N); of a LoRA the model's own projection is part, with whatever patches it carries now."""
        place = (like.device, like.dtype)
        if place not in self._here:
            self._here[place] = tuple(x.to(like) for x in (self.k, self.v, self.shared.tokens))
        k, v, tokens = self._here[place]
        if self.layer.to_k_ip.adds_to_base:
            k = k + self.attn.to_k(tokens)
        if self.layer.to_v_ip.adds_to_base:
            v = v + self.attn.to_v(tokens)
        return _rows(k, rows), _rows(v, rows)

    def _query(self, q: torch.Tensor, extra: dict) -> torch.Tensor:
        return q if self.layer.to_q_ip is None else q + self._low_rank(self.layer.to_q_ip, extra[X])

    def _low_rank(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A LoRA's addition, its two thin matrices brought where ``x`` is and left there."""
        key = (module, x.device, x.dtype)
        if key not in self._here:
            self._here[key] = tuple(part.weight.to(x) for part in (module.down, module.up))
        down, up = self._here[key]
        return x @ down.T @ up.T


def _rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``tensor[rows]`` without an index tensor, which would be sent to the GPU, and waited for, in every layer."""
    return torch.cat([tensor[i : i + 1] for i in rows])


def _attend(q, k, v, extra: dict) -> torch.Tensor:
    """Exactly what a cross-attention without a replacement does."""
    precision = extra.get("attn_precision")
    return optimized_attention(q, k, v, extra["n_heads"], attn_precision=precision, transformer_options=extra)


def _remember_input(n, context, value, extra: dict):
    """attn2_patch: keeps the attention's input for a LoRA of to_q. ``extra`` is made anew for each block."""
    extra[X] = n
    return n, context, value


def _add_outputs(n: torch.Tensor, extra: dict) -> torch.Tensor:
    """attn2_output_patch: what LoRAs of to_out add, once."""
    for added in extra.pop(ADDED, ()):
        n = n + added
    return n


def append_tokens(positive, negative, clip_vision, image: torch.Tensor, path: str, strength: float):
    """(positive, negative) CONDITIONING with Uni-ControlNet's tokens after the text: of the image, and of no image.

    Raises ValueError when file, CLIP_VISION and text do not go together.
    """
    header.read(path)
    found = load(path)
    if not isinstance(found, GlobalAdapter):
        raise ValueError("this is an IP-Adapter, not Uni-ControlNet's global adapter. Use the node Apply IP-Adapter")
    embeds = clip_vision.encode_image(image)[EMBEDS].cpu()
    if embeds.shape[-1] != found.width:
        raise ValueError(
            f"this global adapter reads image embeddings of width {found.width}, and this CLIP_VISION gives "
            f"{embeds.shape[-1]}. Load the CLIP_VISION it was trained with: CLIP ViT-L/14 for the published file"
        )
    tokens = strength * _in_float(found, embeds)
    nothing = strength * _in_float(found, torch.zeros_like(embeds))
    return _append(positive, tokens.flatten(0, 1)), _append(negative, nothing.flatten(0, 1))


def _append(conditioning, tokens: torch.Tensor) -> list:
    out = []
    for text, more in conditioning:
        if text.shape[-1] != tokens.shape[-1]:
            raise ValueError(
                f"the tokens are {tokens.shape[-1]} wide and the text {text.shape[-1]}: a global adapter of "
                "Uni-ControlNet works with the text encoder it was trained for, SD1.5's for the published file"
            )
        out.append([torch.cat([text, tokens.to(text).expand(len(text), -1, -1)], 1), dict(more)])
    return out
