"""A calibration that was stopped: nothing that was done is done again, and the result is that of an undisturbed one,
whatever became of the files in between.
"""

import dataclasses
import errno
import os
import random
import shutil

import pytest
import torch
from comfyui_nibble.calibration import resume
from comfyui_nibble.checkpoints import save
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.calib import allocate, engine, presets
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.svdquant import SVDQuantWeight
from torch import nn

NAMES = ("q", "k", "v", "out", "awq", "unused")


class Block(nn.Module):
    """q, k and v of one input, an output, one that is AWQ, and a layer that no forward pass reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            setattr(self, name, nn.Linear(128, 128))

    def forward(self, x):
        return self.awq(self.out(self.q(x) * self.k(x) + self.v(x)))


class Stopped(BaseException):
    """As ComfyUI's interrupt: not an Exception."""


class Work:
    """A job whose samplings are counted."""

    def __init__(self, **options):
        self.module, self.sampled = Block(), 0
        x = torch.randn(4, 160, 128, generator=torch.Generator().manual_seed(1))
        x[..., 5] *= 20
        self.x = x
        plans = {n: LayerPlan("awq_w4a16" if n == "awq" else "svdquant_w4a4", "", 16) for n in NAMES}
        weights = {n: (m.weight.detach(), m.bias.detach()) for n, m in self.module.named_children()}
        self.job = engine.Job(plans, presets.preset("fast"), torch.bfloat16, self.run, weights.get, **options)

    def run(self) -> None:
        self.sampled += 1
        self.module(self.x)

    def calibrate(self, store=None, stop_after: int | None = None, check=lambda: None) -> tuple[dict, list[str]]:
        """(layers, names of those that were solved now)."""
        solved = []

        def layer(layer, *_):
            solved.append(layer.name)
            if len(solved) == stop_after:
                raise Stopped

        return engine.calibrate(self.module, self.job, engine.Watch(layer, check, store)), solved


def tensors_of(weight) -> dict[str, torch.Tensor]:
    if isinstance(weight, torch.Tensor) and not hasattr(weight, "_layout_cls"):
        return {"weight": weight}
    if isinstance(weight, torch.Tensor):
        return kernels.tensors(weight)
    return {k: v for k, v in vars(weight).items() if isinstance(v, torch.Tensor)}


def same(one: dict, other: dict) -> bool:
    """Every layer's tensors, plan and figures, but not its seconds."""
    for name in one:
        a, b = (tensors_of(x[name].solved.weight) for x in (one, other))
        figures = [
            (x[name].plan, x[name].tokens, str(x[name].solved.error), x[name].solved.calibrated) for x in (one, other)
        ]
        if (
            a.keys() != b.keys()
            or figures[0] != figures[1]
            or not torch.equal(one[name].solved.bias, other[name].solved.bias)
        ):
            return False
        if any(a[k].dtype != b[k].dtype or not torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a):
            return False
    return list(one) == list(other)


OPTIONS = {
    "as planned": {},
    "all but awq in 8 bits": {"promote": 2e-3},
    "all but awq in 16 bits": {"promote": 1e-7},
    "a small budget, three samplings": {"budget": 1024 * 128 * 2},
    "in a number of bytes": {"fit": 110_000},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("after", [1, 3, 5])
def test_nothing_is_done_twice(tmp_path, monkeypatch, options, after):
    whole = Work(**OPTIONS[options])
    expected, order = whole.calibrate()
    stopped = Work(**OPTIONS[options])
    with pytest.raises(Stopped):
        stopped.calibrate(resume.Folder(tmp_path), after)
    again, store, measured = Work(**OPTIONS[options]), resume.Folder(tmp_path), []
    measure = allocate.measure
    monkeypatch.setattr(allocate, "measure", lambda *a: measured.append(a) or measure(*a))
    got, solved = again.calibrate(store)
    assert same(got, expected) and solved == order[after:] and store.found == after
    assert stopped.sampled + again.sampled == len({"q": 0, "out": 0, "awq": 0} if "three" in options else {"q": 0})
    assert measured == []
    assert store.notes() == [f"Went on with a run that was stopped: {after} layers were solved already"
                             + (", and its prompts were not sampled again" if store.recalled else "")]  # fmt: skip
    third = resume.Folder(tmp_path)
    got, solved = again.calibrate(third)
    assert same(got, expected) and solved == [] and third.found == len(NAMES)


def test_what_the_options_make():
    """The table above is what it says."""
    kinds = {}
    for name, options in OPTIONS.items():
        layers, _ = Work(**options).calibrate()
        kinds[name] = {layer.plan.scheme for layer in layers.values()}
    assert kinds["all but awq in 8 bits"] >= {"int8_tensorwise"} and kinds["all but awq in 16 bits"] >= {"keep"}


def test_stopped_while_it_keeps_what_it_saw(tmp_path):
    """What is kept of an observation counts when all of it is there."""
    expected, _ = Work().calibrate()
    files = {}

    def stop():
        if any(p.name.startswith("seen-0-1") for p in tmp_path.iterdir()):
            raise Stopped

    first = Work()
    with pytest.raises(Stopped):
        first.calibrate(resume.Folder(tmp_path), check=stop)
    files = {p.name for p in tmp_path.iterdir()}
    assert "seen-0-0.safetensors" in files and "seen-0.safetensors" not in files
    again = Work()
    assert same(again.calibrate(resume.Folder(tmp_path))[0], expected) and again.sampled == 1


def damage(path, rng: random.Random) -> None:
    written = bytearray(path.read_bytes())
    way = rng.randrange(4)
    if way == 0:
        written = written[: rng.randrange(len(written))]
    elif way == 1:
        written[rng.randrange(len(written))] ^= 1 << rng.randrange(8)  # not even one bit goes unseen
    elif way == 2:
        written[rng.randrange(min(400, len(written)))] = rng.randrange(256)
    else:
        written = bytearray(save.sha256([path]).encode())
    path.write_bytes(bytes(written))


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files_are_done_again(tmp_path, seed):
    expected, _ = Work().calibrate()
    with pytest.raises(Stopped):
        Work().calibrate(resume.Folder(tmp_path), 4)
    rng = random.Random(seed)
    for path in rng.sample(sorted(tmp_path.iterdir()), rng.randint(1, 4)):
        damage(path, rng)
    store = resume.Folder(tmp_path)
    assert same(Work().calibrate(store)[0], expected)
    assert all("damaged" in n or "could not be read" in n or n.startswith("Went on") for n in store.notes())


PLAN, REST = {"scheme": "svdquant_w4a4", "reason": ""}, {"shape": [128, 128], "tokens": 0, "seconds": 0.0}
OTHERS = [
    {},
    {"name": "q"},
    {"name": "q", "plan": {"scheme": "x", "new": 1}, **REST},
    {"name": "q", "plan": [], "shape": 3, "solved": {}, "tokens": 0, "seconds": 0.0},
    {"name": "q", "plan": PLAN, "solved": {"error": 0.0, "data_free": 0.0}, **REST},
    {"name": "k"},
]


@pytest.mark.parametrize("values", OTHERS)
def test_what_another_version_wrote_is_solved_again(tmp_path, values):
    """A whole file with other entries: `KeyError` and `TypeError` came out of it."""
    store = resume.Folder(tmp_path)
    Work().calibrate(store)
    path = tmp_path / resume._file("q")
    tensors, old = resume.kept.load(path)
    given = values if values != {"name": "k"} else {**old, "name": "k"}
    resume.kept.save(path, tensors, given)
    assert store.get("q") is None and store.notes() == ["A layer that was kept could not be read and is solved again"]
    layers, solved = Work().calibrate(resume.Folder(tmp_path))
    assert solved == ["q"] and isinstance(layers["q"].solved.weight, SVDQuantWeight)


def rewritten(path, change) -> None:
    """The file with its values or its tensors changed, and a checksum that is right."""
    tensors, values = resume.kept.load(path)
    change(values, tensors)
    resume.kept.save(path, tensors, values)


FORMAT = torch.tensor(list(b'{"format": "x"}'), dtype=torch.uint8)
BROKEN = {
    "empty": lambda p: p.write_bytes(b""),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "no safetensors": lambda p: p.write_bytes(b"PK\x03\x04" * 1000),
    "a huge header": lambda p: p.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a link to nothing": lambda p: (p.unlink(), p.symlink_to("nowhere")),
    "a link to itself": lambda p: (p.unlink(), p.symlink_to(p.name)),
    "another's file": lambda p: shutil.copy(p.with_name(resume._file("k")), p),
    "no tensors": lambda p: rewritten(p, lambda v, t: t.clear()),
    "a tensor less": lambda p: rewritten(p, lambda v, t: t.pop("layer.weight_scale")),
    "a tensor of another size": lambda p: rewritten(p, lambda v, t: t.update({"layer.weight": t["layer.weight"][:8]})),
    "another format": lambda p: rewritten(p, lambda v, t: t.update({"layer.comfy_quant": FORMAT})),
    "a bias too short": lambda p: rewritten(p, lambda v, t: t.update({"layer.bias": t["layer.bias"][:8].clone()})),
    "a scheme of another": lambda p: rewritten(p, lambda v, t: v["plan"].update(scheme="awq_w4a16")),
    "a field that is new": lambda p: rewritten(p, lambda v, t: v.update(lowest=0.5)),
    "another shape": lambda p: rewritten(p, lambda v, t: v.update(shape=[64, 64])),
    "no numbers": lambda p: rewritten(p, lambda v, t: v.update(shape=["a", None])),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the folder of a run that is over, its layers)."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, Work().calibrate(resume.Folder(folder))[0]


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_or_anothers_is_solved_again(tmp_path, finished, kind):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    BROKEN[kind](tmp_path / resume._file("q"))
    store = resume.Folder(tmp_path)
    layers, solved = Work().calibrate(store)
    assert solved == ["q"] and same(layers, finished[1])


def test_a_layer_of_any_name_is_kept(tmp_path, finished):
    store = resume.Folder(tmp_path / "s")
    for name in ("block.\udce9", "../../x", "é" * 300):
        store.put(dataclasses.replace(finished[1]["q"], name=name))
        assert store.get(name) is not None
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_keep_it_does_not_stop_it(tmp_path, monkeypatch, number):
    expected, _ = Work().calibrate()

    def refuse(*_args):
        raise OSError(number, os.strerror(number), "/home/someone/x")

    monkeypatch.setattr(os, "replace", refuse)
    store = resume.Folder(tmp_path)
    assert same(Work().calibrate(store)[0], expected)
    (note,) = store.notes()  # once, not for each layer
    assert note.startswith("What this run has done cannot be kept, and if it is stopped it is done again: ")
    assert "/home" not in note and list(tmp_path.iterdir()) == []


def test_observations_leave_room_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.room, "free", lambda _: resume.SPARE_BYTES)
    with pytest.raises(Stopped):
        Work().calibrate(resume.Folder(tmp_path), 1)
    assert [p.name for p in tmp_path.iterdir()] == [resume._file("q")]


def test_a_signature_holds_the_version(monkeypatch):
    one, digest = save.signature(a=1), save.digest(a=1)
    monkeypatch.setattr(save, "version", lambda: "9.9.9")
    assert save.signature(a=1) != one and save.digest(a=1) == digest
