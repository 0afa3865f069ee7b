"""Times stages and the steps inside them. Frozen results, plain JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Stage:
    """Wall seconds of one stage and, where it sampled, of each step; ``group`` puts stages of one variant together."""

    name: str
    group: str
    seconds: float
    steps: tuple[float, ...] = ()


class Recorder:
    """Collects stages in the order they end. Not thread-safe: one run, one recorder."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._ticks: list[float] = []
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str, group: str = "") -> Iterator[None]:
        """Times the block; calls of `tick` inside it become its steps."""
        outer, self._ticks = self._ticks, []
        start = self._clock()
        try:
            yield
        finally:
            marks = [start, *self._ticks]
            steps = tuple(b - a for a, b in pairwise(marks))
            self.stages.append(Stage(name, group, self._clock() - start, steps))
            self._ticks = outer

    def tick(self) -> None:
        """Marks the end of a step."""
        self._ticks.append(self._clock())

    def to_dict(self) -> list[dict]:
        return [asdict(s) for s in self.stages]
