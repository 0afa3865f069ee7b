"""GGUF against the library's own code: values equal, codes kept, every broken file one sentence."""

import struct
import sys

import numpy as np
import pytest
import torch
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import gguf
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.quant import gguf_blocks

from .fixtures import blocks

library = pytest.importorskip("gguf")


@pytest.mark.parametrize("codec", gguf_blocks.BLOCKS)
def test_gguf_values_equal_the_librarys(codec):
    data, row = blocks(codec, 6, 512), gguf_blocks.BLOCKS[codec]
    want = library.quants.dequantize(data, library.GGMLQuantizationType(row.number))
    assert library.GGML_QUANT_SIZES[library.GGMLQuantizationType(row.number)] == (row.weights, row.nbytes)
    assert torch.equal(gguf_blocks.decode(codec, torch.from_numpy(data)), torch.from_numpy(want))


def written(path, tensors: dict, arch: str = "flux"):
    """A GGUF file of {name: (codec or None, array)}."""
    writer = library.GGUFWriter(path, arch)
    for name, (codec, data) in tensors.items():
        kind = None if codec is None else library.GGMLQuantizationType(gguf_blocks.BLOCKS[codec].number)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return written(tmp_path / "flux.gguf", {
        "double_blocks.0.img_attn.qkv.weight": ("q4_k", blocks("q4_k", 768, 256)),
        "double_blocks.0.img_attn.qkv.bias": (None, np.arange(768, dtype=np.float32)),
        "single_blocks.0.linear1.weight": ("q8_0", blocks("q8_0", 64, 256)),
        "img_in.weight": (None, np.ones((256, 64), np.float16)),
        "pos": ("q4_0", blocks("q4_0", 4, 64)),
    })  # fmt: skip


class TestGGUF:
    def test_codes_stay_and_floats_pass(self, gguf_file):
        found = load(gguf_file)
        w = found.layers["double_blocks.0.img_attn.qkv"].weight
        assert (w.codec, w.shape) == ("q4_k", (768, 256))
        assert torch.equal(w.qdata, torch.from_numpy(blocks("q4_k", 768, 256)))
        assert found.layers.keys() == {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"}
        assert found.dense["pos"].shape == (4, 64) and found.dense["img_in.weight"].dtype == torch.float16
        assert found.dense["double_blocks.0.img_attn.qkv.bias"].tolist() == list(range(768))

    def test_inspect_names_family_type_and_what_to_expect(self, gguf_file):
        found = inspect(gguf_file)
        assert found.family == "FLUX.1" and "architecture flux" in found.maker
        assert {r.scheme for r in found.quantized} == {"q4_k", "q8_0"}
        assert any("4-bit weights save memory, not time" in line or "any" in line for line in found.advice)
        assert found.totals()["q4_k"]["bits"] == 4.5

    def test_a_text_encoder_is_sent_elsewhere(self, tmp_path):
        path = written(tmp_path / "t5.gguf", {"enc.blk.0.attn_q.weight": ("q4_0", blocks("q4_0", 8, 64))}, "t5")
        with pytest.raises(CheckpointError, match=r"t5\.gguf: it is a text encoder \(t5\)\. Load it with"):
            load(path)

    def test_an_unknown_type_is_named(self, tmp_path):
        writer = library.GGUFWriter(tmp_path / "iq.gguf", "flux")
        writer.add_tensor("a.weight", np.zeros((4, 136), np.uint8), raw_dtype=library.GGMLQuantizationType.IQ4_XS)
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
        with pytest.raises(
            CheckpointError, match=r"layer a\.weight: its type IQ4_XS is unknown to this version, which reads"
        ):
            load(tmp_path / "iq.gguf")

    @pytest.mark.parametrize("cut", [3, 20, 60, 400, 5000])
    def test_a_cut_file_is_one_sentence(self, cut, gguf_file):
        gguf_file.write_bytes(gguf_file.read_bytes()[:cut])
        with pytest.raises(CheckpointError, match=r"flux\.gguf: (not a|its header)"):
            load(gguf_file)

    def test_without_the_library_the_sentence_says_how_to_get_it(self, gguf_file, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(
            CheckpointError, match=r"need the library gguf, which is not installed\. Install .* pip install gguf"
        ):
            gguf.open_file(gguf_file)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(values: list[bytes], tensors: list[bytes] = (), data: bytes = b"", version: int = 3) -> bytes:
    """The bytes of a GGUF file: magic, counts, values, tensors, padding, data."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(inner: int, length: int, rest: bytes = b"") -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, inner, length) + rest


HOSTILE = {
    "an array of 2^60 values": (header([array(0, 2**60)]), "arrays of 1152921504606846976 values"),
    "an array as long as the file": (header([array(0, 30 * 2**20, bytes(30 * 2**20))]), "arrays of 31457280 values"),
    "many arrays": (header([array(0, 2**10, bytes(2**10))] * 300), "arrays of 200704 values"),
    "nested arrays": (header([array(9, 1, struct.pack("<IQ", 0, 2**60))]), "a is an array of arrays"),
    "an array of nothing known": (header([array(77, 1, bytes(9))]), "a is an array of type 77"),
    "a name without end": (header([struct.pack("<Q", 2**62) + b"a"]), "a text of 4611686018427387904 bytes"),
    "a text without end": (header([text(b"a") + struct.pack("<IQ", 8, 2**40)]), "a text of 1099511627776 bytes"),
    "a text that is none": (header([text(b"\xff\xfe\xff") + struct.pack("<I", 4)]), "can't decode"),
    "counts of nothing": (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40), "lists 1099511627776 tensors"),
    "a million values": (header([text(b"a") + struct.pack("<IB", 0, 1)] * 10**6), "1000000 values"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "an alignment of 3": (header([text(b"general.alignment") + struct.pack("<II", 4, 3)]), "its alignment is 3"),
    "a tensor without end": (header([], [tensor(b"w", [2**40, 2**40])], bytes(64)), "w ends behind it"),
    "a product that overflows": (header([], [tensor(b"w", [2**32, 2**32])], bytes(64)), "w ends behind it"),
    "a tensor far away": (header([], [tensor(b"w", [4, 4], 0, 2**60)], bytes(64)), "w ends behind it"),
    "tensors over each other": (
        header([], [tensor(b"w%d" % i, [64, 64]) for i in range(3)], bytes(4 * 64 * 64)),
        "over each other",
    ),
    "a tensor of 2^31 dimensions": (header([], [text(b"w") + struct.pack("<I", 2**31)], bytes(64)), "dimensions"),
    "an unknown type": (header([], [tensor(b"w", [4, 4], 99)], bytes(64)), "type 99"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("read", [load, inspect])
def test_a_hostile_header_is_one_sentence_before_the_library_reads(case, read, tmp_path, monkeypatch):
    data, words = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    monkeypatch.setattr(library, "GGUFReader", None)  # it believes every count
    with pytest.raises(CheckpointError, match=words) as e:
        read(path)
    assert len(str(e.value)) < 400 and str(e.value).startswith("hostile.gguf: ")


def test_a_shape_that_is_not_the_tensors_is_named(tmp_path):
    writer = library.GGUFWriter(tmp_path / "odd.gguf", "flux")
    writer.add_array("comfy.gguf.orig_shape.a.weight", [4, 64])
    kind = library.GGMLQuantizationType(gguf_blocks.BLOCKS["q4_0"].number)
    writer.add_tensor("a.weight", blocks("q4_0", 8, 64), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(CheckpointError, match=r"layer a\.weight: its shape \(4, 64\) is not that of its 512 values"):
        load(tmp_path / "odd.gguf")
