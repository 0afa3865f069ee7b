"""The resumable state of a training run: one safetensors file, written atomically.

<i>.value, <i>.average              parameter i and its moving average
<i>.optimizer.<name>                what the optimizer keeps of it
losses                              (steps done,) float64
metadata "state"                    {"seconds", "plan": every hyper-parameter}
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from ..writing import tensors as files
from . import optimizers


class State:
    """The file at ``path``, for the run of ``plan`` over ``params``."""

    def __init__(self, path: Path, plan, params: list[torch.nn.Parameter]):
        self.path, self.plan, self.params = path, asdict(plan), params

    def save(self, optimizer, averages: list[torch.Tensor], losses: list[float], seconds: float) -> None:
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for i, p in enumerate(self.params):
            tensors[f"{i}.value"] = p.detach().contiguous()
            if averages:
                tensors[f"{i}.average"] = averages[i].contiguous()
            for name, value in optimizers.state_of(optimizer, p).items():
                tensors[f"{i}.optimizer.{name}"] = value.detach().clone().contiguous()
        files.save(self.path, tensors, {"state": json.dumps({"seconds": seconds, "plan": self.plan})})

    @torch.no_grad()
    def load(self, optimizer, averages: list[torch.Tensor]) -> tuple[list[float], float]:
        """(losses so far, seconds spent), with parameters, averages and optimizer as they were; ([], 0.0) without a
        file. Raises ValueError for the state of another run.
        """
        if not self.path.is_file():
            return [], 0.0
        with safe_open(self.path, framework="pt") as f:
            state, names = json.loads(f.metadata()["state"]), set(f.keys())
            shapes = [
                tuple(f.get_slice(f"{i}.value").get_shape()) for i in range(sum(n.endswith(".value") for n in names))
            ]
            if state.get("plan") != self.plan or shapes != [tuple(p.shape) for p in self.params]:
                raise ValueError(f"{self.path.name} is the state of another run. Delete it to start anew")
            for i, p in enumerate(self.params):
                p.copy_(f.get_tensor(f"{i}.value"))
                if averages:
                    averages[i].copy_(f.get_tensor(f"{i}.average"))
                prefix = f"{i}.optimizer."
                kept = {n.removeprefix(prefix): f.get_tensor(n) for n in names if n.startswith(prefix)}
                optimizers.restore(optimizer, p, kept)
            return f.get_tensor("losses").tolist(), state["seconds"]
