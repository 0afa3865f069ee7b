"""Every node with values that must not reach it, called as ComfyUI would call it; prints what was said.

The nodes' own code is replaced by a line that notes what came through, before the pack puts its checks around it.
"""

import asyncio
import inspect
import io as streams
import json
import logging
import math
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import pack, root

sys.path.insert(0, sys.path[1])
import comfy.model_management
import numpy as np
import torch
from comfy_api.latest import io

extension = asyncio.run(pack.comfy_entrypoint())
nodes = sys.modules["nibble_pack.nodes"]
ANY = object()
reached = []


def note(cls, **given):
    reached.append(given)
    return io.NodeOutput()


async def note_later(cls, **given):
    return note(cls, **given)


asynchronous = {}
for topic in nodes.TOPICS:
    for node in topic.NODES:
        asynchronous[node.__name__] = inspect.iscoroutinefunction(node.execute)
        node.execute = classmethod(note_later if asynchronous[node.__name__] else note)
kinds = {node.__name__: node for node in asyncio.run(extension.get_node_list())}
schemas = {name: node.GET_SCHEMA() for name, node in kinds.items()}


def call(name: str, given: dict):
    """(error or "", what reached the node's code or None), through the copy of the class that ComfyUI makes."""
    reached.clear()
    node = kinds[name].PREPARE_CLASS_CLONE(None)
    try:
        out = node.execute(**given)
        if inspect.iscoroutine(out):
            asyncio.run(out)
    except Exception as e:  # noqa: BLE001
        return f"{type(e).__name__}: {e}", (reached[0] if reached else None)
    return "", (reached[0] if reached else None)


def flat(schema):
    """(key of the argument, key inside of a group or None, input) of every input, those inside of dynamic ones too."""
    for one in schema.inputs:
        if isinstance(one, io.Autogrow.Input):
            yield one.id, one.template.names[0], one.template.input
        elif isinstance(one, io.DynamicCombo.Input):
            for option in one.options:
                for inner in option.inputs:
                    yield one.id, (option.key, inner.id), inner
        else:
            yield one.id, None, one


def given_with(key, inner, value) -> dict:
    if inner is None:
        return {key: value}
    return {key: {inner: value}} if isinstance(inner, str) else {key: {key: inner[0], inner[1]: value}}


found = {"numbers": [], "refused": [], "accepted": [], "choices": [], "types": [], "texts": []}
for name, schema in schemas.items():
    for key, inner, one in flat(schema):
        kind = one.get_io_type()
        if kind in ("INT", "FLOAT"):
            found["numbers"].append([name, one.id])
            bad = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "word": "many", "object": ANY}
            bad |= {"numpy nan": np.float32("nan"), "tensor nan": torch.tensor(math.nan), "pair": torch.ones(2)}
            if one.max is not None:
                bad["above"] = one.max + 1 if kind == "INT" else np.nextafter(one.max, np.inf).item()
            if one.min is not None:
                bad["below"] = one.min - 1 if kind == "INT" else np.nextafter(one.min, -np.inf).item()
            if kind == "INT":
                bad["half"] = one.default + 0.5
            if not one.optional:
                bad["nothing"] = None
            for what, value in bad.items():
                said, came = call(name, given_with(key, inner, value))
                found["refused"].append([name, one.id, what, said, came is not None])
            bounds = (b for b in (one.min, one.max, one.default) if b is not None)
            for value in bounds:
                ways = (
                    [value, np.float64(value), str(value)]
                    if kind == "FLOAT"
                    else [value, str(value), float(one.default)]
                )
                for way in ways:
                    said, came = call(name, given_with(key, inner, way))
                    right = int if kind == "INT" else float
                    wanted = right(one.default if way == float(one.default) and kind == "INT" else value)
                    same = came is not None and came[key] == wanted and type(came[key]) is right
                    found["accepted"].append([name, one.id, repr(way), said, same])
        elif kind == "COMBO":
            for value in ("caf\udce9", "x" * 100_000, 5, None, [1], float("nan")):
                if not (value is None and one.optional):
                    said, came = call(name, given_with(key, inner, value))
                    found["choices"].append([name, one.id, said, came is not None])
            for value in one.options[:1]:
                said, came = call(name, given_with(key, inner, value))
                assert came == {key: value}, (name, one.id, said)
        elif kind == "STRING":
            for value in ("caf\udce9", "a \ud83d b", ANY, {"a": 1}, *(() if one.optional else (None,))):
                said, came = call(name, given_with(key, inner, value))
                found["texts"].append([name, one.id, said, came is not None])
            said, came = call(name, {key: "two\nlines, été 😀"})
            assert came == {key: "two\nlines, été 😀"}, said
            said, came = call(name, {key: 4})
            assert came == {key: "4"}, said
        elif kind == "BOOLEAN":
            for value in ("false", ANY, math.nan, None):
                said, came = call(name, given_with(key, inner, value))
                found["types"].append([name, one.id, kind, said, came is not None])
            for value in (True, 0, np.bool_(True)):
                said, came = call(name, {key: value})
                assert came == {key: bool(value)} and type(came[key]) is bool, said
        elif kind != "*":
            bad = [ANY, "text", 5, *(() if one.optional or inner else (None,))]
            for value in bad:
                said, came = call(name, given_with(key, inner, value))
                found["types"].append([name, one.id, kind, said, came is not None])
        if one.optional and inner is None:
            said, came = call(name, {key: None})
            assert came == {}, (name, one.id, said)


# Values of the right types that other packs make in their own ways.
class Likeness:
    model = tokenize = decode = encode_image = clone = path = strength_model = image_proj = layers = 1


GOOD = {
    "LATENT": {"samples": torch.zeros(1, 4, 8, 8)}, "IMAGE": torch.zeros(2, 8, 8, 3), "MASK": torch.zeros(8, 8),
    "CONDITIONING": [[torch.zeros(1, 77, 8), {}]],
}  # fmt: skip
found["good"] = []
for name, schema in schemas.items():
    for key, inner, one in flat(schema):
        if one.get_io_type() not in ("INT", "FLOAT", "COMBO", "STRING", "BOOLEAN"):
            said, came = call(name, given_with(key, inner, GOOD.get(one.get_io_type(), Likeness())))
            found["good"].append([name, one.id, said, came is not None])

found["asynchronous"] = {n: inspect.iscoroutinefunction(kinds[n].execute) == was for n, was in asynchronous.items()}
found["validators"] = [n for n, kind in kinds.items() if "validate_inputs" in vars(kind)]

# Fingerprints: of every node that has one, for names that exist and names of strangers.
HOSTILE = ["", "none", "caf\udce9.safetensors", "a\0b.yaml", "x" * 300_000, "input/../../etc", "user/caf\udce9",
           "diffusion_models/caf\udce9.gguf", "the newest run", "domain: nothing@9", 5, None]  # fmt: skip
found["fingerprints"] = []
for name, kind in kinds.items():
    if "fingerprint_inputs" in vars(kind):
        widgets = [i.id for i in schemas[name].inputs if isinstance(i, io.WidgetInput)]
        for value in HOSTILE:
            said = kind.fingerprint_inputs(**dict.fromkeys(widgets, value))
            nan = isinstance(said, float) and said != said
            found["fingerprints"].append([name, nan or (isinstance(said, str) and 0 < len(said) <= 64), str(said)])

# What a node returns and raises.
SECRET = str(root)


class Noisy(io.ComfyNode):
    what = None

    @classmethod
    def define_schema(cls):
        outputs = [
            io.String.Output("text"),
            io.String.Output("texts", is_output_list=True),
            io.Conditioning.Output("c"),
        ]
        return io.Schema(node_id="Noisy", category="x", inputs=[], outputs=outputs, is_output_node=True)

    @classmethod
    def execute(cls):
        if isinstance(cls.what, BaseException):
            raise cls.what
        return cls.what


checked = sys.modules["nibble_pack.nodes.checked"].checked
assert checked(checked(Noisy)) is Noisy
conditioning = [["caf\udce9", {}]]
Noisy.what = io.NodeOutput(
    "caf\udce9\n", ["a", "\ud800"], conditioning, ui={"text": ["caf\udce9"], "n": [{"é\udce9": 1}]}
)
out = Noisy.execute()
found["out"] = [out.args[0], out.args[1], out.args[2] is conditioning, out.ui]


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(first, second)

    def __str__(self):
        return "odd caf\udce9"


def chained(kind, text, cause):
    try:
        try:
            raise cause
        except type(cause) as e:
            raise kind(text) from e
    except kind as e:
        return e


def during(text, context):
    try:
        try:
            raise context
        except type(context):
            raise ValueError(text)  # noqa: B904
    except ValueError as e:
        return e


noted = ValueError("fine")
noted.__notes__ = ["caf\udce9"]
circle, other = ValueError("circle caf\udce9"), ValueError("other caf\udce9")
circle.__cause__, other.__cause__ = other, circle
long_chain = ValueError("caf\udce9 0")
for i in range(1, 3000):
    long_chain = chained(ValueError, f"caf\udce9 {i}", long_chain)


class Huge(comfy.model_management.OOM_EXCEPTION):
    pass


raised = {
    "surrogate": ValueError("caf\udce9.png: bad"),
    "lines": ValueError("one\n\ttwo\x1b[31m"),
    "long": ValueError("begin " + "x" * 1_000_116 + " end"),
    "cause": chained(ValueError, "fine", ValueError("caf\udce9")),
    "causes": chained(ValueError, "fine", chained(TypeError, "caf\udce9", KeyError("\ud800"))),
    "context": during("fine", OSError("caf\udce9")),
    "odd cause": chained(ValueError, "fine", Odd(1, 2)),
    "odd": Odd(1, 2),
    "key": KeyError("caf\udce9"),
    "empty": AssertionError(),
    "note": noted,
    "circle": circle,
    "long chain": long_chain,
    "file": FileNotFoundError(2, "No such file or directory", "/some where/else/caf\udce9.png"),
    "two files": OSError(18, "Invalid cross-device link", "/a b/c d/one.bin", None, "/e f/g/two.bin"),
    "too long": OSError(36, "File name too long", SECRET + "/" + "y" * 5000),
    "paths": RuntimeError(f"cannot open {SECRET}/models/a.bin, /opt/secret/b.bin or C:\\Users\\me\\c.bin, see "
                          "https://a.b/c/d and input/sub/e.png"),
    "encode": chained(ValueError, "fine", UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed")),
    "memory": Huge("CUDA out of memory.\nTried to allocate caf\udce9"),
    "syntax": SyntaxError("invalid", ("caf\udce9.py", 1, 1, "caf\udce9")),
}  # fmt: skip
if sys.version_info >= (3, 11):
    raised["group"] = ExceptionGroup("caf\udce9", [ValueError("caf\udce9")])  # noqa: F821
found["raised"] = {}
for name, e in raised.items():
    Noisy.what = e
    try:
        Noisy.execute()
    except Exception as told:  # noqa: BLE001
        printed = traceback.format_exc()
        stream = streams.TextIOWrapper(streams.BytesIO(), encoding="utf-8")
        try:
            stream.write(printed)
            writable = True
        except UnicodeEncodeError:
            writable = False
        found["raised"][name] = {
            "type": type(told).__name__, "text": str(told), "writable": writable, "printed": printed[-3000:],
            "oom": comfy.model_management.is_oom(told), "where": "in execute" in printed,
        }  # fmt: skip
Noisy.what = comfy.model_management.InterruptProcessingException()
try:
    Noisy.execute()
except BaseException as e:  # noqa: BLE001
    found["interrupt"] = e is Noisy.what

# Log lines of every module of the pack, through a stream like ComfyUI's.
logs = sys.modules["nibble_pack.nodes.logs"]
asyncio.run(extension.on_load())
asyncio.run(extension.on_load())
raw = streams.BytesIO()
handler = logging.StreamHandler(streams.TextIOWrapper(raw, encoding="utf-8", line_buffering=True))
logging.getLogger().addHandler(handler)
logging.raiseExceptions = True
for name in ("nibble_pack.nodes.bridge.profiling", "nibble_pack.training.loop", "nibble_pack.not.yet.imported"):
    try:
        raise ValueError("caf\udce9 " + SECRET + "/x.png")
    except ValueError as e:
        logging.getLogger(name).warning("%s: %s\n%s", "caf\udce9", e, "z" * 10_000)
logging.getLogger("nibble_pack.x").error("with trace", exc_info=ValueError("caf\udce9"))
found["log"] = raw.getvalue().decode()
found["secret"] = SECRET
print(json.dumps(found))
