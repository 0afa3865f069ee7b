"""Commands on a disk without room or permission: one sentence before the work, nothing left, exit status 1."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
from comfyui_nibble import demo
from comfyui_nibble.headless import pipeline
from comfyui_nibble.headless.cli import main
from comfyui_nibble.training import data
from comfyui_nibble.writing import orphans, room, whole

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("q") / "demo-4bit.safetensors"
    assert main(["quantize", str(demo.MODEL), "--out", str(path), "--rank", "16"]) == 0
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    lines = (demo.PICTURES / "captions.jsonl").read_text().splitlines()[:2]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    for line in lines:
        shutil.copy(demo.PICTURES / json.loads(line)["file_name"], folder)
    return folder


def command(what: str, quantized, pictures, out) -> list[str]:
    model, file = str(demo.MODEL), str(out / "new" / "x.safetensors")
    few = ["--updates", "1", "--batch", "1", "--samples", "1"]
    return {
        "quantize": ["quantize", model, "--out", file],
        "quantize, nvfp4": ["quantize", model, "--out", file, "--target", "nvfp4"],
        "calibrate": ["quantize", model, "--out", file, "--preset", "fast", "--samples", "1", "--levels", "2"],
        "convert": ["convert", str(quantized), "--out", file],
        "train": ["train", str(pictures), "--out", file, "--steps", "2", "--batch", "1", "--precision", "16-bit"],
        "distill": ["distill", "--way", "one_step", "--out", file, "--pairs", "1", "--teacher-steps", "1", *few],
        "refine": ["refine", "--quantized", str(quantized), "--out", file, "--stops", "1", *few],
        "generate": ["generate", "a fox", "--steps", "1", "--out", file],
        "demo": ["demo", "--out", file],
        "profile": ["profile", "--steps", "2", "3", "--check", "--size", "64", "--out", file],
    }[what]


COMMANDS = (
    "quantize",
    "quantize, nvfp4",
    "calibrate",
    "convert",
    "train",
    "distill",
    "refine",
    "generate",
    "demo",
    "profile",
)


@pytest.mark.parametrize("what", COMMANDS)
def test_no_permission(what, quantized, pictures, tmp_path, monkeypatch, capsys):
    """Said before any model is loaded."""

    def refuse(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/home/someone/x")

    def loaded(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(orphans, "begin", refuse)
    if what != "calibrate":  # which needs the pipeline to know what it writes
        monkeypatch.setattr(pipeline, "load_pipeline", loaded)
    assert main(command(what, quantized, pictures, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "it cannot be written (the disk is read-only). Nothing was begun. Choose another name or folder" in said
    assert "/home" not in said and str(tmp_path) not in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", [c for c in COMMANDS if c not in ("generate", "demo", "profile")])
def test_no_room(what, quantized, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, room.SPARE + 50_000))
    monkeypatch.setattr(data, "fitted", None)  # nothing is looked at
    monkeypatch.setattr(pipeline, "sample", None)
    assert main(command(what, quantized, pictures, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "x.safetensors: it needs " in said and " and 1.1 MB are free. Nothing was begun. Free " in said
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_in_the_end_is_kept(pictures, tmp_path, monkeypatch, capsys):
    args = command("train", None, pictures, tmp_path)
    replace = os.replace

    def refuse(part, path):
        if os.fspath(path).endswith("x.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        replace(part, path)

    with monkeypatch.context() as m:
        m.setattr(whole.os, "replace", refuse)
        assert main(args) == 1
    said = capsys.readouterr().err
    assert "x.safetensors: it cannot be written (the disk is full). What was trained is kept, and the same run" in said
    assert main(args) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["x.safetensors"]
