"""A whole IP-Adapter: built from the keys and shapes of a file, or new for a UNet that is to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import projection, unicontrol
from .attention import Factored, Full, ImageAttention, Processor, Site, sites

IMAGE, LAYERS = "image_proj.", "ip_adapter."
# (cross-attentions, width of the text) -> what such models are called
MODELS = {(16, 768): "SD1.5", (16, 1024): "SD2", (70, 2048): "SDXL", (7, 128): "the demo model"}
# (what is read, its width) -> the CLIP tower that gives it
TOWERS = {
    (projection.EMBEDS, 512): "CLIP ViT-B", (projection.EMBEDS, 768): "CLIP ViT-L/14",
    (projection.EMBEDS, 1024): "CLIP ViT-H/14", (projection.EMBEDS, 1280): "CLIP ViT-bigG/14",
    (projection.HIDDEN, 1024): "CLIP ViT-L/14", (projection.HIDDEN, 1280): "CLIP ViT-H/14",
    (projection.HIDDEN, 1664): "CLIP ViT-bigG/14",
}  # fmt: skip
START = 0.1  # size of a new adapter's tokens: training begins near the model as it is
KINDS = {"linear": "plain", "MLP": "MLP", "per patch": "full-face", "resampler": "plus (or plus-face)"}


class ImagePrompt(nn.Module):
    """Image features in, tokens out (``image_proj``), and what each cross-attention does with them (``ip_adapter``).

    ``state_dict()`` has the names of a published file.
    """

    def __init__(self, image_proj: nn.Module, layers: Mapping[str, ImageAttention]):
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict(layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.image_proj(features)

    @property
    def layers(self) -> list[ImageAttention]:
        """In the order of `attention.sites`."""
        return list(self.ip_adapter.values())

    @property
    def widths(self) -> list[int]:
        """N of each layer."""
        return [(x.up if x.adds_to_base else x).weight.shape[0] for x in (layer.to_v_ip for layer in self.layers)]


def from_shapes(shapes: projection.Shapes, device=None) -> nn.Module:
    """The module of a file with these keys and shapes: an `ImagePrompt`, or Uni-ControlNet's `GlobalAdapter`.

    Raises ValueError, in a sentence, for keys that are neither or that none of the two would use.
    """
    prefix, keys = unicontrol.PREFIX, _below(shapes, unicontrol.PREFIX)
    if keys:
        built: nn.Module = unicontrol.from_shapes(keys, device)
    else:
        prefix, keys = "", _below(shapes, "")
        built = _image_prompt(keys, device)
    expected = {k: tuple(v.shape) for k, v in built.state_dict().items()}
    for name in sorted(expected.keys() | keys.keys()):
        if expected.get(name) != keys.get(name):
            found, wanted = keys.get(name, "missing"), expected.get(name, "no such key")
            raise ValueError(f"{prefix}{name} is {found}, expected {wanted}")
    return built


def _below(shapes: projection.Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {k.removeprefix(prefix): tuple(v) for k, v in shapes.items() if k.startswith(prefix)}


def _image_prompt(shapes: projection.Shapes, device) -> ImagePrompt:
    image, rest = _below(shapes, IMAGE), _below(shapes, LAYERS)
    if not image or not rest:
        raise ValueError(f"it has no {IMAGE}* and {LAYERS}* keys, so it is no IP-Adapter")
    if any("_lora." in name for name in rest) or any(name.startswith("perceiver_resampler.") for name in image):
        raise ValueError("it is a FaceID adapter, which reads a face recogniser's embedding and not CLIP's")
    numbers = sorted({name.split(".", 1)[0] for name in rest}, key=lambda n: (not n.isdigit(), n.zfill(9)))
    layers = {n: _layer(_below(rest, f"{n}."), device) for n in numbers}
    return ImagePrompt(projection.projection(image, device), layers)


def _layer(shapes: projection.Shapes, device) -> ImageAttention:
    parts: dict[str, nn.Module] = {}
    for name in ("to_k_ip", "to_v_ip", "to_q_ip", "to_out_ip"):
        if f"{name}.weight" in shapes:
            outputs, inputs = shapes[f"{name}.weight"]
            parts[name] = Full(inputs, outputs, device)
        elif f"{name}.down.weight" in shapes and f"{name}.up.weight" in shapes:
            (rank, inputs), (outputs, _) = shapes[f"{name}.down.weight"], shapes[f"{name}.up.weight"]
            parts[name] = Factored(inputs, outputs, rank, device)
    if "to_k_ip" not in parts or "to_v_ip" not in parts:
        raise ValueError(f"a layer has the keys {', '.join(sorted(shapes)[:4])} instead of to_k_ip and to_v_ip")
    return ImageAttention(parts)


def read(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module of a file, with its weights as they are. Raises ValueError as `from_shapes`."""
    built = from_shapes({k: tuple(v.shape) for k, v in tensors.items()}, device="meta")
    if not isinstance(built, ImagePrompt):
        prefix = unicontrol.PREFIX
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    built.load_state_dict(dict(tensors), strict=True, assign=True)
    return built.eval().requires_grad_(False)


def load(path: str | Path) -> nn.Module:
    """The module of a safetensors file; of a larger checkpoint only Uni-ControlNet's part is read.

    Raises ValueError, naming the file, when it is damaged or no such module.
    """
    name = Path(path).name
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            own = [k for k in keys if k.startswith(unicontrol.PREFIX)] or keys
            shapes = {k: tuple(file.get_slice(k).get_shape()) for k in own}
            from_shapes(shapes, device="meta")  # before anything large is read
            return read({k: file.get_tensor(k) for k in own})
    except SafetensorError as e:
        raise ValueError(f"{name}: not a whole safetensors file ({e}). Download it again") from e
    except ValueError as e:
        raise ValueError(f"{name}: {e}. Choose a file of IP-Adapter or of Uni-ControlNet's global adapter") from e


def new(unet: nn.Module, width: int, tokens: int = 4, rank: int = 0, hidden: tuple[int, ...] = ()) -> ImagePrompt:
    """An adapter to train for a UNet, reading image embeddings of ``width``; ``hidden`` makes the projection an MLP.

    ``rank`` 0 starts each to_k_ip, to_v_ip from the text's own; above 0 all four projections get a LoRA of that rank.
    Raises ValueError for a model without cross-attentions.
    """
    found = sites(unet)
    if not found:
        raise ValueError("the model has no cross-attention, so no IP-Adapter can be added to it")
    context = found[0].context
    image = projection.Mlp(width, hidden, context, tokens) if hidden else projection.Linear(width, context, tokens)
    image.norm.weight.data.fill_(START)
    layers = {str(2 * n + 1): _new_layer(unet.get_submodule(s.name), s, rank) for n, s in enumerate(found)}
    return ImagePrompt(image, layers)


def _new_layer(attn: nn.Module, site: Site, rank: int) -> ImageAttention:
    n, c = site.hidden, site.context
    if rank:
        inputs = {"to_k_ip": c, "to_v_ip": c, "to_q_ip": n, "to_out_ip": n}
        return ImageAttention({name: Factored(size, n, rank) for name, size in inputs.items()})
    layer = ImageAttention({"to_k_ip": Full(c, n), "to_v_ip": Full(c, n)})
    for image, text in ((layer.to_k_ip, attn.to_k), (layer.to_v_ip, attn.to_v)):
        image.weight.data.copy_(text.weight.data)
    return layer


def sites_for(model: nn.Module, adapter: ImagePrompt, name: str) -> list[Site]:
    """The cross-attentions of a model called ``name``, one for each layer of the adapter.

    Raises ValueError, in a sentence that says what goes with what, when the model has none or others.
    """
    found = sites(model)
    if not found:
        raise ValueError(
            f"{name} has no cross-attention to text (attn2), which is where an IP-Adapter works. "
            "Use a UNet, such as SD1.5 or SDXL, with an IP-Adapter made for it"
        )
    context = adapter.image_proj.context
    if [(s.hidden, s.context) for s in found] != [(n, context) for n in adapter.widths]:
        has = f"{len(found)} cross-attentions and text width {found[0].context}"
        what = f"this IP-Adapter is for {_model(len(adapter.layers), context)}, and {name} has {has}"
        raise ValueError(f"{what}. Load an IP-Adapter that was made for this model")
    return found


def _model(layers: int, context: int) -> str:
    known = MODELS.get((layers, context), "a model of its own")
    return f"{known} ({layers} cross-attentions, text width {context})"


def attach(unet: nn.Module, adapter: ImagePrompt) -> None:
    """Puts `Processor` on every cross-attention of a diffusers UNet. Raises ValueError as `sites_for`."""
    found = sites_for(unet, adapter, type(unet).__name__)
    for site, layer in zip(found, adapter.layers, strict=True):
        unet.get_submodule(site.name).processor = Processor(layer)


def describe(adapter: ImagePrompt) -> str:
    """One line a fact, as Markdown: variant, model class, what it reads, tokens, parameters."""
    image, layers = adapter.image_proj, adapter.layers
    tower = TOWERS.get((image.reads, image.width), "another tower")
    what = "embedding" if image.reads == projection.EMBEDS else "hidden states"
    keys = f"LoRA of rank {layers[0].to_k_ip.down.out_features}" if layers[0].to_k_ip.adds_to_base else "full"
    count = sum(p.numel() for p in adapter.parameters())
    dtype = str(next(adapter.parameters()).dtype).removeprefix("torch.")
    return "\n".join([
        f"- variant: {KINDS[image.kind]}, keys and values {keys}",
        f"- for: {_model(len(layers), image.context)}",
        f"- reads: {what} of width {image.width} ({tower})",
        f"- tokens an image: {image.tokens or 'one a patch'}",
        f"- parameters: {count / 1e6:.2f} million, {dtype}",
    ])  # fmt: skip
