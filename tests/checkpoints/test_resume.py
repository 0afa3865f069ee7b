"""What an interrupted calibration left behind: taken when it is whole and this run's own, else solved again."""

import json
import os
import shutil

import pytest
import torch
from comfyui_nibble.checkpoints import resume, save
from comfyui_nibble.headless import calibrate as headless
from comfyui_nibble.quant.calib import engine, presets
from comfyui_nibble.quant.policy import LayerPlan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

WIDTH = 64
FOUR = LayerPlan("svdquant_w4a4", "", 8)
PLANS = {"a": FOUR, "b": FOUR, "c": LayerPlan("awq_w4a16", "")}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.fixture(scope="module")
def job():
    module, x = Model(), torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
    weight = lambda n: (module.get_submodule(n).weight.detach(), module.get_submodule(n).bias.detach())  # noqa: E731
    return module, engine.Job(PLANS, presets.preset("fast"), torch.bfloat16, lambda: module(x), weight)


@pytest.fixture(scope="module")
def kept(job, tmp_path_factory):
    """(folder of a finished run's files, what it solved)."""
    root = tmp_path_factory.mktemp("kept")
    return root, engine.calibrate(*job, engine.Watch(store=resume.Folder(root, "s")))


@pytest.fixture
def store(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    return resume.Folder(tmp_path, "s")


def rewritten(path, change) -> None:
    """The file with its record, its tensors or both changed, and no word of it elsewhere."""
    with safe_open(path, "pt") as f:
        tensors, info = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())  # noqa: SIM118
    values = json.loads(info[resume.RECORD])
    out = change(values, tensors, info)
    if out is None:
        info[resume.RECORD] = json.dumps(values)
    save_file(tensors, path, info if out is None else out)


def flip(path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def older(values, tensors, info):
    """As 0.1.0 wrote it: no digest."""
    return {resume.RECORD: info[resume.RECORD]}


def newer(values, tensors, info):
    """Whole, with a digest of its own, and fields that this version does not know."""
    text = json.dumps(values | {"lowest": 0.5})
    return {resume.RECORD: text, resume.DIGEST: resume._digest(text, tensors)}


def bias_of_another(values, tensors, info):
    tensors["layer.bias"] = tensors["layer.bias"][:8].contiguous()
    return {**info, resume.DIGEST: resume._digest(info[resume.RECORD], tensors)}


def of_another_scheme(values, tensors, info):
    text = json.dumps(values | {"plan": values["plan"] | {"scheme": "awq_w4a16"}})
    return {resume.RECORD: text, resume.DIGEST: resume._digest(text, tensors)}


BROKEN = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:100]),
    "cut late": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "no safetensors": lambda p: p.write_bytes(b"PK\x03\x04" * 1000),
    "a huge header": lambda p: p.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a link to nothing": lambda p: (p.unlink(), p.symlink_to("nowhere")),
    "a link to itself": lambda p: (p.unlink(), p.symlink_to(p.name)),
    "a bit of a weight": lambda p: flip(p, 0.9),
    "the last bit": lambda p: flip(p, 1),
    "no metadata": lambda p: rewritten(p, lambda v, t, i: {}),
    "no record": lambda p: rewritten(p, lambda v, t, i: {resume.DIGEST: i[resume.DIGEST]}),
    "no tensors": lambda p: rewritten(p, lambda v, t, i: t.clear()),
    "a tensor less": lambda p: rewritten(p, lambda v, t, i: t.pop("layer.weight_scale") is None or None),
    "a tensor of another size": lambda p: rewritten(p, lambda v, t, i: t.update(
        {"layer.weight": t["layer.weight"][:8]})),
    "another format": lambda p: rewritten(p, lambda v, t, i: t.update(
        {"layer.comfy_quant": torch.tensor(list(b'{"format": "x"}'), dtype=torch.uint8)})),
    "older": lambda p: rewritten(p, older),
    "newer": lambda p: rewritten(p, newer),
    "a bias too short": lambda p: rewritten(p, bias_of_another),
    "a scheme of another": lambda p: rewritten(p, of_another_scheme),
}  # fmt: skip
RECORDS = [
    "", "null", "[]", "3", '"text"', "{}", '{"name": "a"', "[" * 100_000, "NaN", '{"solved": null}',
    '{"plan": 3, "solved": {}}',
    '{"name": "a", "plan": {}, "shape": [64, 64], "solved": {"error": 0, "data_free": 0, "calibrated": true}}',
    '{"name": "a", "plan": {"scheme": "x", "reason": ""}, "shape": 5, "solved": {}, "tokens": 1, "seconds": 1}',
]  # fmt: skip


def again(job, store) -> list[str]:
    """The layers that a run with ``store`` solved."""
    seen = []
    module, work = job
    layers = engine.calibrate(module, work, engine.Watch(lambda layer, *_: seen.append(layer.name), store=store))
    assert list(layers) == list(PLANS)
    return seen


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_or_anothers_is_solved_again(kind, job, kept, store):
    BROKEN[kind](store._path("a"))
    assert store.get("a") is None and store.get("b") is not None
    if kind not in ("a folder", "a link to itself"):
        assert again(job, store) == ["a"]
        assert torch.equal(store.get("a").solved.weight.qweight, kept[1]["a"].solved.weight.qweight)


@pytest.mark.parametrize("text", RECORDS, ids=range(len(RECORDS)))
def test_any_record_at_all(text, store):
    """Even one whose digest is right."""
    made = lambda v, t, i: {resume.RECORD: text, resume.DIGEST: resume._digest(text, t)}  # noqa: E731
    rewritten(store._path("a"), made)
    assert store.get("a") is None


def test_a_file_of_another_layer_is_not_taken(job, kept, store):
    """Of the same shape and scheme, so that nothing else would tell."""
    shutil.copy(store._path("b"), store._path("a"))
    assert store.get("a") is None and again(job, store) == ["a"]


def test_what_is_whole_comes_back_bit_for_bit(job, kept, store):
    assert again(job, store) == []
    for name, layer in kept[1].items():
        found = store.get(name)
        assert (found.plan, found.shape, found.tokens) == (layer.plan, layer.shape, layer.tokens)
        assert found.solved.error == layer.solved.error and torch.equal(found.solved.bias, layer.solved.bias)
        assert torch.equal(found.solved.weight.wscales, layer.solved.weight.wscales)


def test_a_folder_that_cannot_be_written_stops_nothing(job, tmp_path, caplog):
    (tmp_path / "s").write_text("a file where the folder should be")
    store = resume.Folder(tmp_path, "s")
    assert again(job, store) == list(PLANS)
    assert [r.getMessage()[:34] for r in caplog.records] == ["Solved layers cannot be kept ([Err"]
    store.clear()


def test_another_version_has_another_signature(job, monkeypatch):
    class Source:
        name, prefix, shapes = "x", "", {f"{n}.weight": (WIDTH, WIDTH) for n in PLANS}

    signed = lambda: headless.signature(Source, job[1], headless.Inputs(("a",)))  # noqa: E731
    mine = signed()
    assert mine == signed()
    monkeypatch.setattr(save, "version", lambda: "0.0.9")
    assert mine != signed() and resume.signature(a=1) == resume.signature(a=1)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_layer_of_any_name_is_kept(kept, tmp_path):
    import dataclasses

    store = resume.Folder(tmp_path, "s")
    for name in ("block.\udce9", "../../x", "é" * 300):
        store.put(dataclasses.replace(kept[1]["a"], name=name))
        assert store.get(name) is not None and len(list((tmp_path / "s").iterdir())) >= 1
    assert not (tmp_path.parent / "x.safetensors").exists()
