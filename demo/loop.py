"""One resumable, deterministic training loop for the demo model's stages.

A stage gives ``loss(step, generator) -> Tensor``; everything random in it comes from ``generator``, which is seeded by
(seed, step), so a run that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Hyper-parameters of one stage. ``ema`` 0 keeps the last weights instead of their average."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    x = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * x)))


def generator(plan: Plan, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(plan.seed * 1_000_003 + step)


class Average:
    """Exponential moving average of parameters, with the usual ramp so that the first steps do not count."""

    def __init__(self, params: list[torch.nn.Parameter], decay: float):
        self.params, self.decay = params, decay
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        d = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - d)

    @torch.no_grad()
    def copy_to(self) -> None:
        for p, v in zip(self.params, self.values, strict=True):
            p.copy_(v)


def save_state(path: Path, step: int, seconds: float, params, optimizer, average) -> None:
    tensors = {}
    for i, p in enumerate(params):
        tensors[f"{i}.value"] = p.detach().contiguous()
        tensors[f"{i}.average"] = average.values[i].contiguous()
        for name, v in optimizer.state[p].items():
            tensors[f"{i}.optimizer.{name}"] = v.detach().clone().contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, {"state": json.dumps({"step": step, "seconds": seconds})})
    os.replace(part, path)


def load_state(path: Path, params, optimizer, average) -> tuple[int, float]:
    with safe_open(path, framework="pt") as f:
        state = json.loads(f.metadata()["state"])
        names = set(f.keys())
        for i, p in enumerate(params):
            p.data.copy_(f.get_tensor(f"{i}.value"))
            average.values[i].copy_(f.get_tensor(f"{i}.average"))
            prefix = f"{i}.optimizer."
            optimizer.state[p] = {n.removeprefix(prefix): f.get_tensor(n) for n in names if n.startswith(prefix)}
    return state["step"], state["seconds"]


def train(
    plan: Plan,
    params: list[torch.nn.Parameter],
    loss: Callable[[int, torch.Generator], torch.Tensor],
    work: Path,
    save_every: float = 120.0,
) -> float:
    """Runs ``plan`` to its end, resuming from ``work``; leaves the averaged weights in place. Returns seconds spent."""
    optimizer = torch.optim.AdamW(params, lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99))
    average = Average(params, plan.ema)
    path = work / f"{plan.name}.state.safetensors"
    step, spent = load_state(path, params, optimizer, average) if path.exists() else (0, 0.0)
    began, saved, running = time.monotonic(), time.monotonic(), None
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        value = loss(step, generator(plan, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        average.update(step)
        step += 1
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        now = time.monotonic()
        if step % 50 == 0 or step == plan.steps:
            log.info("%s %d/%d loss %.5f  %.0f s", plan.name, step, plan.steps, running, spent + now - began)
        if now - saved > save_every or step == plan.steps:
            save_state(path, step, spent + now - began, params, optimizer, average)
            saved = now
    average.copy_to()
    return spent + time.monotonic() - began
