"""Collects the inputs of a module's linears while somebody runs it. Hooks only; nothing of the module is changed.

A reservoir is a bounded sample of tokens, uniform over everything that passed. Each token draws a random key; the
``limit`` largest keys stay. So the sample is the same whether tokens come one by one or in batches, is uniform over
prompts, noise levels, guidance halves and positions, and a seed fixes it. Memory: limit * K * 2 bytes in bf16 on the
CPU (plus K * 4 for the maxima).

Layers that are handed the very same tensor (q, k and v; every cross-attention's text) share one reservoir. Reservoirs
are bounded in bytes: layers that do not fit wait for another run over the same inputs (`Observer.waiting`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor, nn

DEFAULT_BUDGET = 2 * 2**30


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


@dataclass
class Observer:
    """Reservoirs for the linears ``widths`` (layer name -> K) of one module.

    tokens       how many a preset wants per input; cut to what a width can use
    budget       bytes all reservoirs of one run may take together
    on_forward   called at every hooked layer; may raise to stop the run (interrupts do)
    """

    widths: Mapping[str, int]
    tokens: int
    seed: int = 0
    budget: int = DEFAULT_BUDGET
    on_forward: Callable[[], None] = lambda: None
    reservoirs: dict[str, Reservoir] = field(default_factory=dict)  # by the layer that leads a group
    leader: dict[str, str] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    _last: dict[str, object] = field(default_factory=dict)  # leader -> weak reference to what it last saw

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Hooks the layers of ``module`` for the length of the block, whatever ends it."""
        handles = []
        try:
            for name in self.widths:
                if name not in self._done:
                    layer = module.get_submodule(name)
                    handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last.clear()

    @property
    def _done(self) -> set[str]:
        """Layers of earlier runs: solved, their reservoirs given back."""
        return {n for n, lead in self.leader.items() if lead not in self.reservoirs}

    def _hook(self, name: str):
        def see(_module, args, kwargs):
            self.on_forward()
            x = args[0] if args else kwargs.get("input")
            if x is None or self._follows(name, x) or x.shape[-1] != self.widths[name]:
                return
            if self._room_for(name):
                self.reservoirs[name].add(x)
                self._last[name] = ref(x)

        return see

    def _follows(self, name: str, x: Tensor) -> bool:
        """Whether another layer has just been handed this very tensor (and so sampled it, or waits with it)."""
        for lead, last in self._last.items():
            if lead != name and last() is x and self.leader.setdefault(name, lead) == lead:
                return True
        return False

    def _room_for(self, name: str) -> bool:
        if name in self.reservoirs:
            return True
        if self.leader.get(name, name) != name:
            return False  # usually follows, but was handed a tensor of its own this once
        limit = limit_for(self.widths[name], self.tokens)
        taken = sum(r.limit * len(r.maxima) * 2 for r in self.reservoirs.values())
        if self.reservoirs and taken + limit * self.widths[name] * 2 > self.budget:
            self.waiting.add(name)
            return False
        self.waiting.discard(name)
        self.leader[name] = name
        seed = zlib.crc32(f"{self.seed}/{name}".encode())
        self.reservoirs[name] = Reservoir(self.widths[name], limit, seed)
        return True

    def members(self, lead: str) -> list[str]:
        """The layers that share the reservoir of ``lead``, itself first."""
        return [lead, *(n for n, other in self.leader.items() if other == lead and n != lead)]

    def forget(self) -> None:
        """Starts over: nothing collected, nothing done."""
        self.reservoirs.clear()
        self.leader.clear()
        self.waiting.clear()

    def release(self) -> None:
        """Gives the reservoirs back; their layers count as done and are not collected again."""
        self.reservoirs.clear()

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.reservoirs.values())


def runs_needed(observer: Observer, run: Callable[[], None], module: nn.Module) -> Iterator[dict[str, Reservoir]]:
    """Yields the reservoirs of one run after another until every layer had its turn. ``run`` repeats the same inputs.

    Layers that no run reaches are left out; the caller finds them missing from ``observer.leader``.
    """
    while True:
        observer.waiting.clear()
        with observer.watching(module), torch.no_grad():
            run()
        if not observer.reservoirs:
            return
        yield observer.reservoirs
        observer.release()
        if not observer.waiting:
            return
