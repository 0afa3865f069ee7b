"""What this pack knows about a model family: how to recognise it, what stays 16-bit, and what its layers are called.

Native names are ComfyUI's (the original authors'); diffusers names are the other spelling. A family knows no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...quant.policy import Rule

Shapes = Mapping[str, tuple[int, ...]]
# Where a model sits inside a bigger file; the first that carries any known name wins.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


@dataclass(frozen=True)
class KeyRule:
    """The native tensor ``native`` is the diffusers tensors ``sources`` one under the other (rows).

    ``swap_halves``: the two halves of the rows change places (scale, shift -> shift, scale).
    """

    native: str
    sources: tuple[str, ...]
    swap_halves: bool = False


@dataclass(frozen=True)
class FamilySpec:
    """``marks``: native names that only this family has, each with (dimension, size) or None for any shape."""

    id: str
    title: str
    marks: tuple[tuple[str, tuple[int, int] | None], ...]
    rules: tuple[Rule, ...]
    diffusers_class: str = ""
    diffusers_config: tuple[tuple[str, object], ...] = ()  # what its config.json must say besides
    key_rules: Callable[[Mapping], list[KeyRule]] | None = None
    side_dtype: str = "bfloat16"  # what scales and low-rank factors of a 32-bit source are stored in

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
