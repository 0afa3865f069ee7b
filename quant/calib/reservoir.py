"""A bounded sample of tokens, uniform over everything that passed, and the channel maxima of all of it.

Each token draws a random key; the ``limit`` largest keys stay. So the sample is the same whether tokens come one by one
or in batches, is uniform over prompts, noise levels, guidance halves and positions, and a seed fixes it.
Memory: limit * K * 2 bytes in bf16 on the CPU (plus K * 4 for the maxima).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """Tokens of one layer input of width ``k``."""

    def __init__(self, k: int, limit: int, seed: int):
        self.limit, self.seen = limit, 0
        self.maxima = torch.zeros(k)
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._rows = torch.empty(0, k, dtype=torch.bfloat16)

    def add(self, x: Tensor) -> None:
        """Takes in ``x`` (..., K), any float dtype and device. Non-finite tokens are dropped."""
        rows = x.detach().reshape(-1, x.shape[-1])
        maxima = rows.abs().amax(0).float().cpu()
        if not torch.isfinite(maxima).all():
            rows = rows[torch.isfinite(rows).all(-1)]
            maxima = rows.abs().amax(0).float().cpu() if len(rows) else torch.zeros_like(self.maxima)
        self.maxima = torch.maximum(self.maxima, maxima)
        keys = torch.rand(len(rows), generator=self._generator)
        self.seen += len(rows)
        floor = self._keys.min() if len(self._keys) == self.limit else -1.0
        hopeful = (keys > floor).nonzero().squeeze(-1)
        if len(hopeful) > self.limit:
            hopeful = hopeful[keys[hopeful].topk(self.limit).indices]
        if len(hopeful) == 0:
            return
        picked = rows[hopeful.to(rows.device)].to(device="cpu", dtype=torch.bfloat16)
        self._keys = torch.cat([self._keys, keys[hopeful]])
        self._rows = torch.cat([self._rows, picked])
        if len(self._keys) > self.limit:
            keep = self._keys.topk(self.limit).indices
            self._keys, self._rows = self._keys[keep], self._rows[keep]

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * 2 + self.maxima.numel() * 4

    def tokens(self) -> Tensor:
        """(min(seen, limit), K) bf16 in the order of their keys: any slice of it is a uniform sample too."""
        return self._rows[self._keys.argsort(descending=True, stable=True)]


def limit_for(k: int, wanted: int) -> int:
    """How many tokens a layer of width ``k`` needs: the solver saturates between K/2 and 2K (docs/quantization.md)."""
    return max(1024, min(wanted, 2 * k))
