"""What this pack knows of models, one file a family, torch-free. It imports nothing of the pack.

A family is what its tensors are called (`FamilySpec`); its variants are what people call its models (`Variant`). Broad
families come before specific ones: where several fit a file, the last is taken. Lists and pages have the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import _unet, flux, flux2, generic, pixart, qwen_image, sana, sd3, sd15, sdxl, z_image
from .preset import Preset
from .spec import PREFIXES, FamilySpec, Published, Shapes, Variant

FAMILIES: tuple[FamilySpec, ...] = (
    sd15.FAMILY, sdxl.FAMILY, sd3.FAMILY, flux.FAMILY, flux2.FAMILY, qwen_image.FAMILY, z_image.FAMILY, pixart.FAMILY,
    sana.FAMILY, generic.FAMILY,
)  # fmt: skip
GENERIC = generic.FAMILY
VARIANTS: dict[str, Variant] = {v.id: v for family in FAMILIES for v in family.variants}
PRESETS: dict[str, Preset] = {p.id: p for p in (*_unet.PRESETS, *(p for family in FAMILIES for p in family.presets))}
if len(PRESETS) != sum(len(family.presets) for family in FAMILIES):
    raise ValueError("two presets have the same id, or a UNet's has no family")
TITLES = {id: v.title for id, v in VARIANTS.items() if id in {p.family for p in PRESETS.values()}}  # with presets
SIDES = {id: v.side for id, v in VARIANTS.items() if v.side}  # of a square picture: what domains may name


def detect(shapes: Shapes) -> tuple[FamilySpec, str]:
    """(family, prefix of the model's tensors) for tensor names and logical shapes; `GENERIC` when none is known."""
    for prefix in PREFIXES:
        for family in reversed(FAMILIES):
            if family is not GENERIC and family.matches(shapes, prefix):
                return family, prefix
    prefix = next(p for p in PREFIXES if not p or sum(n.startswith(p) for n in shapes) > 5)
    return GENERIC, prefix


def by_id(id: str) -> FamilySpec:
    """The family ``id``. Raises ValueError that lists what there is."""
    known = {family.id: family for family in FAMILIES}
    if id not in known:
        raise ValueError(f"unknown family {id!r}; this version knows {', '.join(known)}")
    return known[id]


def by_diffusers_class(name: str, config: Mapping) -> FamilySpec | None:
    """The family with `key_rules` of a diffusers model class and its config.json, or None."""
    for family in reversed(FAMILIES):
        named = family.key_rules is not None and any(name in v.classes for v in family.variants)
        if named and all(config.get(k) == v for k, v in family.diffusers_config):
            return family
    return None


def detect_published(names: Iterable[str]) -> tuple[FamilySpec, Published, str] | None:
    """(family, whose spelling, prefix) for names of a publisher's file, or None."""
    names = list(names)
    for prefix in PREFIXES:
        inner = [n[len(prefix) :] for n in names if n.startswith(prefix)]
        for family in reversed(FAMILIES):
            for published in family.published:
                if inner and published.matches(inner):
                    return family, published, prefix
    return None


def variant(classes: Iterable[str], config: Mapping) -> Variant | None:
    """The variant of a ComfyUI model configuration's ``classes``, most derived first, or of a diffusers denoiser's.

    None where no variant names them; of several, the one that names most of ``config``.
    """
    for name in classes:
        fitting = [v for v in VARIANTS.values() if name in v.classes and _says(config, v.classes[name])]
        if fitting:
            return max(fitting, key=lambda v: len(v.classes[name]))
    return None


def _says(config: Mapping, wanted: Mapping[str, object]) -> bool:
    found = {k: config.get(k) for k in wanted}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == wanted


def presets_of(found: Variant | None) -> str | None:
    """The id by which presets know a variant; None for one without presets."""
    id = (found.presets_of or found.id) if found else None
    return id if id in TITLES else None
