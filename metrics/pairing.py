"""CLIP-I of pictures and references: each picture with its own reference, or with all of them.

    paired      1 / (N K) sum_n sum_k cos(gen_nk, ref_n)              K pictures were made of each of N references
    all pairs   1 / (M N) sum_m sum_n cos(gen_m, ref_n)               M pictures, N references: how alike two sets are

Only the paired form says whether a picture looks like its reference: with references that differ, most of all pairs are
strangers. Sources: DreamBooth, 2208.12242; Textual Inversion, 2208.01618.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import same_width, unit

AUTO, PAIRED, ALL = "auto", "paired", "all pairs"
FORMS = (AUTO, PAIRED, ALL)


def clip_i(pictures: Tensor, references: Tensor, names: tuple[Sequence[str], Sequence[str]], form: str = AUTO):
    """((M,) CLIP-I of each picture, one sentence on what was compared with what). Features are (M, d) and (N, d).

    Paired, the first K of ``names[0]`` belong to the first of ``names[1]``, and so on, both in the order of their
    names, numbers in them by size. ``auto`` pairs where M is a multiple of N. Raises ValueError for a form that is not
    there, and for `PAIRED` where the counts do not fit.
    """
    x, y = same_width(unit(pictures), unit(references))
    m, n = len(x), len(y)
    if form not in FORMS:
        raise ValueError(f"CLIP-I has the forms {', '.join(FORMS)}, and {form!r} is none of them")
    if form == PAIRED and m % n:
        raise ValueError(f"{m} pictures and {n} references cannot be paired: give as many of each, or a multiple")
    if form == ALL or m % n:
        why = "" if form == ALL else f": {m} pictures are no multiple of {n} references"
        return (x @ y.t()).mean(1), f"CLIP-I is the mean over all pairs of a picture and a reference{why}."
    mine, theirs = (torch.tensor(by_name(side)) for side in names)
    own = torch.empty(m, dtype=torch.int64)
    own[mine] = theirs.repeat_interleave(m // n)
    each = "its reference" if m == n else f"its own of {n} references, {m // n} pictures each"
    return (x * y[own]).sum(1), f"CLIP-I is paired: every picture with {each}, in the order of their names."


def by_name(names: Sequence[str]) -> list[int]:
    """The places of ``names`` in their order, with 2 before 10."""
    parts = [[int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)] for name in names]
    return sorted(range(len(names)), key=parts.__getitem__)
