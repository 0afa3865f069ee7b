"""The resumable state of a training run: one file, written whole (see writing/kept.py).

<i>.value, <i>.average              parameter i and its moving average
<i>.optimizer.<name>                what the optimizer keeps of it
losses                              (steps done,) float64
values                              {"seconds", "plan": every hyper-parameter}
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..reading.names import shown
from ..writing import kept
from . import optimizers


class State:
    """The file at ``path``, for the run of ``plan`` over ``params``. ``note``: what was wrong with it, if anything."""

    def __init__(self, path: Path, plan, params: list[torch.nn.Parameter]):
        self.path, self.plan, self.params, self.note = path, asdict(plan), params, ""

    def save(self, optimizer, averages: list[torch.Tensor], losses: list[float], seconds: float) -> None:
        """Raises WriteError; the state before stays as it was then."""
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for i, p in enumerate(self.params):
            tensors[f"{i}.value"] = p.detach()
            if averages:
                tensors[f"{i}.average"] = averages[i]
            for name, value in optimizers.state_of(optimizer, p).items():
                tensors[f"{i}.optimizer.{name}"] = value.detach()
        kept.save(self.path, tensors, {"seconds": seconds, "plan": self.plan})

    @torch.no_grad()
    def load(self, optimizer, averages: list[torch.Tensor]) -> tuple[list[float], float]:
        """(losses so far, seconds spent), with parameters, averages and optimizer as they were; ([], 0.0) without a
        file. One that is damaged is set aside. Raises ValueError for the state of another run.
        """
        if not self.path.is_file():
            return [], 0.0
        try:
            tensors, values = kept.load(self.path)
        except kept.Damaged:
            name = kept.set_aside(self.path)
            self.note = f"What was kept of this run was damaged and is now {shown(name)}: it began anew"
            return [], 0.0
        shapes = [tuple(tensors[f"{i}.value"].shape) for i in range(sum(n.endswith(".value") for n in tensors))]
        needed = {"losses", *(f"{i}.average" for i in range(len(averages)))}
        known = values.get("plan") == self.plan and "seconds" in values and needed <= tensors.keys()
        if not known or shapes != [tuple(p.shape) for p in self.params]:
            raise ValueError(f"{shown(self.path.name)} is the state of another run. Delete it to start anew")
        for i, p in enumerate(self.params):
            p.copy_(tensors[f"{i}.value"])
            if averages:
                averages[i].copy_(tensors[f"{i}.average"])
            prefix = f"{i}.optimizer."
            mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            optimizers.restore(optimizer, p, mine)
        return tensors["losses"].tolist(), values["seconds"]
