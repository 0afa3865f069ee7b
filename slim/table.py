"""The operations, by the name that a person chooses. A new one is a file and a row here."""

from __future__ import annotations

from . import low_rank, pool, relu, separable, skip

ATTENTIONS = {m.OP.id: m.OP for m in (pool, skip, relu)}
CONVOLUTIONS = {m.OP.id: m.OP for m in (low_rank, separable)}
