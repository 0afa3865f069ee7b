"""What this pack knows about a model family: how to recognise it, what stays 16-bit, what its layers are called, and of
each model in it how it is prompted and sampled.

Native names are ComfyUI's (the original authors'); diffusers names are the other spelling. A family knows no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from .preset import Preset

# The schemes of quant/schemes.py that a policy chooses from, and the word for a layer that stays in 16 bits.
SVDQUANT, AWQ, KEEP = "svdquant_w4a4", "awq_w4a16", "keep"
Shapes = Mapping[str, tuple[int, ...]]
# Where a model sits inside a bigger file; the first that carries any known name wins.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


@dataclass(frozen=True)
class Rule:
    """``pattern`` is searched in a layer's dotted name; the first rule of a policy that matches decides.

    ``act_unsigned``: the layer reads a GELU. ``after``: what the match is replaced by to name the layer whose output
    that GELU takes. Where that layer has more rows than this one has columns its output is gated, and the claim falls.
    ``keeps_columns``: ComfyUI tells the model by the number of columns that this weight has in the file, so no format
    that packs them may take it.
    """

    pattern: str
    scheme: str
    reason: str
    act_unsigned: bool = False
    after: str = ""
    keeps_columns: bool = False

    def __post_init__(self):
        re.compile(self.pattern)
        if self.scheme not in (SVDQUANT, AWQ, KEEP):
            raise ValueError(f"rule {self.pattern!r}: unknown scheme {self.scheme!r}")
        if self.act_unsigned and self.scheme != SVDQUANT:
            raise ValueError(f"rule {self.pattern!r}: only 4-bit activations can be unsigned")


@dataclass(frozen=True)
class KeyRule:
    """The native tensor ``native`` is the diffusers tensors ``sources`` one under the other (rows).

    ``swap_halves``: the two halves of the rows change places (scale, shift -> shift, scale).
    """

    native: str
    sources: tuple[str, ...]
    swap_halves: bool = False


ROWS, COLUMNS = "rows", "columns"


@dataclass(frozen=True)
class Place:
    """Where a publisher's layers stand in the native model.

    ``sources``, joined along ``axis`` (rows: outputs; columns: inputs, outputs summed), are ``natives`` one under the
    other, all of the same height. Names have no ``.weight``; a tensor that is no layer goes by its full name.

    ``interleaved``: a modulation's vectors are woven into each other, so many of them; to the ones in ``plus_one`` the
    publisher has added 1. ``unsigned``: sources that read a GELU with unsigned int4 activations, which no file marks.
    ``shape``: real (N, K) of each source where the publisher pads. ``swap_halves``: (scale, shift) -> (shift, scale).
    """

    sources: tuple[str, ...]
    natives: tuple[str, ...]
    axis: str = ROWS
    interleaved: int = 0
    plus_one: tuple[int, ...] = ()
    unsigned: tuple[str, ...] = ()
    swap_halves: bool = False
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Published:
    """A publisher's spelling of a family's names. ``marks``: patterns of which each matches some name of its files.

    ``places(names, config)``: every place for the layers in ``names``; ``config``: the diffusers config, or {}. Names
    without a place stay as they are (``others`` "same"), or are an error ("none").
    """

    title: str
    marks: tuple[str, ...]
    places: Callable[[Iterable[str], Mapping], list[Place]]
    others: str = "same"

    def matches(self, names: Iterable[str]) -> bool:
        names = list(names)
        return all(any(re.fullmatch(mark, n) for n in names) for mark in self.marks)


def in_blocks(names: Iterable[str], source: str, native: str, table: Iterable[Place]) -> list[Place]:
    """``table`` once for every block in ``names``. ``source`` and ``native`` are prefixes with {} for its number."""
    pattern = re.compile(re.escape(source).replace(r"\{\}", r"(\d+)"))
    numbers = sorted({int(m[1]) for n in names if (m := pattern.match(n))})
    table = tuple(table)
    return [
        replace(
            place,
            sources=tuple(source.format(i) + s for s in place.sources),
            natives=tuple(native.format(i) + n for n in place.natives),
            unsigned=tuple(source.format(i) + u for u in place.unsigned),
        )
        for i in numbers
        for place in table
    ]


def block_pairs(count: int, native: str, source: str, table: Mapping) -> list[tuple[str, tuple[str, ...]]]:
    """``table`` of native -> diffusers layer or layers, ``count`` times. Prefixes as for `in_blocks`."""
    rows = [(a, (b,) if isinstance(b, str) else b) for a, b in table.items()]
    return [(native.format(i) + a, tuple(source.format(i) + x for x in b)) for i in range(count) for a, b in rows]


def renamed(table: Mapping[str, str | tuple[str, ...]], swap: Iterable[str] = ()) -> list[Place]:
    """Places for a table of native -> source or sources (rows), as the families keep them for diffusers."""
    rows = ((native, (s,) if isinstance(s, str) else s) for native, s in table.items())
    return [Place(sources, (native,), swap_halves=native in swap) for native, sources in rows]


TAGS, PROSE = "tags", "prose"  # what CLIP alone reads; what encoders of sentences (T5, Qwen, Llama) read
# Longest prompt of a style, in CLIP tokens with both end marks; prose: half of T5's 512.
MAX_TOKENS = {TAGS: 77, PROSE: 256}
DEFAULT_RUN = ("euler", "simple", 25, 1.0)  # of a variant that says nothing else


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model of a family as prompts and presets tell it from others. Its ``id`` stands in files, and is frozen.

    classes       ComfyUI's model configuration and diffusers' denoiser -> what its configuration says besides
    style         of its prompts; side: of its square picture, 0 where no domain may name it
    ordinary      (ComfyUI's sampler, scheduler, steps, cfg) of a model that is not distilled; ordinary_preset: a preset
                  for that
    shift         what ComfyUI loads a flow model with, where presets say no other: sigma = s u / (1 + (s - 1) u)
    sized_like    the variant whose size a domain means where it has none for this one
    presets_of, loras_of    the variant whose presets, or domains' LoRAs, are for this one, too
    """

    id: str
    title: str
    classes: Mapping[str, Mapping[str, object]]
    style: str = PROSE
    side: int = 0
    ordinary: tuple[str, str, int, float] | None = None
    ordinary_preset: str = ""
    shift: float | None = None
    sized_like: str = ""
    presets_of: str = ""
    loras_of: str = ""


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    marks         native names that only this family has, each with (dimension, size) or None for any shape
    lora_marks    (how a layer's canonical name in a LoRA begins, (role, dimension, size) of a factor or None, title)
    module        ComfyUI's class; inputs: its configuration -> shapes, without the batch, of what it takes besides
                  latent and time
    unsupported   why ComfyUI cannot run the family, where it cannot
    """

    id: str
    title: str
    marks: tuple[tuple[str, tuple[int, int] | None], ...]
    rules: tuple[Rule, ...]
    diffusers_config: tuple[tuple[str, object], ...] = ()  # what diffusers' config.json must say besides the class
    key_rules: Callable[[Mapping], list[KeyRule]] | None = None
    side_dtype: str = "bfloat16"  # what scales and low-rank factors of a 32-bit source are stored in
    published: tuple[Published, ...] = ()  # other spellings of its names
    unsupported: str = ""
    lora_marks: tuple[tuple[str, tuple[str, int, int] | None, str], ...] = ()
    module: str = ""
    inputs: Callable[[Mapping], dict[str, tuple[int, ...]]] | None = None
    variants: tuple[Variant, ...] = ()
    presets: tuple[Preset, ...] = ()  # the first of a variant whose pattern is in a file name wins: narrow ones first

    def __post_init__(self):
        for row in self.presets:
            if row.family not in (v.id for v in self.variants):
                raise ValueError(f"preset {row.id}: unknown variant {row.family!r} of the family {self.id}")

    def matches(self, shapes: Shapes, prefix: str) -> bool:
        for pattern, size in self.marks:
            regex = re.compile(re.escape(prefix) + pattern)
            hits = [s for n, s in shapes.items() if regex.fullmatch(n)]
            if not any(size is None or (len(s) > size[0] and s[size[0]] == size[1]) for s in hits):
                return False
        return True


def layer_rules(
    pairs: Iterable[tuple[str, tuple[str, ...] | str]], swap: frozenset[str] = frozenset()
) -> list[KeyRule]:
    """Key rules of whole layers, for ``weight`` and ``bias`` both: (native layer, diffusers layer or layers)."""
    out = []
    for native, sources in pairs:
        sources = (sources,) if isinstance(sources, str) else sources
        for end in ("weight", "bias"):
            out.append(KeyRule(f"{native}.{end}", tuple(f"{s}.{end}" for s in sources), native in swap))
    return out
