"""The preset table: every row, by id and by family."""

from __future__ import annotations

from . import flow_rows, unet_rows
from .preset import FAMILIES, Preset

PRESETS: dict[str, Preset] = {row.id: row for row in (*unet_rows.ROWS, *flow_rows.ROWS)}
if len(PRESETS) != len(unet_rows.ROWS) + len(flow_rows.ROWS):
    raise ValueError("two presets have the same id")


def preset(id: str) -> Preset:
    """The row named ``id``. Raises ValueError that lists what there is."""
    try:
        return PRESETS[id]
    except KeyError:
        raise ValueError(f"unknown preset {id!r}; this version knows {', '.join(PRESETS)}") from None


def of_family(family: str) -> tuple[Preset, ...]:
    """The rows of a model family, in the order in which file names are tried."""
    return tuple(p for p in PRESETS.values() if p.family == family)


def require_family(row: Preset, family: str | None, class_name: str) -> None:
    """Raises ValueError when ``row`` is for another family than the model's (None: one that no row is for)."""
    if row.family == family:
        return
    is_ = FAMILIES.get(family, "of a family without few-step presets")
    fitting = ", ".join(p.id for p in of_family(family)) if family else ""
    remedy = f"Choose one of: {fitting}" if fitting else "Use ComfyUI's own sampler nodes"
    raise ValueError(
        f"preset {row.id} is for {FAMILIES[row.family]} and this model is {is_} (class {class_name}). {remedy}"
    )
