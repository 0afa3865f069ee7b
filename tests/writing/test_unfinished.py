"""Unfinished runs: kept with what names them, no more than a disk can bear, and never one that is being worked on."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from comfyui_nibble.writing import kept as files
from comfyui_nibble.writing import orphans, unfinished

Usage = namedtuple("Usage", "total used free")
WORKER = """
import sys, time
from pathlib import Path
from comfyui_nibble.writing import unfinished
with unfinished.run(Path(sys.argv[1]), sys.argv[2], "a run of another process"):
    print("at work", flush=True)
    time.sleep(60)
"""


def stopped(root, name: str, size: int = 1000, age: float = 0.0) -> None:
    """A run that kept ``size`` bytes and was stopped."""
    with pytest.raises(KeyboardInterrupt), unfinished.run(root, name, f"run {name}") as kept:
        (kept.folder / "state").write_bytes(b"x" * size)
        raise KeyboardInterrupt
    os.utime(root / name / "run.json", (time.time() - age,) * 2)


def names(root) -> set[str]:
    return {p.name for p in root.iterdir()} if root.exists() else set()


def test_a_run_is_kept_until_it_is_finished(tmp_path):
    root = tmp_path / "unfinished"
    stopped(root, "one")
    assert json.loads((root / "one" / "run.json").read_text())["what"] == "run one"
    with unfinished.run(root, "one", "run one") as kept:
        assert (kept.folder / "state").read_bytes() == b"x" * 1000 and kept.notes == []
        kept.finish()
    assert not root.exists()


def test_others_are_listed(tmp_path):
    stopped(tmp_path, "one", 2_000_000, age=60)
    with unfinished.run(tmp_path, "two", "run two") as kept:
        (note,) = kept.notes
        kept.finish()
    assert note.startswith(f"Other unfinished runs in {tmp_path.name}: run one, 20") and "2.0 MB. Delete what" in note
    assert names(tmp_path) == {"one"}


def test_the_oldest_go_by_number_and_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "MOST_RUNS", 3)
    for n in range(5):
        stopped(tmp_path, str(n), age=100 - n)
    assert names(tmp_path) == {"2", "3", "4"}
    with unfinished.run(tmp_path, "0", "run 0") as kept:
        said = [n for n in kept.notes if n.startswith("Removed the unfinished run run 2, 20")]
        assert len(said) == 1 and "1 kB: 3 of 17.2 GB are the most" in said[0]
    assert names(tmp_path) == {"0", "3", "4"}
    monkeypatch.setattr(unfinished, "MOST_BYTES", 3500)
    with unfinished.run(tmp_path, "large", "run large", need=3000) as kept:
        assert names(tmp_path) == {"large", "0"}  # 0 holds nothing but its name
        kept.finish()


@pytest.fixture
def worker(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path), "busy"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.wait()


def test_a_run_that_is_worked_on_stays(tmp_path, monkeypatch, worker):
    monkeypatch.setattr(unfinished, "MOST_RUNS", 1)
    os.utime(tmp_path / "busy" / "run.json", (0, 0))
    stopped(tmp_path, "new")
    assert names(tmp_path) == {"busy", "new"}
    with unfinished.run(tmp_path, "busy", "the same run in a second ComfyUI") as kept:
        assert kept.folder == tmp_path / "busy"
    worker.kill()
    worker.wait()
    os.utime(tmp_path / "busy" / "run.json", (0, 0))
    stopped(tmp_path, "newer")
    assert names(tmp_path) == {"newer"}


def test_where_there_are_no_locks_only_old_ones_go(tmp_path, monkeypatch):
    def none(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(unfinished.fcntl, "flock", none)
    monkeypatch.setattr(unfinished, "MOST_RUNS", 1)
    stopped(tmp_path, "one")
    stopped(tmp_path, "two")
    assert names(tmp_path) == {"one", "two"}
    for path in (tmp_path / "one").iterdir():
        os.utime(path, (0, 0))
    stopped(tmp_path, "three")
    assert names(tmp_path) == {"two", "three"}


@pytest.mark.parametrize("number, why", [(errno.EROFS, "the disk is read-only"), (errno.ENOSPC, "the disk is full"),
                                         (errno.EACCES, "there is no permission to write there")])  # fmt: skip
def test_where_nothing_can_be_kept_the_run_goes_on(tmp_path, monkeypatch, number, why):
    def refuse(_):
        raise OSError(number, os.strerror(number), "/home/someone/x")

    monkeypatch.setattr(orphans, "begin", refuse)
    with unfinished.run(tmp_path / "a", "one", "run one") as kept:
        assert kept.folder is None
        (note,) = kept.notes
    assert note.startswith("If this run is stopped it begins anew: ") and why in note and "/home" not in note


def test_where_there_is_no_room(tmp_path, monkeypatch):
    stopped(tmp_path, "one", 4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 8_000_000))
    with unfinished.run(tmp_path, "two", "run two", need=12_000_000) as kept:
        assert kept.folder is None and "it needs 12.0 MB and 8.0 MB are free" in kept.notes[0]
        kept.finish()  # nothing to forget
    with unfinished.run(tmp_path, "one", "run one", need=8_000_000) as kept:
        assert kept.folder is not None  # 4 of the 8 are there already
    assert names(tmp_path) == {"one"}


def test_what_is_not_a_run_is_named_by_its_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("[]")
    (tmp_path / "a file").touch()
    assert [r.what for r in unfinished.runs(tmp_path)] == ["mine"] and unfinished.runs(tmp_path / "away") == []


def test_a_kept_file_is_what_was_written_or_damaged(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)}
    files.save(tmp_path / "x", tensors, {"n": [1, "é"]})
    found, values = files.load(tmp_path / "x")
    assert values == {"n": [1, "é"]} and torch.equal(found["a"], tensors["a"]) and found["b"][0] == 1.5
    whole = (tmp_path / "x").read_bytes()
    for at in range(0, len(whole), 7):
        (tmp_path / "x").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(files.Damaged):
            files.load(tmp_path / "x")
    for content in (b"", whole[:-1], whole + b"x", b"\0" * 100):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(files.Damaged):
            files.load(tmp_path / "x")
    with pytest.raises(files.Damaged):
        files.load(tmp_path / "away")
    assert files.set_aside(tmp_path / "x") == "x.damaged" and names(tmp_path) == {"x.damaged"}
