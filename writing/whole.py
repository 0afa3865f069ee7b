"""Every file that this pack writes is whole or not there, and what stops its writing is one sentence.

A file is written under a temporary name beside its own (see orphans.py), given to the disk, and moved into place. When
anything goes wrong, the temporary one is removed and a file that was there before stays as it was.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..reading.names import shown
from . import orphans

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", -1))
UNSYNCED = (errno.EINVAL, getattr(errno, "ENOTSUP", -1), errno.ENOSYS)  # file systems that cannot give files to a disk
IN_USE = 32  # Windows: another program has the file open
REASONS = {
    errno.ENOSPC: "the disk is full",
    getattr(errno, "EDQUOT", -1): "your share of the disk is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the disk takes no file of this size",
    errno.EEXIST: "there is a file of this name already",
    errno.ENOTDIR: "there is a file where its folder should be",
    errno.EISDIR: "there is a folder of this name",
}


class WriteError(ValueError):
    """A file cannot be written; the text names it, says why and what to do. ``errno``: the system's, or None."""

    def __init__(self, name: str, why: str, remedy: str, errno: int | None = None):
        super().__init__(f"{shown(name)}: {why}. {remedy}")
        self.name, self.why, self.remedy, self.errno = name, why, remedy, errno

    def saying(self, more: str) -> WriteError:
        """The same with the sentence ``more`` before what to do."""
        return type(self)(self.name, self.why, f"{more} {self.remedy}", self.errno)

    @classmethod
    def of(cls, error: OSError, name: str, more: str = "") -> WriteError:
        """The sentence of an ``error`` of the system about the file ``name``; ``more`` comes before what to do."""
        remedy = "Free some space, or choose another folder" if error.errno in FULL else "Choose another name or folder"
        return cls(name, f"it cannot be written ({reason(error)})", f"{more} {remedy}".strip(), error.errno)


def reason(error: OSError) -> str:
    """What the system says, without the path that it adds."""
    if getattr(error, "winerror", None) == IN_USE:
        return "another program has it open"
    return REASONS.get(error.errno) or error.strerror or type(error).__name__


@contextmanager
def named(name: str) -> Iterator[None]:
    """What the system refuses within the block becomes one sentence about ``name``."""
    try:
        yield
    except OSError as e:
        raise WriteError.of(e, name) from e


@contextmanager
def whole(path: Path, overwrite: bool = True, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write the bytes of ``path`` to. They are at ``path`` when the block has ended.

    ``durable``: given to the disk first, so that not even a power cut leaves half of it. Raises WriteError.
    """
    part = None
    try:
        _make(path.parent)
        orphans.sweep(path.parent)
        part, file = orphans.begin(path)
        with file:
            yield file
            file.flush()
            if durable:
                _give_to_disk(file)
            if not overwrite and path.exists():
                raise FileExistsError(errno.EEXIST, "exists")
            if os.name != "nt":
                os.replace(part, path)  # while the lock is held
        if os.name == "nt":
            os.replace(part, path)  # an open file cannot be moved there
    except OSError as e:
        raise WriteError.of(e, path.name) from e
    finally:
        if part is not None:
            orphans.end(part)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder") from e


def _give_to_disk(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as e:
        if e.errno not in UNSYNCED:
            raise


def data(path: Path, content: bytes) -> None:
    """Writes a file of bytes."""
    with whole(path) as f:
        f.write(content)


def text(path: Path, content: str) -> None:
    """Writes a text file: UTF-8, lines ending with a newline character alone."""
    data(path, content.encode("utf-8"))


def picture(path: Path, image, **options) -> None:
    """Writes a PIL image in the format of ``path``'s ending; ``options``: of its encoder."""
    from PIL import Image

    Image.init()
    encoded = io.BytesIO()  # Pillow writes past Python's file, and then cannot say that the disk is full
    image.save(encoded, Image.EXTENSION[path.suffix.lower()], **options)
    data(path, encoded.getvalue())


def remove(path: Path) -> None:
    """Deletes a file if it is there and can be."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
