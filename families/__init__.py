"""Model families, one file each; specific before broad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import flux, flux2, generic, pixart, qwen_image, sana, sd3, sd15, sdxl, z_image
from .spec import PREFIXES, FamilySpec, KeyRule, Place, Published, Shapes

FAMILIES: tuple[FamilySpec, ...] = (
    sdxl.FAMILY, sd15.FAMILY, flux2.FAMILY, flux.FAMILY, sd3.FAMILY, qwen_image.FAMILY, z_image.FAMILY, pixart.FAMILY,
    sana.FAMILY, generic.FAMILY,
)  # fmt: skip
GENERIC = generic.FAMILY

__all__ = [
    "FAMILIES", "GENERIC", "FamilySpec", "KeyRule", "Place", "Published", "by_diffusers_class", "by_id", "detect",
    "detect_published",
]  # fmt: skip


def detect(shapes: Shapes) -> tuple[FamilySpec, str]:
    """(family, prefix of the model's tensors) for tensor names and logical shapes; `GENERIC` when none is known."""
    for prefix in PREFIXES:
        for family in FAMILIES:
            if family is not GENERIC and family.matches(shapes, prefix):
                return family, prefix
    prefix = next(p for p in PREFIXES if not p or sum(n.startswith(p) for n in shapes) > 5)
    return GENERIC, prefix


def by_id(id: str) -> FamilySpec:
    """The family ``id``. Raises ValueError that lists what there is."""
    for family in FAMILIES:
        if family.id == id:
            return family
    raise ValueError(f"unknown family {id!r}; this version knows {', '.join(f.id for f in FAMILIES)}")


def by_diffusers_class(name: str, config: Mapping) -> FamilySpec | None:
    """The family of a diffusers model class and its config.json, or None."""
    for family in FAMILIES:
        if family.diffusers_class == name and all(config.get(k) == v for k, v in family.diffusers_config):
            return family
    return None


def detect_published(names: Iterable[str]) -> tuple[FamilySpec, Published, str] | None:
    """(family, whose spelling, prefix) for names of a publisher's file, or None."""
    names = list(names)
    for prefix in PREFIXES:
        inner = [n[len(prefix) :] for n in names if n.startswith(prefix)]
        for family in FAMILIES:
            for published in family.published:
                if inner and published.matches(inner):
                    return family, published, prefix
    return None
