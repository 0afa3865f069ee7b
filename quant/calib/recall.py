"""What one observation saw, as plain values, so that a run that was stopped need not watch its prompts again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .observe import Observer, Reservoir


def packed(reservoir: Reservoir) -> tuple[dict[str, Tensor], dict]:
    """(tensors, numbers) of a reservoir, from which `unpacked` makes one that hands out the same tokens."""
    kept = vars(reservoir)
    tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in kept.items() if isinstance(value, int | float)}


def unpacked(tensors: Mapping[str, Tensor], numbers: Mapping) -> Reservoir:
    """Raises KeyError for what `packed` did not give. It takes in no more tokens: the run is over."""
    out = Reservoir(len(tensors["maxima"]), numbers["limit"], 0)
    if missing := (vars(out).keys() - {"_generator"}) - (tensors.keys() | numbers.keys()):
        raise KeyError(*sorted(missing))
    for name, value in {**tensors, **numbers}.items():
        setattr(out, name, value)
    return out


def groups(observer: Observer) -> dict:
    """Who shared an input with whom in the runs so far, and who waits for another; JSON-able."""
    return {"leader": dict(observer.leader), "waiting": sorted(observer.waiting)}


def restore(observer: Observer, reservoirs: Mapping[str, Reservoir], shared: Mapping) -> None:
    """Leaves ``observer`` as a run left it: with ``reservoirs`` and what `groups` gave."""
    observer.leader.update(shared["leader"])
    observer.waiting.update(shared["waiting"])
    observer.reservoirs.update(reservoirs)
