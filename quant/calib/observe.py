"""Collects the inputs of a module's linears while somebody runs it. Hooks only; nothing of the module is changed.

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

from .reservoir import Reservoir, limit_for

DEFAULT_BUDGET = 2 * 2**30


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
