"""What one run of a workflow took, as frozen data: JSON there and back.

Times are seconds on one clock that starts at 0 with the run; memory is in bytes. A node's ``seconds`` are its own: at
every moment exactly one node, or "between nodes", is charged, so the sum over nodes is the run's wall time. ``elapsed``
is from its start to its end, which overlaps others for nodes that wait (async, subgraphs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import lru_cache
from statistics import median
from typing import get_args, get_origin, get_type_hints

from .memory import Device, Peaks

FORMAT = "nibble-profile-1"
MAX_BYTES = 16 * 2**20  # a report is some tens of kilobytes; whatever is larger is not one
# Of a node. stopped: it had started and did not finish; not timed: it was over before the recorder was there.
STATES = ("ran", "cached", "stopped", "not run", "not timed")
KINDS = ("load", "text", "sample", "vae", "other")


@dataclass(frozen=True)
class Node:
    """One node of the workflow. ``steps``: seconds of each step where it reported progress; ``exact``: they were
    measured around every model evaluation, not read from the progress bar (which merges steps under 0.1 s).
    """

    id: str
    title: str
    kind: str
    state: str
    start: float = 0.0
    seconds: float = 0.0
    elapsed: float = 0.0
    steps: tuple[float, ...] = ()
    exact: bool = False
    peaks: Peaks = field(default_factory=Peaks)


@dataclass(frozen=True)
class Sampling:
    """One sampler call of a model that records itself. ``evaluations``: seconds of each model evaluation, the whole
    guidance batch; ``batches``: its rows. ``shape``: the latent's. ``activation``: the highest bytes an evaluation
    needed beyond what was live before it, 0 where torch cannot tell (CPU).
    """

    node: str
    label: str
    family: str
    dtype: str
    attention: str
    weights: str  # 4-bit, or the dtype they are stored in
    weight_bytes: int
    parameters: int  # logical: a 4-bit weight counts as one
    shape: tuple[int, ...]
    tokens: int
    load_seconds: float
    seconds: float
    evaluations: tuple[float, ...]
    batches: tuple[int, ...]
    activation: int = 0

    @property
    def warm_up(self) -> float:
        """Seconds of the first evaluation: it also compiles, tunes and fills caches."""
        return self.evaluations[0] if self.evaluations else 0.0

    @property
    def steady(self) -> float:
        """Median seconds of the evaluations after the first (of all, when there is only one)."""
        return median(self.evaluations[1:] or self.evaluations or (0.0,))


@dataclass(frozen=True)
class Point:
    """Memory in use at ``t`` seconds: on the device, and this process's resident bytes."""

    t: float
    device: int
    host: int


@dataclass(frozen=True)
class Run:
    """One run. ``state``: complete, or stopped (interrupted or failed; then some node is 'stopped'). ``between``:
    seconds that no node can be charged with; ``recording``: CPU seconds the recorder itself took, inside the others.
    """

    label: str
    state: str
    device: Device
    seconds: float
    between: float
    recording: float
    nodes: tuple[Node, ...]
    samplings: tuple[Sampling, ...] = ()
    curve: tuple[Point, ...] = ()
    prompt_id: str = ""
    version: str = ""

    def by_kind(self) -> dict[str, float]:
        """Seconds per kind of node; model load inside a sampler is the sampler's."""
        out = dict.fromkeys(KINDS, 0.0)
        for node in self.nodes:
            out[node.kind] += node.seconds
        return out

    @property
    def peaks(self) -> Peaks:
        """The highest of every number over all nodes and the curve."""
        out = Peaks(host=max((p.host for p in self.curve), default=0))
        for node in self.nodes:
            out = out.over(node.peaks)
        return out

    @property
    def peak(self) -> int:
        """The most memory in use on the device at any time: sampled, and every node's own peak."""
        own = self.peaks.host if self.device.kind == "cpu" else self.peaks.device
        return max(own, max((p.device for p in self.curve), default=0))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def from_json(text: str, name: str = "the report") -> Run:
    """A `Run` from its JSON. Raises ValueError in one sentence, naming ``name``, for anything else."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"{name}: it is larger than a profile can be. Choose a run that Profile this Run saved")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name}: it is not JSON. Choose a run that Profile this Run saved") from e
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ValueError(f"{name}: it is not a profile of this version. Choose a run that Profile this Run saved")
    try:
        run = build(Run, data)
    except (TypeError, ValueError, KeyError) as e:
        raise ValueError(f"{name}: it is damaged ({e}). Choose another run, or record it again") from e
    for node in run.nodes:
        if node.kind not in KINDS or node.state not in STATES:
            raise ValueError(f"{name}: it is damaged (node {node.id}). Choose another run, or record it again")
    return run


_hints = lru_cache(get_type_hints)  # of this file's classes; a run has hundreds of points


def build(kind: type, data: Mapping):
    """A frozen dataclass of numbers, strings, dataclasses and tuples of them, from JSON's dicts and lists.

    Raises TypeError for an unknown field or a value of another type; numbers must be finite.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"expected an object for {kind.__name__}")
    hints = _hints(kind)
    known = {f.name for f in fields(kind)}
    unknown = set(data) - known
    if unknown:
        raise TypeError(f"unknown field {min(unknown)!r}")
    return kind(**{name: _value(hints[name], value, name) for name, value in data.items()})


def _value(kind, value, name: str):
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is not a list")
        return tuple(_value(get_args(kind)[0], v, name) for v in value)
    if is_dataclass(kind):
        return build(kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not abs(value) < float("inf")):
        raise TypeError(f"{name} is not a {kind.__name__}")
    return value
