"""One kind of error for every bad file: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

BAD = (ValueError, RuntimeError, IndexError, AttributeError, TypeError, KeyError)  # what broken contents lead to


class CheckpointError(ValueError):
    """``what`` is wrong in ``file`` (and ``layer``); ``remedy`` is what the reader can do about it."""

    def __init__(self, file: str, what: str, remedy: str, layer: str = ""):
        where = f"{file}, layer {layer}" if layer else file
        super().__init__(f"{where}: {what}. {remedy}")
        self.file, self.layer = file, layer


@contextmanager
def naming(file: str, remedy: str, layer: str, kinds: tuple[type[Exception], ...] = BAD) -> Iterator[None]:
    """Inside it, an error of one of ``kinds`` becomes a CheckpointError that names the layer."""
    try:
        yield
    except CheckpointError:
        raise
    except kinds as e:
        raise CheckpointError(file, str(e), remedy, layer) from e
