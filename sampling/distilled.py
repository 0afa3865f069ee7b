"""How a LoRA that this pack distilled is sampled: what stands in its metadata, written and read here alone.

nibble          JSON: "method"; "preset" where the model's family has one; "sampling" {sampler, schedule, steps, cfg}
nibble_distill  JSON: all that it was trained with. Files of 0.1.0 have no more: "way" or "mode", and "steps"

The ways train on the model's own noise levels, evenly by index. A UNet's are timesteps, whose last must be the first
that is visited ("trailing"): the first one is trained there, and one step is nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .presets import of_family

KEY, RECORD = "nibble_distill", "nibble"
CONSISTENT = ("lcm", "lcf")  # the others follow straight lines
MOST = 50  # a number of steps above it is not few, and none that training aimed at
WORDS = {
    "lcm": "sampler lcm, scheduler sgm_uniform or simple, 1 to 8 steps, cfg 1",
    "lcf": "sampler lcm, scheduler sgm_uniform or simple, 1 to 8 steps, cfg 1",
    "phased": "sampler euler, scheduler sgm_uniform, {steps} steps, cfg 1",
    "reflow": "sampler euler, scheduler sgm_uniform, {steps} steps or more, cfg 1",
    "one_step": "sampler euler, 1 step, cfg 1",
    "progressive": "sampler euler, scheduler sgm_uniform, {steps} steps, cfg 1",
}


@dataclass(frozen=True)
class Told:
    """What a file says of itself. ``preset``: "" where its model's family has none. ``steps``: 0 where it is silent."""

    way: str
    preset: str
    steps: int


def words(way: str, steps: int) -> str:
    """How to sample what ``way`` made with ComfyUI's own nodes, for a person."""
    return WORDS[way].format(steps=steps or "few")


def steps_of(way: str, steps: int) -> int:
    """The number of steps that ``way`` aims at; ``steps``: what it was told."""
    return 1 if way == "one_step" else steps


def preset_of(way: str, family: str | None) -> str:
    """The id of the preset for what ``way`` makes of a model of ``family``, or ""."""
    for row in of_family(family) if family else ():
        if row.prediction == "lcm" and row.omega is None if way in CONSISTENT else row.distilled:
            return row.id
    return ""


def record(way: str, steps: int, family: str | None) -> dict:
    """What goes into the file's JSON record: the preset and the schedule."""
    preset, sampler = preset_of(way, family), "lcm" if way in CONSISTENT else "euler"
    schedule = {"lcm": "lcm", "euler": "trailing"}[sampler] if preset else "simple"  # a flow's is its own, shifted
    sampling = {"sampler": sampler, "schedule": schedule, "steps": steps_of(way, steps), "cfg": 1.0}
    return {"sampling": sampling, **({"preset": preset} if preset else {})}


def told(metadata: Mapping[str, str], family: str | None) -> Told | None:
    """What a file's ``metadata`` says of a distillation by this pack; None where it says nothing that is known."""
    trained = object_of(metadata.get(KEY))
    method = str(object_of(metadata.get(RECORD)).get("method", ""))
    way = trained.get("way", trained.get("mode", method.removeprefix("distill ")))
    if not isinstance(way, str) or way not in WORDS:
        return None
    return Told(way, preset_of(way, family), steps_of(way, _steps(trained.get("steps"))))


def steps_told(metadata: Mapping[str, str]) -> int:
    """The number of steps in the file's record, 0 where there is none."""
    sampling = object_of(metadata.get(RECORD)).get("sampling")
    return _steps(sampling.get("steps")) if isinstance(sampling, dict) else 0


def _steps(value) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST else 0


def object_of(text: str | None) -> dict:
    """The JSON object that ``text`` is; an empty one for anything else."""
    try:
        value = json.loads(text or "{}")
    except (TypeError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
