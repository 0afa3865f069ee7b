"""Records a run while it happens: nodes start, progress and finish; memory is sampled beside them.

Knows nothing of ComfyUI: whoever runs the nodes calls `RunRecorder`. One run, one recorder; `sample` may be called
from another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from .memory import Peaks
from .report import Node, Point, Run, Sampling

POINTS = 600  # of the memory curve; a longer run keeps every second one and samples half as often
INTERVAL = 0.05  # seconds between samples at first


@dataclass(frozen=True)
class About:
    """What a recorder cannot know of a node. ``silent``: the state of one that gave no sign: cached or not run.
    ``reporter``: it makes the report, so while the run goes on it is no sign of a stop that it has not finished.
    """

    title: str
    kind: str = "other"
    silent: str = "not run"
    reporter: bool = False


@dataclass
class _Timing:
    """What is known of a node so far."""

    start: float
    own: float = 0.0
    elapsed: float = 0.0
    opened: float | None = None  # when it was started and not yet finished
    state: str = "stopped"
    marks: list[tuple[float, float]] = field(default_factory=list)  # (progress value, time)
    peaks: Peaks = field(default_factory=Peaks)


class RunRecorder:
    """Charges every moment to one node: the one started last of those that have not finished.

    A node that starts twice (it waited for a lazy input) keeps adding up. One that finishes without a start was served
    from the cache. One that never finishes was running when the run stopped.
    """

    def __init__(self, probe, clock: Callable[[], float] = time.perf_counter, cpu=time.thread_time):
        self.probe = probe
        self._clock, self._cpu = clock, cpu
        self._zero = clock()
        self._last = 0.0  # end of what has been charged
        self._open: list[str] = []  # started and not finished, in the order of their last start
        self._nodes: dict[str, _Timing] = {}
        self._samplings: list[Sampling] = []
        self._curve: list[Point] = []
        self._interval = INTERVAL
        self._lock = threading.RLock()
        self._between = 0.0
        self._end: float | None = None
        self.recording = 0.0
        probe.restart()

    def now(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._zero

    def start(self, id: str) -> None:
        begin = self._cpu()
        with self._lock:
            at = self._settle()
            timing = self._nodes.setdefault(id, _Timing(at))
            timing.state = "stopped"
            if timing.opened is None:
                timing.opened = at
                timing.marks.append((0.0, at))
            if id in self._open:
                self._open.remove(id)
            self._open.append(id)
            self._took(begin)

    def progress(self, id: str, value: float) -> None:
        """Marks that node ``id`` has done ``value`` steps."""
        with self._lock:
            timing = self._nodes.get(id)
            if timing is not None and timing.opened is not None and value > timing.marks[-1][0]:
                timing.marks.append((value, self.now()))

    def finish(self, id: str) -> None:
        begin = self._cpu()
        with self._lock:
            at = self._settle()
            timing = self._nodes.get(id)
            if timing is None or timing.opened is None:
                # ComfyUI finishes a cached node without starting it; a node that ran in this run stays "ran".
                timing = self._nodes.setdefault(id, _Timing(at, state="cached"))
            else:
                timing.elapsed += at - timing.opened
                timing.opened, timing.state = None, "ran"
                self._open.remove(id)
            self._took(begin)

    def take_peaks(self) -> None:
        """Counts the allocator's peaks so far to the nodes that run; whoever is about to reset them calls this."""
        peaks = self.probe.read()
        with self._lock:
            for id in self._open:
                self._nodes[id].peaks = self._nodes[id].peaks.over(peaks)

    def add(self, sampling: Sampling) -> None:
        """Takes what a self-recording model measured inside the node it names."""
        with self._lock:
            self._samplings.append(sampling)

    def sample(self) -> float:
        """Adds a point to the memory curve. Returns the seconds to wait before the next."""
        begin, at = self._cpu(), self.now()
        device, now = self.probe.used()
        with self._lock:
            self._curve.append(Point(round(at, 4), device, now.host))
            for id in self._open:  # the driver and the operating system keep no peaks: only looking often finds them
                self._nodes[id].peaks = self._nodes[id].peaks.over(now)
            if len(self._curve) > POINTS:
                self._curve = self._curve[::2]
                self._interval *= 2
            self.recording += self._cpu() - begin
            return self._interval

    def stop(self) -> None:
        """Ends the run's clock; what is open stays 'stopped'. Later calls change nothing."""
        with self._lock:
            if self._end is None:
                self._end = self._settle()
                for id in self._open:
                    timing = self._nodes[id]
                    timing.elapsed += self._end - timing.opened
                    timing.opened = self._end

    @property
    def ids(self) -> list[str]:
        """Every node seen, in the order of their first start."""
        return list(self._nodes)

    def state(self, id: str) -> str:
        """The node's state so far; 'not run' for one never seen."""
        return self._nodes[id].state if id in self._nodes else "not run"

    def report(self, label: str, about: Mapping[str, About], version: str, prompt_id: str = "") -> Run:
        """The run so far. ``about``: what to say of every node to list, in their order."""
        with self._lock:
            at = self._end if self._end is not None else self._settle()
            nodes = tuple(self._node(id, about[id], at) for id in about)
            state = "stopped" if any(n.state == "stopped" for n in nodes) else "complete"
            return Run(
                label, state, self.probe.device, at, self._between, self.recording, nodes, tuple(self._samplings),
                tuple(self._curve), prompt_id, version,
            )  # fmt: skip

    def _node(self, id: str, about: About, at: float) -> Node:
        timing = self._nodes.get(id)
        if timing is None:
            return Node(id, about.title, about.kind, about.silent)
        state = "ran" if about.reporter and self._end is None else timing.state
        elapsed = timing.elapsed + (at - timing.opened if timing.opened is not None else 0.0)
        exact = tuple(s for sampling in self._samplings if sampling.node == id for s in sampling.evaluations)
        steps = exact or steps_of(timing.marks)
        return Node(
            id, about.title, about.kind, state, timing.start, timing.own, elapsed, steps, bool(exact), timing.peaks
        )

    def _settle(self) -> float:
        """Charges the time and memory since the last event to whom they belong; returns the time now."""
        self.probe.wait()
        at = self.now()
        peaks = self.probe.read()
        if self._end is not None:
            return self._end
        if self._open:
            self._nodes[self._open[-1]].own += at - self._last
        else:
            self._between += at - self._last
        for id in self._open:
            self._nodes[id].peaks = self._nodes[id].peaks.over(peaks)
        self._last = at
        return at

    def _took(self, begin: float) -> None:
        """Starts a new stretch of peaks, and counts the CPU time that recording the event took."""
        self.probe.restart()
        self.recording += self._cpu() - begin


def steps_of(marks: list[tuple[float, float]]) -> tuple[float, ...]:
    """Seconds per step from (steps done, time) marks; a mark that covers several steps is shared out evenly.

    A single mark at most is no progress: nodes that never report have none.
    """
    out: list[float] = []
    for (done, t), (next_done, next_t) in pairwise(marks):
        count = round(next_done - done)
        out += [(next_t - t) / count] * count if count > 0 else []
    return tuple(out)
