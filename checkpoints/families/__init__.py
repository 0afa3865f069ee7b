"""Model families, one file each; specific before broad."""

from __future__ import annotations

from collections.abc import Mapping

from . import flux, generic, sd3, sd15, sdxl
from .spec import PREFIXES, FamilySpec, KeyRule, Shapes

FAMILIES: tuple[FamilySpec, ...] = (sdxl.FAMILY, sd15.FAMILY, flux.FAMILY, sd3.FAMILY, generic.FAMILY)
GENERIC = generic.FAMILY

__all__ = ["FAMILIES", "GENERIC", "FamilySpec", "KeyRule", "by_diffusers_class", "by_id", "detect"]


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
