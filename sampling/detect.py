"""Which preset a model wants: by metadata, key shapes, names and titles, then its class. Always says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..families import PRESETS, TITLES
from ..families.preset import Preset
from . import distilled
from .presets import of_family, preset, require_family

AUTO = "auto"
PRESET_KEY = "nibble.preset"  # metadata of files that this pack wrote
TITLE_KEYS = ("modelspec.title", "ss_output_name")
GUIDANCE_KEY = "time_embedding.cond_proj.weight"  # a full LCM's guidance embedding, in diffusers' names
MODEL_FILE = re.compile(r"\.(safetensors|sft|gguf|ckpt|pth?|bin)$", re.IGNORECASE)
MAX_NODES = 10_000


@dataclass(frozen=True)
class File:
    """A file that went into the model. ``strength``: of a LoRA; ``keys``: tensor names, where they are known."""

    name: str
    strength: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Facts:
    """What is known of a MODEL. ``files``: last applied first. ``distilled``: a LoRA patches the time embedding."""

    family: str | None
    class_name: str
    files: tuple[File, ...] = ()
    distilled: bool = False


@dataclass(frozen=True)
class Match:
    """A preset, the number of steps if the file's name said it (else 0), and what decided, in words."""

    preset: Preset
    steps: int
    why: str
    file: File | None = None


def upstream_files(prompt: Mapping, node: str, name: str = "model") -> list[File]:
    """Model files named above input ``name`` of ``node`` in an API-format prompt, nearest first.

    Follows inputs called model... or lora..., every link of a node that has none. LoRAs at strength 0 are left out.
    """
    out: list[File] = []
    queue, seen = [_link(prompt, node, name)], {str(node)}
    while queue and len(seen) < MAX_NODES:
        at = queue.pop(0)
        if at is None or at in seen or at not in prompt:
            continue
        seen.add(at)
        inputs = prompt[at].get("inputs", {})
        strength = _number(inputs, "strength_model", "lora_strength", "strength")
        if strength != 0.0:
            out += [File(v, strength) for v in inputs.values() if isinstance(v, str) and MODEL_FILE.search(v)]
        links = {k: str(v[0]) for k, v in inputs.items() if _is_link(v)}
        named = [v for k, v in links.items() if k.rsplit(".", 1)[-1].startswith(("model", "lora"))]
        queue += named or list(links.values())
    return out


def detect(facts: Facts) -> Match:
    """The preset for ``facts`` by the first rule that finds one. Raises ValueError in words that say what to do."""
    if facts.family is None:
        raise ValueError(
            f"this model (class {facts.class_name}) is of a family without few-step presets: "
            f"there are presets for {', '.join(TITLES.values())}. Use ComfyUI's own sampler nodes"
        )
    match = find(facts)
    if match is None:
        raise ValueError(_nothing(facts))
    return match


def find(facts: Facts) -> Match | None:
    """As `detect`, but None where no rule finds one. Raises ValueError for files that contradict the model."""
    return next((match for rule in RULES if (match := rule(facts)) is not None), None)


def choose(choice: str, facts: Facts) -> Match:
    """The named preset, or for "auto" the detected one. Raises ValueError when it is for another family."""
    if choice == AUTO:
        return detect(facts)
    row = preset(choice)
    require_family(row, facts.family, facts.class_name)
    named = next((m for m in (_by_pattern(row, f, f.name) for f in facts.files) if m is not None), None)
    return Match(row, named.steps if named else 0, "chosen by hand", named.file if named else None)


def by_metadata(facts: Facts) -> Match | None:
    """What a file says of itself: the preset that this pack wrote into it, or how this pack distilled it.

    Raises ValueError where the model's family has no preset for that.
    """
    for file in facts.files:
        told = distilled.told(file.metadata, facts.family)
        id = file.metadata.get(PRESET_KEY) or distilled.object_of(file.metadata.get(distilled.RECORD)).get("preset")
        if isinstance(id, str) and id in PRESETS:
            require_family(PRESETS[id], facts.family, facts.class_name)
            steps = distilled.steps_told(file.metadata) or (told.steps if told else 0)
            return Match(PRESETS[id], steps, f"the metadata of {file.name} says preset {id}", file)
        if told is not None:
            why = f"the metadata of {file.name} says that it was distilled: {told.way}"
            if not told.preset:
                sample_with = distilled.words(told.way, told.steps)
                raise ValueError(f"{why}; for this family there is no preset of it. Sample with {sample_with}")
            return Match(PRESETS[told.preset], told.steps, why, file)
    return None


def by_keys(facts: Facts) -> Match | None:
    """A guidance embedding in the file: only full LCMs have one."""
    for file in facts.files:
        if any(k.endswith(GUIDANCE_KEY) for k in file.keys):
            rows = [p for p in of_family(facts.family) if p.omega is not None]
            if rows:
                return Match(rows[0], 0, f"{file.name} holds the guidance embedding of a full LCM", file)
    return None


def by_name(facts: Facts) -> Match | None:
    """A pattern of the family in a file's name, or in the title it was saved under; the last applied file first.

    Raises ValueError when the name of a LoRA fits only another family.
    """
    for file in facts.files:
        titles = [(file.metadata.get(key, ""), f"the metadata of {file.name} ({key})") for key in TITLE_KEYS]
        for text, where in ((file.name, f"the file name {file.name}"), *titles):
            match = _first(facts.family, file, text, where)
            if match is not None:
                return match
    for file in facts.files:
        for row in PRESETS.values():
            if file.strength is not None and row.lora and _by_pattern(row, file, file.name) is not None:
                require_family(row, facts.family, f"{facts.class_name}; the LoRA is {file.name}")
    return None


def by_class(facts: Facts) -> Match | None:
    """The row of a class that says enough by itself: a FLUX.1 without a guidance embedder is schnell."""
    row = next((p for p in of_family(facts.family) if p.of_class), None)
    return row and Match(row, 0, f"the model's class {facts.class_name}")


RULES: tuple[Callable[[Facts], Match | None], ...] = (by_metadata, by_keys, by_name, by_class)


def _first(family: str, file: File, text: str, where: str) -> Match | None:
    for row in of_family(family):
        match = _by_pattern(row, file, text)
        if match is not None:
            return Match(row, match.steps, f"{where} matches {row.title}", file)
    return None


def _by_pattern(row: Preset, file: File, text: str) -> Match | None:
    hit = re.search(row.names, text, re.IGNORECASE) if text else None
    if hit is None:
        return None
    steps = int(hit.groupdict().get("steps") or 0)
    return Match(row, steps if steps <= 50 else 0, "", file)


def _is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


def _link(prompt: Mapping, node: str, name: str) -> str | None:
    value = prompt.get(str(node), {}).get("inputs", {}).get(name)
    return str(value[0]) if _is_link(value) else None


def _number(inputs: Mapping, *names: str) -> float | None:
    return next((float(inputs[n]) for n in names if isinstance(inputs.get(n), int | float)), None)


def _nothing(facts: Facts) -> str:
    seen = ", ".join(f.name for f in facts.files) or "no file name above this node"
    hint = " A distillation LoRA seems to be applied, but not under a name that says which." if facts.distilled else ""
    rows = ", ".join(p.id for p in of_family(facts.family))
    return (
        f"no few-step preset was recognised for this {TITLES[facts.family]} model (looked at: {seen}).{hint} "
        f"Choose one of: {rows}"
    )
