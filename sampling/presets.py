"""The presets of all families: by id and by variant, in words, and as a page.

``python -m comfyui_nibble.sampling.presets docs/few-step.md`` writes the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..families import PRESETS, TITLES
from ..families.preset import PREDICTIONS, SCHEDULES, Preset

HEAD = """# Few-step models and how they want to be sampled

Generated from the families' files, `families/`; edit the rows there, not this page. **Few-Step Sampler**
and **Few-Step Preset** pick a row by themselves (metadata, then tensor names, then file names, then the model's class),
say what matched, and take any other row of the model's family by hand.

- *steps*: the usual number, then those the model was made for. Another number is allowed unless the row is fixed.
- *visits*: timesteps (999 ... 0) of UNets, sigmas (1 ... 0) of flow models at 1024 x 1024, for the usual steps; then 0.
- *cfg*: as ComfyUI counts it; 1 means one pass and no negative prompt (diffusers' `guidance_scale` 0 or 1).
"""
COLUMNS = ("preset", "model", "steps", "visits", "prediction, schedule", "sampler", "cfg", "besides", "source")


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
    is_ = TITLES.get(family, "of a family without few-step presets")
    fitting = ", ".join(p.id for p in of_family(family)) if family else ""
    remedy = f"Choose one of: {fitting}" if fitting else "Use ComfyUI's own sampler nodes"
    raise ValueError(
        f"preset {row.id} is for {TITLES[row.family]} and this model is {is_} (class {class_name}). {remedy}"
    )


def number(value: float) -> str:
    """0.75, 1, 999: as short as it is."""
    return f"{value:g}"


def span(values: tuple[int, ...]) -> str:
    """(1, 2, 3) -> 1-3; (2, 4, 8) -> 2, 4, 8."""
    run = len(values) > 2 and values == tuple(range(values[0], values[-1] + 1))
    return f"{values[0]}-{values[-1]}" if run else ", ".join(map(str, values))


def visits(row: Preset) -> str:
    """What the row shows; the middle of a long list is left out."""
    texts = [number(v) for v in row.shown]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "...", texts[-1]])


def cfg(row: Preset) -> str:
    by_steps = ", ".join(f"{number(c)} from {n} steps" if n > 1 else number(c) for n, c in sorted(row.cfg_at))
    return by_steps or number(row.cfg)


def besides(row: Preset) -> str:
    """Shift, guidance, eta and the LoRA, where the row has them."""
    parts = (
        (row.shift is not None, f"shift {number(row.shift or 0)}"),
        (row.size_shift, "shift by size, 0.5 to 1.15"),
        (row.guidance is not None, f"guidance {number(row.guidance or 0)}"),
        (row.omega is not None, f"embedded guidance {number(row.omega or 0)}"),
        (row.eta is not None, f"eta {number(row.eta or 0)}"),
        (bool(row.lora), f"LoRA `{row.lora}` at {number(row.lora_strength)}"),
        (row.fixed, "fixed: one step, from pure noise"),
    )
    return "; ".join(text for wanted, text in parts if wanted)


def line(row: Preset) -> str:
    steps = f"{row.steps}" if len(row.made_for) == 1 else f"{row.steps} ({span(row.made_for)})"
    cells = (f"`{row.id}`", row.title, steps, visits(row), f"{row.prediction}, {row.schedule}", f"`{row.sampler}`",
             cfg(row), besides(row), f"[source]({row.source})")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page, ending in a newline."""
    parts = [HEAD]
    for family, title in TITLES.items():
        parts += [f"## {title}\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        parts += [line(row) for row in of_family(family)]
        parts.append("")
    parts += ["## Words\n", "| prediction | the network's output is |", "|---|---|"]
    parts += [f"| `{k}` | {v} |" for k, v in PREDICTIONS.items()]
    parts += ["", "| schedule | visits |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in SCHEDULES.items())]
    parts += ["", f"{len(PRESETS)} presets. With denoise below 1 the nodes take the last part of a longer "
    "run, as KSampler "
              "does; LCM and TCD take their steps from the trained timesteps that denoise leaves, as "
              "diffusers does."]  # fmt: skip
    return "\n".join(parts) + "\n"


def summary(row: Preset, steps: int) -> str:
    """One line on a preset at ``steps`` steps, for a node's text."""
    made = "" if steps in row.made_for else f" (made for {span(row.made_for)})"
    parts = [f"{row.title}: {steps} steps{made}", f"sampler {row.sampler}", f"cfg {number(row.cfg_for(steps))}"]
    return ", ".join([*parts, *filter(None, [besides(row)])])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
