"""Whatever stops a write, at whatever point of it: one sentence, nothing left, and the old file as it was."""

import ast
import errno
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from comfyui_nibble.writing import orphans, tensors, whole
from comfyui_nibble.writing.whole import WriteError
from PIL import Image
from project_files import project_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
WRITERS = {
    "a.bin": lambda path: whole.data(path, b"x" * 100_000),
    "a.txt": lambda path: whole.text(path, "é\n" * 50_000),
    "a.png": lambda path: whole.picture(path, Image.effect_noise((200, 200), 50)),
    "a.jpg": lambda path: whole.picture(path, Image.new("RGB", (64, 64)), quality=90),
    "a.safetensors": lambda path: tensors.save(path, {"t": torch.ones(30_000)}, {}),
}
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your share of the disk is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.EFBIG: "the disk takes no file of this size",
    errno.EIO: "Input/output error",
}


class Failing:
    """A file whose ``point`` fails."""

    def __init__(self, file, point: str, error: OSError):
        self._file, self._point, self._error = file, point, error

    def __getattr__(self, name: str):
        if name == self._point:
            raise self._error
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def fail(monkeypatch, point: str, number: int) -> None:
    """Makes the system refuse ``point`` of every write."""
    error = OSError(number, os.strerror(number), "/home/someone/secret/file")

    def raising(*_args, **_kwargs):
        raise error

    if point in ("write", "flush"):
        begin = orphans.begin

        def opened(path):
            part, file = begin(path)
            return part, Failing(file, point, error)

        monkeypatch.setattr(orphans, "begin", opened)
    elif point == "open":
        monkeypatch.setattr(orphans, "begin", raising)
    elif point == "mkdir":
        monkeypatch.setattr(Path, "mkdir", raising)
    else:
        monkeypatch.setattr(os, point, raising)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("point", ["mkdir", "open", "write", "flush", "fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"as it was"])
def test_it_fails_in_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name, number, point, before):
    path = tmp_path / "folder" / name
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    with monkeypatch.context() as m:
        fail(m, point, number)
        with pytest.raises(WriteError) as e:
            WRITERS[name](path)
    remedy = "Free some space, or choose another folder" if number in whole.FULL else "Choose another name or folder"
    assert str(e.value) == f"{name}: it cannot be written ({REASONS[number]}). {remedy}" and e.value.errno == number
    left = [p.name for p in path.parent.iterdir()] if path.parent.exists() else []
    assert left == ([name] if before is not None else [])
    if before is not None:
        assert path.read_bytes() == before


class Stopped(BaseException):
    """As ComfyUI's interrupt: not an Exception."""


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(Stopped), whole.whole(tmp_path / "a") as f:
        f.write(b"half")
        raise Stopped
    assert list(tmp_path.iterdir()) == [] and not orphans._mine


def test_nobody_sees_half_of_it(tmp_path):
    path = tmp_path / "a"
    whole.data(path, b"old")
    with whole.whole(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_it_does_not_overwrite_what_came_meanwhile(tmp_path):
    with (
        pytest.raises(WriteError, match="there is a file of this name already"),
        whole.whole(tmp_path / "a", False) as f,
    ):
        f.write(b"mine")
        (tmp_path / "a").write_bytes(b"theirs")
    assert (tmp_path / "a").read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 1


def test_names_and_texts(tmp_path):
    whole.text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"
    whole.data(tmp_path / ("n" * 255), b"x")  # as long as a disk allows
    whole.data(tmp_path / ("ü" * 127), b"x")
    with pytest.raises(WriteError, match=r"^n{59}…n{59}: it cannot be written \(the name is too long\)"):
        whole.data(tmp_path / ("n" * 256), b"x")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"^b: it cannot be written \(there is a file where its folder should be\)"):
        whole.data(tmp_path / "file" / "b", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=r"^folder: it cannot be written \(there is a folder of this name\)"):
        whole.data(tmp_path / "folder", b"x")


@pytest.fixture
def disk(tmp_path):
    """disk(flags): a small disk of its own, mounted anew with ``flags``."""
    where = tmp_path / "disk"
    where.mkdir()

    def mount(flags: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "tmpfs", str(where)], capture_output=True)
        if done.returncode:
            pytest.skip("no disk can be mounted here")
        return where

    try:
        yield mount
    finally:
        subprocess.run(["umount", str(where)], capture_output=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_really_full(disk, name):
    folder = disk("size=64k")
    (folder / "filler").write_bytes(b"x" * 60_000)
    if name == "a.jpg":
        WRITERS[name](folder / name)  # a small one still fits
        return
    with pytest.raises(WriteError) as e:
        WRITERS[name](folder / name)
    want = "it needs 120 kB and 4 kB are free" if name == "a.safetensors" else "cannot be written (the disk is full)"
    assert want in str(e.value) and str(folder) not in str(e.value)
    assert [p.name for p in folder.iterdir()] == ["filler"]


def test_a_disk_that_is_really_read_only(disk):
    folder = disk("size=9m,ro")
    for name, write in WRITERS.items():
        with pytest.raises(WriteError, match=rf"^{name}: it cannot be written \(the disk is read-only\)"):
            write(folder / name)
    with pytest.raises(WriteError, match=r"^b: it cannot be written \(the disk is read-only\)"):
        whole.data(folder / "new" / "b", b"x")


# ---- safetensors ----


def test_the_bytes_are_those_of_the_library(tmp_path):
    """Every dtype, awkward shapes; metadata is sorted, where the library's order is random."""
    values = {}
    for i, dtype in enumerate(tensors.DTYPES):
        for shape in ((3, 4), (), (0, 4), (2, 2, 6)):
            size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
            raw = torch.arange(size, dtype=torch.uint8) + i
            name = f"{chr(97 + i * 7 % 26)}.{dtype}.{len(shape)}"
            if dtype == torch.bool:
                values[name] = (raw % 2 == 0).reshape(shape)
            elif tensors.DTYPES[dtype] != "F4" or shape:
                values[name] = torch.randn(shape, dtype=dtype) if dtype.is_complex else raw.view(dtype).reshape(shape)
    values["view"] = torch.arange(12.0).reshape(3, 4).t()[1:]  # not contiguous
    save_file({n: t.contiguous() for n, t in values.items()}, tmp_path / "library.safetensors", {"format": "pté"})
    tensors.save(tmp_path / "ours.safetensors", values, {"format": "pté"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    one = torch.ones(4)
    tensors.save(tmp_path / "a.safetensors", {"x": one, "y": one[:2]}, {"b": "2", "a": "1"})
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.metadata() == {"a": "1", "b": "2"}
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["x"], one) and torch.equal(found["y"], one[:2])
    tensors.save(tmp_path / "b.safetensors", {}, {})
    assert load_file(tmp_path / "b.safetensors") == {}


# ---- there is no other way ----

# What writes files under a name that it is given: functions, by module and name, and methods.
CALLS = {("os", "replace"), ("os", "rename"), ("torch", "save"), ("np", "save"), ("shutil", "move"), ("", "save_file"),
         ("", "serialize_file")}  # fmt: skip
METHODS = {"write_text", "write_bytes", "NamedTemporaryFile", "mkstemp", "TemporaryDirectory"}
IMAGES = {"image", "picture", "sheet", "drawing"}
PAGES = {"prompts/page.py", "sampling/presets.py"}  # write the documentation, for make docs
IN_MEMORY = {'chart(layers, title).save(png, "PNG")'}


def test_there_is_one_writer():
    for path in project_files():
        home = path.as_posix()
        if path.suffix != ".py" or path.parts[0] in ("tests", "benchmarks", "writing") or home in PAGES:
            continue
        source = (ROOT / path).read_text(encoding="utf-8")
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            what, text = call.func, f"{home}: {ast.get_source_segment(source, call)}"
            name = getattr(what, "attr", getattr(what, "id", ""))
            module = getattr(getattr(what, "value", None), "id", "")
            assert (module, name) not in CALLS and name not in METHODS, text
            if name == "open":
                modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                assert not any(re.fullmatch(r"[wxa]b?\+?|r\+b?|rb\+", mode) for mode in modes), text
            if name == "save" and (module in IMAGES or isinstance(getattr(what, "value", None), ast.Call)):
                assert text.partition(": ")[2] in IN_MEMORY, text
