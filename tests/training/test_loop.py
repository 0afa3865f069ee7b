"""The loop: exact arithmetic, the same weights however often it was stopped, and one sentence for what is wrong."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_nibble.training.loop import SAVE_SECONDS, Plan, Saver, Watch, learning_rate, train
from comfyui_nibble.writing import kept
from safetensors.torch import save_file

TARGET = torch.linspace(-1, 1, 12).view(3, 4)
PLAN = Plan("toy", steps=2, batch=8, lr=0.05)


class Toy:
    """A regression whose data are drawn from the generator."""

    def __init__(self):
        self.p = torch.nn.Parameter(torch.zeros(3, 4))

    def loss(self, _step: int, g: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, 4, generator=g)
        return ((x @ (self.p - TARGET).T) ** 2).mean()


def run(plan: Plan, **kwargs):
    toy = Toy()
    return toy.p.detach(), train(plan, [toy.p], toy.loss, **kwargs)


def test_it_is_adamw_with_clipping_and_an_average():
    """The steps written out by hand, from torch's own pieces."""
    plan = Plan("toy", steps=9, batch=8, lr=0.05, warmup=3, ema=0.9, seed=5)
    toy = Toy()
    optimizer = torch.optim.AdamW([toy.p], lr=1.0, weight_decay=0.01, betas=(0.9, 0.99))
    average = toy.p.detach().clone()
    for step in range(9):
        rate = 0.05 * (step + 1) / 3 if step < 3 else 0.05 * (0.01 + 0.495 * (1 + math.cos(math.pi * (step - 3) / 6)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        toy.loss(step, torch.Generator().manual_seed(5 * 1_000_003 + step)).backward()
        torch.nn.utils.clip_grad_norm_([toy.p], 1.0)
        optimizer.step()
        average.lerp_(toy.p.detach(), 1 - min(0.9, (1 + step) / (10 + step)))
    got, result = run(plan)
    assert torch.equal(got, average) and len(result.losses) == 9


def test_schedules_accumulation_and_loss_scale():
    constant = Plan("toy", 20, 8, 0.05, warmup=4, schedule="constant")
    assert [learning_rate(constant, s) for s in (0, 3, 4, 19)] == [0.0125, 0.05, 0.05, 0.05]
    scaled, _ = run(Plan("toy", 6, 8, 0.05, loss_scale=1024.0))
    assert torch.allclose(scaled, run(Plan("toy", 6, 8, 0.05))[0], atol=1e-7)
    toy, twice = Toy(), []

    def both(step: int, g: torch.Generator) -> torch.Tensor:
        first, second = (torch.Generator().manual_seed(2 * step + i) for i in (0, 1))
        return (toy.loss(step, first) + toy.loss(step, second)) / 2

    train(Plan("toy", 4, 8, 0.05), [toy.p], both)
    split = Toy()
    plan = Plan("toy", 4, 8, 0.05, accumulate=2)
    train(plan, [split.p], lambda step, g: twice.append(step) or split.loss(step, torch.Generator().manual_seed(step)))
    assert twice == list(range(8)) and torch.allclose(split.p, toy.p, atol=1e-6)


class Stopped(BaseException):
    """As ComfyUI's interrupt: not an Exception."""


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "galore"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_stopped_and_resumed_equals_one_run(tmp_path, optimizer, ema):
    if optimizer == "galore":
        pytest.importorskip("pytorch_optimizer")
    plan = Plan("toy", 12, 8, 0.05, ema=ema, optimizer=optimizer)
    whole, result = run(plan)

    def stop(done: int, _total: int, _loss: float) -> None:
        if done in (4, 9):
            raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            run(plan, work=tmp_path, watch=Watch(stop))
    again, resumed = run(plan, work=tmp_path)
    assert torch.equal(again, whole) and resumed.losses == result.losses
    assert [p.name for p in tmp_path.iterdir()] == ["toy.state.safetensors"]


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_loop import Toy
from comfyui_nibble.training.loop import Plan, Watch, train
toy = Toy()
wait = lambda done, total, loss: (print(done, flush=True), time.sleep(0.02))
train(Plan("toy", 200, 8, 0.05, ema=0.9), [toy.p], toy.loss, Path(sys.argv[1]), Watch(wait), save_every=0)
"""


def test_killed_and_resumed_equals_one_run(tmp_path):
    plan = Plan("toy", 200, 8, 0.05, ema=0.9)
    command = [sys.executable, "-c", SCRIPT.format(here=os.path.dirname(__file__)), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = []
    again, result = run(plan, work=tmp_path, watch=Watch(lambda done, _t, _l: steps.append(done)))
    assert 20 <= steps[0] < 200 and len(result.losses) == 200
    assert torch.equal(again, run(plan)[0])


@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_damaged_state_is_set_aside_and_named(tmp_path, content):
    """It was a raw SafetensorError, again and again until somebody deleted the file."""
    plan = Plan("toy", 12, 8, 0.05, ema=0.9)
    whole, _ = run(plan)
    with pytest.raises(Stopped):
        run(plan, work=tmp_path, watch=Watch(stop_after(5)))
    path = tmp_path / "toy.state.safetensors"
    written = bytearray(path.read_bytes())
    written[-20] ^= 1  # one bit of a value
    path.write_bytes(bytes(written) if content is None else written[: len(written) // 2] if content else b"")
    again, result = run(plan, work=tmp_path)
    assert torch.equal(again, whole) and len(result.losses) == 12
    assert result.notes == ("What was kept of this run was damaged and is now toy.state.safetensors.damaged: it began "
                            "anew",)  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.damaged"]


@pytest.mark.parametrize("number, why", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is read-only")])
def test_a_state_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, number, why):
    plan = Plan("toy", 12, 8, 0.05)
    whole, _ = run(plan)

    def refuse(*_args):
        raise OSError(number, os.strerror(number), "/home/someone/x")

    monkeypatch.setattr(os, "replace", refuse)
    got, result = run(plan, work=tmp_path, save_every=0)
    assert torch.equal(got, whole) and list(tmp_path.iterdir()) == []
    (note,) = result.notes  # once, not for each update
    assert note.startswith("What the run had reached could not be kept: toy.state") and why in note
    with pytest.raises(Stopped):  # and hides nothing that is raised
        run(plan, work=tmp_path, watch=Watch(stop_after(3)))


def test_states_come_by_share_and_by_time_and_cost_little():
    """A clock that is told how long an update and a save take: (steps, seconds of an update, of a save) -> saves."""

    def after(steps: int, update: float, save: float) -> tuple[list[int], float]:
        now = 0.0
        saver, saved, spent = Saver(steps, 0, SAVE_SECONDS, save, lambda: now), [], 0.0
        for done in range(1, steps + 1):
            now += update
            if saver.due(done):
                now += save
                saver.saved(done)
                saved.append(done)
                spent += save
        return saved, spent / now

    saved, share = after(100, 1.0, 0.01)
    assert saved == list(range(5, 101, 5)) and share < 0.02  # every 5 %
    saved, share = after(1000, 10.0, 0.1)
    assert saved[:3] == [6, 13, 19] and share < 0.02  # every minute, where 5 % are longer
    saved, share = after(100, 0.01, 0.05)  # a second in all: saving each 5 % would double it
    assert saved == [100]
    saved, share = after(20_000, 1.0, 30.0)  # a huge state
    assert saved[:2] == [1500, 2970] and share < 0.022  # and the end


def stop_after(count: int):
    def stop(done: int, _total: int, _loss: float) -> None:
        if done == count:
            raise Stopped

    return stop


def test_what_is_refused(tmp_path):
    run(Plan("toy", 2, 8, 0.05), work=tmp_path)
    with pytest.raises(ValueError, match=r"toy.state.safetensors is the state of another run. Delete it"):
        run(Plan("toy", 3, 8, 0.05), work=tmp_path)
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="not a number at step 1"):
        train(Plan("nan", 2, 1, 0.1), [p], lambda _s, _g: p.log().sum() * float("inf") * 0)
    for bad in (dict(steps=0), dict(schedule="linear"), dict(optimizer="sgd"), dict(lr=0.0)):
        with pytest.raises(ValueError):
            Plan(**{**dict(name="x", steps=1, batch=1, lr=0.1), **bad})


HARMS = {
    "nonsense": lambda p: p.write_bytes(b"x" * 500),
    "no metadata": lambda p: save_file({"0.value": torch.zeros(3, 4)}, p),
    "as 0.1.0 wrote it": lambda p: save_file({"0.value": torch.zeros(3, 4)}, p, {"state": json.dumps({"plan": 1})}),
    "a list": lambda p: kept.save(p, {"0.value": torch.zeros(3, 4)}, []),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_state_that_is_none_is_set_aside(harm, tmp_path):
    whole, _ = run(PLAN)
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / "toy.state.safetensors"
    HARMS[harm](path)
    again, result = run(PLAN, work=path.parent)
    assert torch.equal(again, whole) and len(result.notes) == 1 and path.with_name(f"{path.name}.damaged").exists()


@pytest.mark.parametrize("lost", ["losses", "0.value", "seconds"])
def test_a_whole_state_that_lacks_something_is_another_runs(lost, tmp_path):
    """Hours of training may be in it: whether to start anew is not for the run to decide."""
    run(PLAN, work=tmp_path)
    path = tmp_path / "toy.state.safetensors"
    tensors, values = kept.load(path)
    for entries in (tensors, values):
        entries.pop(lost, None)
    kept.save(path, tensors, values)
    with pytest.raises(ValueError, match=r"^toy.state.safetensors is the state of another run. Delete it to start"):
        run(PLAN, work=tmp_path)


def test_it_asks_for_a_stop_before_every_pass():
    asked = []
    run(Plan("toy", 3, 8, 0.05), watch=Watch(check=lambda: asked.append(time.monotonic())))
    assert len(asked) == 6
