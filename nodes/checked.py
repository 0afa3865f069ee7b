"""The one place that everything goes through on its way into a node and out of it; `NibbleExtension` puts every node
behind it.

in      values are held against the schema (inputs.py); what does not fit never reaches the node's own code
out     texts can be written to any stream and file
errors  every Exception says one line, without paths of this machine (errors.py); an interrupt is no Exception
fingerprint_inputs  a short hash and no exception: ComfyUI writes it into every saved picture, and an exception of it
        is logged as it is
"""

from __future__ import annotations

import functools
import hashlib
import inspect

from comfy_api.latest import io

from ..reading.names import encodable
from . import errors, inputs

LENGTH = 16  # hexadecimal digits of a fingerprint


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """``node`` itself, its methods put behind the checks once. ComfyUI's copies of the class have them, too."""
    if "_nibble_checked" not in vars(node):
        node._nibble_checked = True
        node.execute = classmethod(_execute(node.execute.__func__))
        if "fingerprint_inputs" in vars(node):
            node.fingerprint_inputs = classmethod(_fingerprint(node.fingerprint_inputs.__func__))
    return node


def _execute(body):
    """A node's ``execute`` between the checks. ComfyUI asks whether it is a coroutine function."""
    if inspect.iscoroutinefunction(body):

        @functools.wraps(body)
        async def execute(cls, **given):
            with _Telling():
                return _out(cls, await body(cls, **_in(cls, given)))
    else:

        @functools.wraps(body)
        def execute(cls, **given):
            with _Telling():
                return _out(cls, body(cls, **_in(cls, given)))

    return execute


class _Telling:
    """What is raised inside is raised as `errors.safe` makes it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, e, traceback) -> None:
        if not isinstance(e, Exception):
            return
        error = errors.safe(e)
        if error is not e:
            try:
                raise error from error.__cause__
            finally:
                del error  # it holds this frame, and all frames' tensors with it


def _in(cls: type[io.ComfyNode], given: dict) -> dict:
    return inputs.checked(cls.SCHEMA or cls.define_schema(), given, cls.define_schema)


def _out(cls: type[io.ComfyNode], out: io.NodeOutput) -> io.NodeOutput:
    texts = {i for i, kind in enumerate((cls.SCHEMA or cls.define_schema()).outputs) if kind.io_type == "STRING"}
    out.args = tuple(_encodable(v) if i in texts else v for i, v in enumerate(out.args))
    if isinstance(out.ui, dict):
        out.ui = _encodable(out.ui)
    return out


def _encodable(value):
    """``value`` with every text in it made encodable; for lists and dicts of a node's texts."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return {k: _encodable(v) for k, v in value.items()} if isinstance(value, dict) else value


def _fingerprint(body):
    """A hash of what a node's ``fingerprint_inputs`` says; NaN, which means run it, where it cannot say."""

    @functools.wraps(body)
    def fingerprint_inputs(cls, **given):
        try:
            said = body(cls, **given)
        except Exception:  # noqa: BLE001 (the node runs and says in its own words what is wrong)
            return float("nan")
        if said != said:
            return said
        return hashlib.sha256(ascii(said).encode()).hexdigest()[:LENGTH]

    return fingerprint_inputs
