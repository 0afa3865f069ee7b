"""Finds the layers that a LoRA's target means, whatever spelling the file and the model use.

A target is a prefix that says which part of the pipeline it changes, and a path. All spellings of one path become the
same *canonical* name: dots and underscores alike, no ``processor``. A model's `Index` maps canonical names to slots;
its family's key rules add the other spelling, where q, k and v may be one layer (fused) or three (split).

    target                                                   part          canonical
    lora_unet_double_blocks_0_img_attn_qkv                   model         double_blocks_0_img_attn_qkv
    transformer.transformer_blocks.0.attn.to_q               model         transformer_blocks_0_attn_to_q
    text_encoder.text_model.encoder.layers.0.mlp.fc1         text encoder  text_model_encoder_layers_0_mlp_fc1
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..families.spec import KeyRule

MODEL, TEXT, EITHER = "model", "text encoder", ""
# prefix -> part. PEFT's own prefix says nothing about the part.
PREFIXES = {
    "lora_unet__": MODEL, "lora_unet_": MODEL, "lora_transformer_": MODEL, "lora_prior_unet_": MODEL,
    "lycoris_": MODEL, "model.diffusion_model.": MODEL, "diffusion_model.": MODEL,
    "unet.": MODEL, "transformer.": MODEL,
    "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": TEXT, "lora_te3_": TEXT, "lora_prior_te_": TEXT,
    "text_encoder.": TEXT, "text_encoder_2.": TEXT, "text_encoder_3.": TEXT, "text_encoders.": TEXT,
    "te.": TEXT, "te1.": TEXT, "te2.": TEXT, "te3.": TEXT, "clip_l.": TEXT, "clip_g.": TEXT, "t5xxl.": TEXT,
    "base_model.model.": EITHER,
}  # fmt: skip
LONGEST = tuple(sorted(PREFIXES, key=len, reverse=True))
ORDINAL = re.compile(r"(?:te|text_encoder_)([123])[_.]")
TEXT_START = re.compile(r"(text_model|encoder_layers|encoder_block|text_projection)_")
# What was three layers -> what the fused one is called beside them
FUSED = (
    (("to_q", "to_k", "to_v"), ("to_qkv", "qkv", "qkv_proj")),
    (("add_q_proj", "add_k_proj", "add_v_proj"), ("to_added_qkv", "add_qkv_proj")),
    (("to_k", "to_v"), ("to_kv",)),
)


@dataclass(frozen=True)
class Place:
    """``ordinal``: which text encoder, 1 where the file does not say."""

    part: str
    name: str
    ordinal: int = 1


@dataclass(frozen=True)
class Slot:
    """One layer a target changes. ``into``: only these rows of it, (start, number). ``source``: by these rows of the
    target's update. ``swap``: the halves of the rows change places.
    """

    layer: str
    into: tuple[int, int] | None = None
    source: tuple[int, int] | None = None
    swap: bool = False


Index = dict[str, tuple[Slot, ...]]


def canonical(path: str) -> str:
    """The one name that all spellings of ``path`` share."""
    name = path.replace(".processor.", ".").removesuffix(".processor").replace(".", "_")
    return re.sub(r"(attn\d?_to_out)(_0)?$", r"\1", name)


def place(target: str) -> Place:
    """Which part of a pipeline ``target`` belongs to, and its canonical name there."""
    part, path, ordinal = EITHER, target, 1
    while prefix := next((p for p in LONGEST if path.startswith(p)), None):
        if PREFIXES[prefix] != EITHER and part not in (EITHER, PREFIXES[prefix]):
            break  # a layer that happens to be called like a prefix
        part = part or PREFIXES[prefix]
        number = ORDINAL.search(prefix)
        ordinal = int(number[1]) if number else ordinal
        path = path[len(prefix) :]
    name = canonical(path)
    if part != MODEL and TEXT_START.match(name):
        part = TEXT
    if part == TEXT:
        name = re.sub(r"self_attn_to_([qkv])$", r"self_attn_\1_proj", name)
        name = re.sub(r"self_attn_to_out$", "self_attn_out_proj", name)
    return Place(part or MODEL, name, ordinal)


def index(shapes: Mapping[str, tuple[int, ...]], rules: Iterable[KeyRule] = ()) -> Index:
    """Canonical name -> slots for the layers in ``shapes`` (layer -> weight shape), in their own spelling and, by a
    family's ``rules``, in the other one.
    """
    out: Index = {canonical(layer): (Slot(layer),) for layer in shapes}
    spelled = {layer: layer for layer in shapes}
    for rule in rules:
        if not rule.native.endswith(".weight"):
            continue
        native = rule.native.removesuffix(".weight")
        sources = tuple(s.removesuffix(".weight") for s in rule.sources)
        if len(sources) == 1 and not rule.swap_halves:
            spelled |= {a: b for a, b in ((sources[0], native), (native, sources[0])) if b in shapes}
        if native in shapes:
            _add_sources(out, native, shapes[native], sources, rule.swap_halves)
        elif all(s in shapes for s in sources):
            slots = _stacked(sources, [shapes[s][0] for s in sources])
            out.setdefault(canonical(native), tuple(Slot(s.layer, None, s.source, rule.swap_halves) for s in slots))
    _add_fused(out, spelled, shapes)
    return out


def _add_sources(out: Index, native: str, shape: tuple[int, ...], sources: tuple[str, ...], swap: bool) -> None:
    """The diffusers names of one native layer: all of it, or rows of it."""
    if len(sources) == 1:
        out.setdefault(canonical(sources[0]), (Slot(native, swap=swap),))
        return
    n, k = shape[0], shape[1]
    # q, k and v are as wide as the input; what is left belongs to the last one (FLUX's fused feed-forward).
    counts = [n // len(sources)] * len(sources) if n == k * len(sources) else [k] * (len(sources) - 1)
    counts += [n - sum(counts)] * (len(sources) - len(counts))
    start = 0
    for source, rows in zip(sources, counts, strict=True):
        out.setdefault(canonical(source), (Slot(native, into=(start, rows)),))
        start += rows
    parent = sources[0].rpartition(".")[0]
    for name in FUSED[0][1] if sources[0].endswith("to_q") else FUSED[1][1]:
        out.setdefault(canonical(f"{parent}.{name}"), (Slot(native, into=(0, 3 * k)),))
    out.setdefault(canonical(f"{native}_qkv"), (Slot(native, into=(0, 3 * k)),))


def _add_fused(out: Index, spelled: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The fused spellings of split layers: each takes its rows of the update. ``spelled``: any path -> its layer."""
    for path in spelled:
        parent, _, last = path.rpartition(".")
        for parts, names in FUSED:
            layers = [spelled.get(f"{parent}.{p}") for p in parts]
            if last == parts[0] and all(layers):
                slots = _stacked(layers, [shapes[x][0] for x in layers])
                for name in names:
                    out.setdefault(canonical(f"{parent}.{name}"), slots)


def _stacked(layers: Iterable[str], rows: Iterable[int]) -> tuple[Slot, ...]:
    """Slots of layers that lie one under the other in the update."""
    out, start = [], 0
    for layer, n in zip(layers, rows, strict=True):
        out.append(Slot(layer, source=(start, n)))
        start += n
    return (Slot(out[0].layer),) if len(out) == 1 else tuple(out)
