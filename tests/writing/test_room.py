"""Room and permission are asked for before the work; the sentence says what is needed, what is free, what to do."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
from comfyui_nibble.writing import orphans, room
from comfyui_nibble.writing.whole import WriteError

Usage = namedtuple("Usage", "total used free")


def test_what_is_needed_and_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 3 * 10**9))
    room.check_room(tmp_path / "new" / "a.safetensors", 2 * 10**9)
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing
    with pytest.raises(WriteError) as e:
        room.check_room(tmp_path / "new" / "a.safetensors", 12_300_000_000)
    assert str(e.value) == (
        "a.safetensors: it needs 12.3 GB and 3.0 GB are free. Nothing was begun. Free 9.3 GB, or choose another folder"
    )


@pytest.mark.parametrize("usage", [Usage(0, 0, 0), OSError(errno.ENOSYS, "Function not implemented")])
def test_disks_that_do_not_say_are_not_refused(tmp_path, monkeypatch, usage):
    def ask(_):
        if isinstance(usage, OSError):
            raise usage
        return usage

    monkeypatch.setattr(shutil, "disk_usage", ask)
    room.check_room(tmp_path / "a", 10**15)


@pytest.mark.parametrize("number, why", [(errno.EROFS, "the disk is read-only"), (errno.ENOSPC, "the disk is full"),
                                         (errno.EACCES, "there is no permission to write there")])  # fmt: skip
def test_permission(tmp_path, monkeypatch, number, why):
    def refused(_):
        raise OSError(number, os.strerror(number), "/home/someone/a")

    monkeypatch.setattr(orphans, "begin", refused)
    with pytest.raises(WriteError, match=rf"^a: it cannot be written \({why}\). Nothing was begun. "):
        room.check_room(tmp_path / "a", 1)


def test_amounts():
    assert [room.amount(n) for n in (-5, 0, 12_345, 1_200_000, 940_000_000, 12_300_000_000, 123_400_000_000)] == [
        "0 kB", "0 kB", "12 kB", "1.2 MB", "940 MB", "12.3 GB", "123 GB",
    ]  # fmt: skip
