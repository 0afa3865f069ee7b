"""Every reader of files that strangers make x a table of hostile files: one sentence each, within 5 seconds of this
process and 500 MB, and nothing else happens to the file or its folder.

Memory is asked for where the system can forget its high-water mark (Linux).
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_nibble.checkpoints import header
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.repack import repack
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.image_prompt import load as load_adapter
from comfyui_nibble.lora import peft
from comfyui_nibble.lora.read import read_file
from comfyui_nibble.prompts import domain, record, sets
from comfyui_nibble.reading import picture, textfile
from comfyui_nibble.training import data
from safetensors.torch import save_file

SECONDS, MEMORY = 5.0, 500 * 2**20
F8 = torch.float8_e4m3fn


def safetensors(head: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    head = head.encode() if isinstance(head, str) else head
    return struct.pack("<Q", len(head) if length is None else length) + head + body


def entry(dtype="F32", shape="[1]", start=0, end=4) -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}'


def of(**tensors: str) -> str:
    return "{" + ",".join(f'"{n.replace("__", ".")}":{e}' for n, e in tensors.items()) + "}"


def png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A black picture that is large only once it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + width * depth * (3 if colour == 2 else 1) // 8)
    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gguf(rest: bytes, tensors: int = 0, values: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def config(value: str) -> dict:
    mark = torch.tensor(list(value.encode()), dtype=torch.uint8)
    return {"blocks.0.attn.q.weight": torch.zeros(64, 64, dtype=torch.int8), "blocks.0.attn.q.comfy_quant": mark}


MODEL = "blocks.0.attn.q"
BYTES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x00",
    "cut length": lambda: b"\x01\x02\x03",
    "header of 2^63 bytes": lambda: safetensors("{}", length=2**63),
    "header longer than the file": lambda: safetensors("{}", length=500),
    "header of zeros": lambda: safetensors(bytes(64)),
    "header that is a list": lambda: safetensors("[]"),
    "header that is a number": lambda: safetensors("7"),
    "header not UTF-8": lambda: safetensors(b'{"\xff\xfe":' + entry().encode() + b"}", bytes(4)),
    "nested header": lambda: safetensors('{"a":' * 100_000 + "1" + "}" * 100_000),
    "nested metadata": lambda: safetensors('{"__metadata__":' + "[" * 100_000 + "}"),
    "a million tensors": lambda: safetensors(
        "{" + ",".join(f'"t{i}":{entry("F32", "[0]", 0, 0)}' for i in range(1_000_000)) + "}"
    ),
    "metadata of 30 MB": lambda: safetensors(json.dumps({"__metadata__": {"a": "x" * 30_000_000}})),
    "metadata that is no text": lambda: safetensors('{"__metadata__":{"a":1}}'),
    "negative shape": lambda: safetensors(of(a=entry(shape="[-1]")), bytes(4)),
    "shape that overflows": lambda: safetensors(of(a=entry(shape="[4294967296,4294967296]")), bytes(4)),
    "shape of 2^62 rows of nothing": lambda: safetensors(
        of(**{f"{MODEL}.weight": entry(shape="[4611686018427387904,0]", end=0)})
    ),
    "shape of 1,000 dimensions": lambda: safetensors(of(a=entry(shape="[" + ",".join("1" * 1000) + "]")), bytes(4)),
    "offsets beyond": lambda: safetensors(of(a=entry(start=0, end=2**50)), bytes(4)),
    "offsets backwards": lambda: safetensors(of(a=entry(start=4, end=0)), bytes(4)),
    "offsets over each other": lambda: safetensors(of(a=entry(), b=entry()), bytes(4)),
    "a hole between": lambda: safetensors(of(a=entry(), b=entry(start=8, end=12)), bytes(12)),
    "unknown dtype": lambda: safetensors(of(a=entry("I3")), bytes(4)),
    "names twice": lambda: safetensors(f'{{"a":{entry()},"a":{entry(start=4, end=8)}}}', bytes(8)),
    "names of no letter": lambda: safetensors(f'{{"\\u0000":{entry()},"\\ud800":{entry(start=4, end=8)}}}', bytes(8)),
    "a name of 5 MB": lambda: safetensors(f'{{"{"a" * 5_000_000}.weight":{entry()}}}', bytes(4)),
    "pickle": lambda: b"\x80\x04\x95\x0a\x00\x00\x00cposix\nsystem\n(S'touch hacked'\ntR.",
    "zip": lambda: b"PK\x03\x04" + bytes(60),
    "2^60 values": lambda: gguf(struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**60)),
    "a byte array of 30 MB": lambda: gguf(
        struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 30_000_000) + bytes(30_000_000)
    ),
    "arrays in arrays": lambda: gguf(struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**40)),
    "counts of 2^63": lambda: gguf(b"", 2**63, 2**63),
    "thin picture": lambda: png(60_000, 1),
    "huge picture": lambda: png(13_000, 13_000),
    "picture of 2^31 columns": lambda: png(1, 1).replace(struct.pack(">I", 1), struct.pack(">I", 2**31 - 1), 1),
    "cut picture": lambda: png(64, 64)[:60],
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch hacked) run\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a line of 20 MB": lambda: b"a," * 10_000_000,
    "ten million lines": lambda: b"a\n" * 10_000_000,
    "a field of 2 MB": lambda: b'caption\n"' + b"x" * 2_000_000 + b'"\n',
    "an open quote": lambda: b'caption\n"' + b"x\n" * 100_000,
    "nested JSON": lambda: b'{"caption":' + b"[" * 100_000,
    "an endless number": lambda: b'{"caption":' + b"9" * 100_000 + b"}",
    "NaN": lambda: b'{"caption": NaN, "lora_alpha": NaN, "r": Infinity}',
    "a YAML bomb": lambda: "\n".join(
        ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30))]
    ).encode(),
    "a YAML object": lambda: b'id: !!python/object/apply:os.system ["touch hacked"]\n',
    "YAML nested": lambda: b"[" * 50_000,
    "half of UTF-16": lambda: b"\xff\xfea\x00b",
    "control characters": lambda: bytes(range(256)) * 100,
    "lone surrogates": lambda: b'{"caption": "\\ud800", "id": "\\udfff"}',
}
WHOLE: dict[str, Callable[[Path], object]] = {
    "a mark of 2 MB": lambda p: save_file(config("x" * 2_000_000), p),
    "a nested mark": lambda p: save_file(config("{" * 50_000), p),
    "a mark of numbers": lambda p: save_file(config('{"format": 1e999}'), p),
    "a format of 2^60 parts": lambda p: save_file(
        config('{"format": "nibble_parts", "parts": 1152921504606846976}'), p
    ),
    "weights of no size": lambda p: save_file({f"{MODEL}.weight": torch.zeros(0, 64)}, p),
    "weights of NaN": lambda p: save_file({f"{MODEL}.weight": torch.full((64, 64), torch.nan)}, p),
    "a LoRA of rank 0": lambda p: save_file(
        {
            f"lora_unet_{MODEL}.lora_down.weight": torch.zeros(0, 64),
            f"lora_unet_{MODEL}.lora_up.weight": torch.zeros(64, 0),
        },
        p,
    ),
    "halves that do not fit": lambda p: save_file(
        {f"{MODEL}.lora_down.weight": torch.zeros(4, 64), f"{MODEL}.lora_up.weight": torch.zeros(64, 5)}, p
    ),
    "a LoRA of NaN": lambda p: save_file(
        {f"{MODEL}.lora_down.weight": torch.full((4, 64), torch.nan), f"{MODEL}.lora_up.weight": torch.zeros(64, 4)}, p
    ),
    "fp8 with a scale": lambda p: save_file(
        {f"{MODEL}.weight": torch.zeros(64, 64).to(F8), f"{MODEL}.weight_scale": torch.ones(())}, p
    ),
}
FILES = (*BYTES, *WHOLE)


def _domain(path: Path):
    return domain.load_file(path)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "header": (".safetensors", header.read),
    "model": (".safetensors", load),
    "inspect": (".safetensors", inspect),
    "source": (".safetensors", lambda p: open_source(p).__enter__()),
    "convert": (".safetensors", lambda p: repack(p, p.with_name("out.safetensors"))),
    "GGUF model": (".gguf", load),
    "GGUF inspect": (".gguf", inspect),
    "LoRA": (".safetensors", read_file),
    "adapter": (".safetensors", lambda p: (header.read(p), load_adapter(p))),
    "PEFT config": (".json", lambda p: peft.configs(p.with_name(peft.WEIGHTS), None)),
    "picture": (".png", picture.read),
    "picture, fitted": (".png", lambda p: picture.fitted(p, lambda *_: (512, 512))),
    "captioned picture": (".png", lambda p: (data.examples(p.parent), data.fitted(p, 512))),
    "caption": (".txt", lambda p: textfile.read(p, textfile.MAX_CAPTION_FILE)),
    "record in a picture": (".png", record.read),
    "prompts, text": (".txt", sets.texts),
    "prompts, csv": (".csv", sets.texts),
    "prompts, jsonl": (".jsonl", sets.texts),
    "domain": (".yaml", _domain),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name): the content of a hostile file, made once."""
    folder, done = tmp_path_factory.mktemp("hostile"), {}

    def get(name: str) -> Path:
        if name not in done:
            path = done[name] = folder / str(len(done))
            path.write_bytes(BYTES[name]()) if name in BYTES else WHOLE[name](path)
        return done[name]

    return get


def high_water() -> int | None:
    """The most memory of this process since it was last asked; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


@pytest.mark.parametrize("reader", READERS)
def test_a_hostile_file_is_one_sentence(reader, made, tmp_path, monkeypatch):
    """Some readers take some of these files, and may: what counts is what else happens."""
    monkeypatch.chdir(tmp_path)
    ending, read = READERS[reader]
    path, wrong = tmp_path / f"hostile{ending}", []
    if reader == "PEFT config":
        path = tmp_path / peft.CONFIG
    for name in FILES:
        source = made(name)
        path.unlink(missing_ok=True)
        path.symlink_to(source)
        before, start = (resident() if high_water() is not None else 0), time.process_time()
        try:
            read(path)
            said = "A sentence."
        except ValueError as e:
            said = str(e)
        except Exception as e:  # noqa: BLE001
            said = f"{type(e).__name__}: {e}"
            wrong.append(f"{name}: raised {said[:200]}")
        spent, most = time.process_time() - start, high_water()
        if spent > SECONDS:
            wrong.append(f"{name}: {spent:.1f} s")
        if most is not None and most - before > MEMORY:
            wrong.append(f"{name}: {(most - before) / 2**20:.0f} MB")
        if "\n" in said or len(said) > 2_000 or not said.isprintable() or str(tmp_path) in said:
            wrong.append(f"{name}: {said[:200]!r} ({len(said)} letters)")
        left = {p.name for p in tmp_path.iterdir()} - {path.name, "out.safetensors"}
        if left:
            wrong.append(f"{name}: left {left}")
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
    assert not wrong, "\n".join(wrong)
