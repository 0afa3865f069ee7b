"""Hostile files: whatever comes in, out comes a checkpoint or one CheckpointError, within a second and little memory.

NIBBLE_FUZZ=20000 runs that many inputs; the suite runs 2,000.
"""

import json
import os
import resource
import struct
import time
from functools import lru_cache

import pytest
import torch
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import comfy_quant, nunchaku
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.repack import repack
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.quant import awq, datafree, kernels, nvfp4_lowrank, parts
from comfyui_nibble.quant.weight_only import WeightOnly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from .fixtures import ALONE, DATA, raw

INPUTS = int(os.environ.get("NIBBLE_FUZZ", "2000"))
SHARE = {"layers": 0.6, "bytes": 0.25, "gguf": 0.15}
MEMORY = 512 * 2**20
SECONDS = 1.0
OPTIONS = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
STEMS = (
    "a", "transformer_blocks.0.attn.to_qkv", "transformer_blocks.0.qkv_proj", "transformer_blocks.0.img_mod.1",
    "single_transformer_blocks.0.mlp_fc2", "single_transformer_blocks.0.out_proj", "layers.0.attention.to_qkv",
    "layers.0.feed_forward.net.0.proj", "transformer_blocks.0.cross_attn.q_linear", "transformer_blocks.0.norm1.linear",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_qkv", "double_blocks.0.img_attn.qkv",
)  # fmt: skip
NAMES = ("../../etc/passwd", "/etc/x.weight", "a" * 300, "", ".", "a..weight", "\u0000.weight", "a.weight.absmax",
         "a.qweight", "a.wscales", "a.comfy_quant", "a.parts.0",
         "b.proj_down", "\u202e.bias", "a\nb.weight")  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
          torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.float64)  # fmt: skip
TEXTS = ("{}", "[]", "null", "1e999", '{"format": 3}', '{"format": "svdquant_w4a4", "layout": []}', "{" * 3000,
         '{"layers": 3}', '{"layers": {"a": {"format": "nibble_parts", "parts": 1e9}}}', '{"targets": [null, 3, {}]}',
         '{"layers": {"a": 7}}', '{"quant_method": "nunchaku_lite"}', "\u0000", '{"shape": [2, 64], "blocksize": -1}',
         '{"format": "weight_only", "codec": "q4_k", "out_features": 1e300}', '{"num_attention_heads": "x"}',
         '{"format": "nibble_parts", "parts": 2, "axis": 5}', '{"layers_per_block": 1e9, "down_block_types": 3}',
         '{"_class_name": "UNet2DConditionModel", "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": [],'
         '"layers_per_block": 1000000000}', '{"_class_name": "FluxTransformer2DModel", "num_layers": 99999999999}',
         '{"_class_name": "SD3Transformer2DModel", "num_layers": "many"}')  # fmt: skip
METADATA = ("config", "quantization_config", "_quantization_metadata", "model_class", "nibble", "format")


@lru_cache(maxsize=1)
def good() -> tuple[dict[str, torch.Tensor], ...]:
    """One small sound layer of every form, by the names of its tensors."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(128, 128, generator=g)
    svd, a = datafree.quantize(w, 16, torch.bfloat16, True, 0), awq.quantize(w)
    fp4 = nunchaku.read(raw(DATA / "b_svdq_nvfp4_linear.safetensors"), "f")[ALONE].weight
    q = torch.zeros(2, 32, dtype=torch.uint8)
    nf4 = WeightOnly("nf4", (2, 64), q, torch.ones(2), torch.linspace(-1, 1, 16), 64)
    both = parts.Parts((svd, svd), "columns")
    state = torch.tensor(list(json.dumps({"shape": [2, 64], "blocksize": 64}).encode()), dtype=torch.uint8)
    bnb = {"weight": q.reshape(-1, 1), "weight.absmax": torch.ones(2), "weight.quant_map": torch.ones(16)}
    kinds = [comfy_quant.write("x", x) for x in (svd, a, fp4, nf4, both)]
    kinds += [nunchaku.write("x", x, v2) for x in (svd, fp4, a) for v2 in (False, True)]
    out = [{n[2:]: t for n, t in k.items()} for k in kinds]
    out.append(bnb | {"weight.quant_state.bitsandbytes__nf4": state})
    out.append({"weight": w, "bias": w[0].clone()})
    return tuple(out)


def changed(tensor: torch.Tensor, how: int, dtype: int, size: int) -> torch.Tensor:
    """A tensor with something wrong about it."""
    flat = tensor.reshape(-1)
    if how == 0:
        return flat.view(torch.uint8)[: 64 * size].clone().view(torch.uint8)
    if how == 1:
        return torch.full(tensor.shape, float("nan")) if tensor.dtype.is_floating_point else tensor.flip(0)
    if how == 2:
        return torch.zeros(tensor.shape, dtype=DTYPES[dtype % len(DTYPES)])
    if how == 3:
        return tensor.new_empty((0, size))
    if how == 4:
        return torch.zeros((), dtype=tensor.dtype)
    if how == 5:
        return tensor.unsqueeze(0).repeat(1 + size % 3, *[1] * tensor.dim())
    if how == 6:
        text = TEXTS[size % len(TEXTS)].encode()
        return torch.tensor(list(text), dtype=torch.uint8)
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return torch.full(tensor.shape, torch.inf, dtype=tensor.dtype)
    return tensor.t().contiguous() if tensor.dim() == 2 else flat[: max(1, size)].clone()


CHANGE = st.tuples(st.integers(0, 40), st.integers(0, 10), st.integers(0, 20), st.integers(0, 40))
LAYER = st.tuples(st.integers(0, 12), st.integers(0, len(STEMS)))  # the last stem is none


class File(bytes):
    """Bytes that print as their header only."""

    def __repr__(self):
        return f"File of {len(self)} bytes: {bytes(self[8:800])!r}"


@st.composite
def models(draw) -> bytes:
    """A safetensors file of a few layers with a few things wrong."""
    tensors = {}
    for kind, stem in draw(st.lists(LAYER, min_size=1, max_size=4)):
        layer = good()[kind % len(good())]
        tensors |= {(f"{STEMS[stem]}.{n}" if stem < len(STEMS) else n): t for n, t in layer.items()}
    for which, how, dtype, size in draw(st.lists(CHANGE, max_size=4)):
        name = list(tensors)[which % len(tensors)] if tensors else "a.qweight"
        value = tensors.get(name, torch.zeros(2))
        if how == 8:
            tensors.pop(name, None)
        elif how == 9:
            tensors[NAMES[size % len(NAMES)] or "x"] = value
        elif how == 10:
            stem = STEMS[size % len(STEMS)]
            tensors[f"{stem}.{name.rpartition('.')[2]}"] = value
        else:
            tensors[name] = changed(value, how, dtype, size)
    info = {METADATA[a % len(METADATA)]: TEXTS[b % len(TEXTS)] for a, b in draw(st.lists(st.tuples(
        st.integers(0, 5), st.integers(0, 40)), max_size=2))}  # fmt: skip
    return File(save({n: t.clone().contiguous() for n, t in tensors.items()}, info or None))


@st.composite
def broken_bytes(draw) -> bytes:
    """A sound file whose bytes were changed: cut, flipped, or with another header."""
    kind = draw(st.integers(0, 20))
    layer = good()[kind % len(good())]
    data = bytearray(save({f"a.{n}": t.clone() for n, t in layer.items()}))
    size = struct.unpack("<Q", data[:8])[0]
    what = draw(st.integers(0, 5))
    if what == 0:
        return bytes(data[: draw(st.integers(0, len(data)))])
    if what == 1:
        data[:8] = struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])))
        return bytes(data)
    if what == 2:
        for at, value in draw(
            st.lists(st.tuples(st.integers(0, 8 + size), st.integers(0, 255)), min_size=1, max_size=8)
        ):
            data[min(at, len(data) - 1)] = value
        return bytes(data)
    header = json.loads(data[8 : 8 + size])
    name = draw(st.sampled_from(list(header)))
    if what == 3:
        header[name] = draw(
            st.sampled_from([None, [], {}, {"dtype": "I8"}, {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}])
        )
    elif isinstance(header[name], dict) and "shape" in header[name]:
        big = draw(st.sampled_from([[2**40, 2**40], [-1], [2**63], [0], [1] * 300, [2**62, 4], []]))
        header[name] |= {"shape": big} if what == 4 else {"data_offsets": big[:2] or [9, 3]}
    text = json.dumps(header)
    if draw(st.booleans()):
        text = text[:-1] + "," + text[1:]  # every key twice
    return struct.pack("<Q", len(text)) + text.encode() + bytes(data[8 + size :])


@lru_cache(maxsize=1)
def sound_gguf(folder: str) -> bytes:
    from .fixtures import blocks
    from .test_gguf import written

    path = written(f"{folder}/sound.gguf", {"double_blocks.0.img_attn.qkv.weight": ("q4_k", blocks("q4_k", 4, 256)),
                                            "b.weight": ("q8_0", blocks("q8_0", 2, 64))})  # fmt: skip
    with open(path, "rb") as f:
        return f.read()


def survives(path) -> None:
    """Loads, inspects, opens as a source and converts ``path``: anything but CheckpointError fails the test, and a slow
    answer does too.
    """
    out = path.with_name("out.safetensors")
    for call in (load, inspect, open_source, lambda p: repack(p, out)):
        out.unlink(missing_ok=True)
        start = time.process_time()
        try:
            found = call(path)
            if call is load:
                for layer in found.layers.values():
                    kernels.wrap(layer.weight)
        except CheckpointError as e:
            text = str(e)
            assert len(text) < 2000 and str(path.parent) not in text, text
        assert time.process_time() - start < SECONDS


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def many(kind: str):
    return settings(max_examples=max(1, round(INPUTS * SHARE[kind])), **OPTIONS)


class TestFuzz:
    def test_layers_with_something_wrong(self, tmp_path):
        @many("layers")
        @given(models())
        def run(data):
            (tmp_path / "x.safetensors").write_bytes(data)
            survives(tmp_path / "x.safetensors")

        run()

    def test_changed_bytes(self, tmp_path):
        @many("bytes")
        @given(broken_bytes())
        def run(data):
            (tmp_path / "x.safetensors").write_bytes(data)
            survives(tmp_path / "x.safetensors")

        run()

    def test_changed_gguf_bytes(self, tmp_path):
        pytest.importorskip("gguf")
        sound = sound_gguf(str(tmp_path))
        edits = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)

        @many("gguf")
        @given(edits, st.integers(0, len(sound)), st.integers(0, 8), st.integers(0, 2**64 - 1))
        def run(changes, cut, what, count):
            data = bytearray(sound)
            for at, value in changes:
                data[at % len(data)] = value
            if what == 0:
                data = data[:cut]
            elif what in (1, 2) and len(data) > 24:
                data[8 * what : 8 * what + 8] = struct.pack("<Q", count)
            (tmp_path / "x.gguf").write_bytes(bytes(data))
            survives(tmp_path / "x.gguf")

        run()


def test_the_sound_layers_are_sound(tmp_path):
    """The fuzz would be worthless if nothing it changes could be read in the first place."""
    for i, layer in enumerate(good()):
        (tmp_path / f"{i}.safetensors").write_bytes(save({f"a.{n}": t.clone() for n, t in layer.items()}))
        found = load(tmp_path / f"{i}.safetensors")
        assert len(found.layers) == (i < len(good()) - 1), i
    assert isinstance(load(tmp_path / "2.safetensors").layers["a"].weight, nvfp4_lowrank.NVFP4LowRankWeight)
