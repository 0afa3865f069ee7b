"""Files that a killed process left half written are removed; those of a living one never are."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from comfyui_nibble.writing import orphans, whole

WRITER = """
import sys, time
from pathlib import Path
from comfyui_nibble.writing import whole
with whole.whole(Path(sys.argv[1])) as f:
    f.write(b"x" * 1_000_000)
    f.flush()
    print("writing", flush=True)
    time.sleep(60)
"""
NOBODY = 2**22 + 1  # above the largest number that a process of Linux has


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing ``a`` there."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def parts(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".part"))


def age(path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_killed_in_a_save(tmp_path, writer, caplog):
    (name,) = parts(tmp_path)
    assert name.startswith(f".a.{writer.pid}-")
    age(tmp_path / name, 10 * orphans.LONG_AGO)
    assert orphans.sweep(tmp_path) == [] and parts(tmp_path) == [name]  # it lives, however long it takes
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert parts(tmp_path) == [name]
    with caplog.at_level("INFO"):
        whole.data(tmp_path / "b", b"x")  # the next save in that folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    assert "Nibble removed 1 files (1.0 MB)" in caplog.text and str(tmp_path) not in caplog.text


def test_another_process_has_the_number_by_now(tmp_path, writer):
    """The lock tells: that process lives and has not locked this file, which is removed when it is old."""
    for n, seconds in enumerate((0, orphans.LONG_AGO + 60)):
        (tmp_path / f".old{n}.{writer.pid}-0.part").write_bytes(b"x")
        age(tmp_path / f".old{n}.{writer.pid}-0.part", seconds)
    assert orphans.sweep(tmp_path) == [f".old1.{writer.pid}-0.part"]
    assert len(parts(tmp_path)) == 2


def test_this_process_has_the_number_of_the_one_that_was_killed(tmp_path):
    """As in a container, where every ComfyUI is process 1."""
    (tmp_path / f".a.{os.getpid()}.part").write_bytes(b"x")  # of version 0.1.0
    (tmp_path / f".a.{os.getpid()}-99999.part").write_bytes(b"x")
    with whole.whole(tmp_path / "a") as f:
        f.write(b"whole")
        assert len(parts(tmp_path)) == 1 and orphans.sweep(tmp_path) == []  # only what it writes itself
    assert (tmp_path / "a").read_bytes() == b"whole" and parts(tmp_path) == []


def test_two_writers_of_one_name(tmp_path):
    with whole.whole(tmp_path / "a") as one, whole.whole(tmp_path / "a") as two:
        one.write(b"one")
        two.write(b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and parts(tmp_path) == []


@pytest.mark.parametrize(
    "process, seconds, gone", [(NOBODY, 0, False), (NOBODY, 2 * orphans.LONG_AGO, True), (1, 0, False)]
)
def test_file_systems_without_locks(tmp_path, monkeypatch, process, seconds, gone):
    def none(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(orphans.fcntl, "flock", none)
    part = tmp_path / f".a.{process}-0.part"
    part.write_bytes(b"x")
    age(part, seconds)
    assert (orphans.sweep(tmp_path) == [part.name]) == gone == (not part.exists())
    whole.data(tmp_path / "b", b"x")
    assert (tmp_path / "b").read_bytes() == b"x"


def test_other_files_are_left(tmp_path):
    names = [
        f"a.{NOBODY}.part",
        f".a.{NOBODY}.partial",
        ".a.part",
        ".a.x1.part",
        f".a.{NOBODY}-.part",
        f".{NOBODY}.part",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".folder.{NOBODY}.part").mkdir()
    (tmp_path / f".link.{NOBODY}.part").symlink_to(tmp_path / names[0])
    (tmp_path / f".a\n.{NOBODY}.part").write_bytes(b"x")
    assert orphans.sweep(tmp_path) == [f".a\n.{NOBODY}.part"]
    assert len(list(tmp_path.iterdir())) == len(names) + 2
    assert orphans.sweep(tmp_path / "away") == []


def test_below(tmp_path):
    for folder in ("", "loras", "a/b/c", "a/b/c/d/e"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f".a.{NOBODY}.part").write_bytes(b"x")
    assert len(orphans.sweep_below(tmp_path)) == 3  # and not without end
    assert orphans.sweep_below(tmp_path, most=1) == []


def test_whether_a_process_is_there(writer):
    assert orphans.alive(os.getpid()) and orphans.alive(writer.pid) and orphans.alive(1)
    assert not orphans.alive(NOBODY) and not orphans.alive(0) and not orphans.alive(2**70)
    writer.kill()
    writer.wait()
    assert not orphans.alive(writer.pid)


def test_on_windows_a_process_is_asked_for_and_not_ended(monkeypatch):
    """os.kill(process, 0) ends it there."""
    import ctypes

    asked = []

    class Kernel:
        class OpenProcess:
            def __call__(self, _rights, _inherit, process):
                asked.append(process)
                return {4: None, 5: None}.get(process, process)

        def __init__(self, *_args, **_kwargs):
            self.OpenProcess = Kernel.OpenProcess()
            self.GetExitCodeProcess, self.CloseHandle = Kernel.Code(), Kernel.Close()

        class Code:
            def __call__(self, handle, code):
                code._obj.value = {6: 0, 7: 259}[handle]
                return 1

        class Close:
            def __call__(self, _handle):
                return 1

    monkeypatch.setattr(ctypes, "WinDLL", Kernel, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: {4: 87, 5: 5}[asked[-1]], raising=False)
    monkeypatch.setattr(os, "kill", None)
    assert [orphans._alive_on_windows(n) for n in (4, 5, 6, 7)] == [False, True, False, True]
