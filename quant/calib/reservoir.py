"""A bounded sample of tokens, uniform over everything that passed; channel maxima and the lowest value of all of it.

Each token draws a random key; the ``limit`` largest keys stay. So the sample is the same whether tokens come one by one
or in batches, is uniform over prompts, noise levels, guidance halves and positions, and a seed fixes it.
Memory: limit * K * 2 bytes in bf16 on the CPU (plus K * 4 for the maxima).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """Tokens of one layer input of width ``k``. ``lowest``: the smallest finite value that passed, inf before any."""

    def __init__(self, k: int, limit: int, seed: int):
        self.limit, self.seen, self.lowest = limit, 0, torch.inf
        self.maxima = torch.zeros(k)
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._rows = torch.empty(0, k, dtype=torch.bfloat16)

    def add(self, x: Tensor) -> None:
        """Takes in ``x`` (..., K), any float dtype and device. Non-finite tokens are dropped."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.numel():
            return
        low, maxima = _extremes(rows)
        if not torch.isfinite(maxima).all():
            rows = rows[torch.isfinite(rows).all(-1)]
            low, maxima = _extremes(rows) if len(rows) else (torch.inf, torch.zeros_like(self.maxima))
        self.maxima, self.lowest = torch.maximum(self.maxima, maxima), min(self.lowest, float(low))
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


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the lowest value, the largest magnitude of each channel) on the CPU."""
    low, high = rows.aminmax(dim=0)
    low, high = low.float().cpu(), high.float().cpu()
    return low.min(), torch.maximum(-low, high)


def limit_for(k: int, wanted: int) -> int:
    """How many tokens a layer of width ``k`` needs: the solver saturates between K/2 and 2K (docs/quantization.md)."""
    return max(1024, min(wanted, 2 * k))
