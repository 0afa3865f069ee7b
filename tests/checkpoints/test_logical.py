"""N, K and bits of a layer from its own tensors, one-layer files, and what is said of files that are not whole."""

import inspect as python
import json

import pytest
import torch
from comfy_kitchen.tensor.w4a8_int8 import quantize_w4a8_int8_weight
from comfyui_nibble.checkpoints import forms, header
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import comfy_quant, core_quant, nunchaku
from comfyui_nibble.checkpoints.formats.nunchaku import logical_shapes
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.repack import repack
from comfyui_nibble.quant import awq, core_formats, datafree, machine
from comfyui_nibble.quant.parts import Parts
from comfyui_nibble.quant.weight_only import WeightOnly
from safetensors.torch import load_file, save_file

from .fixtures import DATA, raw

N, K = 136, 256  # N is no multiple of 16, which pads it in nvfp4
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def w4a8(bits: int, group: int = 16) -> dict:
    """A layer as kitchen's own quantizer packs it, with that many bits."""
    if bits != 4 and "bits" not in python.signature(quantize_w4a8_int8_weight).parameters:
        pytest.skip("this comfy-kitchen packs 4 bits only")
    more = {} if bits == 4 else {"bits": bits}
    q, rel, channel, _, codebook = quantize_w4a8_int8_weight(WEIGHT.bfloat16(), group_size=group, **more)
    out = {"weight": q, "weight_s_rel": rel, "weight_s_channel": channel}
    return out if codebook is None else out | {"weight_codebook": codebook}


def parts(tensors: dict) -> tuple[dict, dict]:
    """({name: tensor} without its entry, the entry)."""
    found = {n.removeprefix("x."): t for n, t in tensors.items()}
    return found, json.loads(bytes(found.pop("comfy_quant").tolist()))


def layer(kind: str) -> tuple[dict, dict, float]:
    """(tensors, entry, bits per weight at least) of an (N, K) layer."""
    if kind.startswith("asym "):
        bits, group = (int(x) for x in kind.split()[1:3])
        entry = {"format": "asym_w4a8_int8", "group_size": group}
        if "params" in kind:
            entry = {"format": "asym_w4a8_int8", "params": {"group_size": group}}
        return w4a8(bits, group), entry if "default" not in kind else {"format": "asym_w4a8_int8"}, bits
    if kind in core_formats.FORMATS:
        q = core_formats.quantize(WEIGHT, kind, torch.bfloat16)
        return *parts(core_quant.write("x", q)), core_formats.FORMATS[kind].bits
    if kind == "weight_only":
        w = WeightOnly("nf4", (N, K), torch.zeros(N, K // 2).byte(), torch.ones(N * K // 64), torch.ones(16), 64)
        return *parts(comfy_quant.write("x", w)), 4
    if kind.startswith("float8"):
        return {"weight": WEIGHT.to(torch.float8_e4m3fn), "weight_scale": torch.ones(())}, {"format": kind}, 8
    if kind == "mxfp8":
        scale = torch.zeros(256, 8, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        return {"weight": WEIGHT.to(torch.float8_e4m3fn), "weight_scale": scale}, {"format": kind}, 8
    w = awq.quantize(WEIGHT) if kind == "awq_w4a16" else datafree.quantize(WEIGHT, 16)
    return *parts(comfy_quant.write("x", w)), 4


KINDS = (
    "asym 4 16", "asym 6 16", "asym 6 16 default", "asym 4 32", "asym 6 32", "asym 6 32 params", *core_formats.FORMATS,
    "weight_only", "float8_e4m3fn", "mxfp8", "awq_w4a16", "svdquant_w4a4",
)  # fmt: skip


@pytest.mark.parametrize(("axis", "n", "k"), [("rows", 256, 64), ("columns", 128, 128)])
@pytest.mark.parametrize("marked", [False, True])
def test_a_layer_of_several_is_one_row(axis, n, k, marked, tmp_path):
    """With a branch of its own or not, and with an empty weight under its name or without one."""
    one, two = (datafree.quantize(torch.randn(128, 64), r) for r in (16, 32))
    stored = comfy_quant.write("a.attn.q", Parts((one, two), axis))
    stored.pop("a.attn.q.weight", None)
    nbytes = sum(t.numel() * t.element_size() for name, t in stored.items() if not name.endswith("comfy_quant"))
    if marked:
        stored["a.attn.q.weight"] = torch.zeros(n, 0, dtype=torch.uint8)
    save_file(stored, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert [(r.layer, r.scheme, r.n, r.k, r.rank, r.nbytes) for r in found.rows] == [
        ("a.attn.q", "nibble_parts", n, k, 32, nbytes)
    ]
    assert found.totals()["nibble_parts"]["bits"] > 4


def test_a_format_around_another_one_has_its_k(tmp_path):
    tensors, entry, _ = layer("asym 6 16")
    wrapped = {"format": "nibble_low_rank", "base": entry}
    tensors |= {"proj_down": torch.ones(K, 8), "proj_up": torch.ones(N, 8)}
    stored = {f"a.attn.q.{n}": t for n, t in tensors.items()} | {
        "a.attn.q.comfy_quant": comfy_quant.encode_config(wrapped)
    }
    save_file(stored, tmp_path / "x.safetensors")
    (row,) = inspect(tmp_path / "x.safetensors").rows
    assert (row.n, row.k, row.rank, row.scheme) == (N, K, 8, entry["format"])


@pytest.mark.parametrize("where", ["layers", "metadata"])
@pytest.mark.parametrize("kind", KINDS)
def test_n_and_k_and_bits(kind, where, tmp_path):
    tensors, entry, bits = layer(kind)
    stored = {f"blocks.0.attn.q.{n}": t for n, t in tensors.items()} | {"blocks.0.attn.q.bias": torch.ones(N)}
    info = {}
    if where == "layers":
        stored["blocks.0.attn.q.comfy_quant"] = comfy_quant.encode_config(entry)
    else:
        info = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.attn.q": entry}})}
    save_file(stored, tmp_path / "x.safetensors", info)
    (row,) = inspect(tmp_path / "x.safetensors").rows
    assert (row.layer, row.n, row.k, row.scheme) == ("blocks.0.attn.q", N, K, entry["format"])
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    assert row.nbytes == nbytes and row.bits == round(8 * nbytes / (N * K), 2) >= bits
    assert entry["format"] in comfy_quant.CORE + comfy_quant.OURS


def test_the_reported_layer_of_six_bits(tmp_path):
    """256 x 256 was reported as 256 x 384."""
    tensors = w4a8(6)
    assert tensors["weight"].shape == (N, 3 * K // 4)
    square = {n: t[:N].clone() for n, t in tensors.items()}
    entry = comfy_quant.encode_config({"format": "asym_w4a8_int8"})
    save_file({f"a.attn.q.{n}": t for n, t in square.items()} | {"a.attn.q.comfy_quant": entry}, tmp_path / "x.sft")
    assert [(r.n, r.k) for r in inspect(tmp_path / "x.sft").rows] == [(N, K)]


def test_a_format_of_tomorrow_is_shown_as_it_is_stored(tmp_path):
    entry = comfy_quant.encode_config({"format": "w2a2"})
    tensors = {"a.attn.q.weight": torch.zeros(64, 48, dtype=torch.int8), "a.attn.q.comfy_quant": entry}
    save_file(tensors, tmp_path / "x.safetensors")
    assert [(r.n, r.k, r.scheme) for r in inspect(tmp_path / "x.safetensors").rows] == [(64, 48, "w2a2")]


def test_codes_without_a_description_are_not_called_float(tmp_path):
    tensors = {f"a.attn.{n}.weight": WEIGHT.to(t) for n, t in (("q", torch.int32), ("k", torch.float8_e5m2))}
    tensors["a.attn.v.weight"] = torch.zeros(64, 64, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "x.safetensors")
    rows = {r.layer: r for r in inspect(tmp_path / "x.safetensors").rows}
    assert rows["a.attn.q"].scheme == "I32" and "nothing says" in rows["a.attn.q"].why
    assert rows["a.attn.k"].scheme == "float8_e5m2" and rows["a.attn.v"].scheme == "F8_E8M0"


def test_families_are_told_by_logical_shapes(tmp_path):
    """SDXL is told from SD1.5 by a text width of 2048: 1024 bytes of 4-bit codes."""
    w = torch.zeros(64, 2048)
    tensors = core_quant.write("input_blocks.4.1.transformer_blocks.0.attn2.to_k",
                               core_formats.quantize(w, "convrot_w4a4", torch.float16))  # fmt: skip
    save_file(tensors | {"input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)}, tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors").family_id == "sdxl"
    assert repack(tmp_path / "x.safetensors", tmp_path / "y.safetensors").family == "SDXL UNet"


def test_awq_packs_rows_too():
    packed = nunchaku.write("a", awq.quantize(torch.ones(128, 192)))
    assert logical_shapes({n: tuple(t.shape) for n, t in packed.items()})["a.weight"] == (128, 192)


NAMELESS = {
    "svdquant_w4a4": lambda: comfy_quant.write("x", datafree.quantize(torch.ones(128, 128), 16)),
    "awq_w4a16": lambda: comfy_quant.write("x", awq.quantize(torch.ones(128, 128))),
    "convrot_w4a4": lambda: core_quant.write("x", core_formats.quantize(WEIGHT, "convrot_w4a4", torch.float16)),
    "nunchaku_svdq_int4": lambda: nunchaku.write("x", datafree.quantize(torch.ones(128, 128), 16)),
    "nunchaku_awq_w4a16": lambda: nunchaku.write("x", awq.quantize(torch.ones(128, 128))),
    "nf4": lambda: {
        n.replace("blocks.0.nf4_320.", "x."): t
        for n, t in load_file(DATA.parent / "bnb" / "layers.safetensors").items()
        if n.startswith("blocks.0.nf4_320.")
    },
}


class TestOneLayerWithoutAName:
    @pytest.mark.parametrize("kind", NAMELESS)
    def test_is_counted_inspected_and_converted(self, kind, tmp_path):
        tensors = {n.removeprefix("x."): t for n, t in NAMELESS[kind]().items()}
        bias = {"bias": torch.ones(N if kind == "convrot_w4a4" else 320 if kind == "nf4" else 128)}
        save_file(tensors | bias, tmp_path / "x.safetensors")
        (row,) = inspect(tmp_path / "x.safetensors").rows
        assert (row.layer, row.scheme) == (header.ALONE, kind) and row.bits >= 4
        assert "| 0.00 |" not in inspect(tmp_path / "x.safetensors").table()
        out = repack(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
        names = load_file(out.path).keys()
        assert {"weight", "comfy_quant", "bias"} <= names and not any("." in n for n in names)
        (again,) = inspect(out.path).rows
        assert (again.n, again.k) == (row.n, row.k) and again.bits == pytest.approx(row.bits, abs=0.1)
        one, two = load(tmp_path / "x.safetensors"), load(out.path)
        assert one.layers.keys() == two.layers.keys() and one.dense.keys() == two.dense.keys()

    def test_in_floats_it_is_counted_too(self, tmp_path):
        save_file({"weight": WEIGHT, "bias": torch.ones(N)}, tmp_path / "x.safetensors")
        assert inspect(tmp_path / "x.safetensors").totals() == {"keep": {"layers": 1, "bytes": 4 * N * K, "bits": 32.0}}

    def test_files_packed_by_the_engines_own_code(self):
        """Those of the fixtures that hold one layer."""
        for file in sorted(DATA.glob("[abc]_*.safetensors")):
            if "expected" not in file.name:
                (row,) = inspect(file).rows
                parts = {n.removeprefix(f"{header.ALONE}."): t for n, t in raw(file).items()}
                assert (row.n, row.k) == nunchaku.logical({"qweight": ("I32" if "awq" in row.scheme else "I8",
                                                                       tuple(parts["qweight"].shape))})  # fmt: skip
                assert row.bits > 4 and set(load(file).layers) == {header.ALONE}


@pytest.mark.parametrize(("bytes_more", "words"), [
    (7, "it is longer than its header says"), (2**20, "it is longer than its header says"), (-1, "it is truncated"),
    (-100, "it is truncated")])  # fmt: skip
def test_too_long_and_too_short_are_told_apart(bytes_more, words, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(16, 16)}, path)
    data = path.read_bytes()
    path.write_bytes(data + bytes(bytes_more) if bytes_more > 0 else data[:bytes_more])
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: not a whole safetensors file \({words}\)\. Download"):
        header.read(path)


class TestAdvice:
    INT4 = ("svdquant_w4a4", "nibble_parts", "nunchaku_svdq_int4", "svdquant_nvfp4", "nunchaku_svdq_nvfp4")

    @pytest.mark.parametrize("id", forms.FORMS)
    @pytest.mark.parametrize("sm", [None, 61, 75, 80, 86, 89, 90, 100, 120])
    def test_names_no_other_card_and_what_this_one_runs(self, id, sm):
        (line,) = forms.advice([id], machine_of(sm))
        assert "Hopper" not in line.partition(";")[2]
        assert ("an asym_w4a8_int8 file of the model is faster" in line) is (id in self.INT4 and sm == 90)
        assert ("the model's int4 file" in line) is ("nvfp4" in id and id != "nvfp4" and sm in (80, 86, 89))

    @pytest.mark.parametrize("cuda", [(12, 8), (13,)])
    @pytest.mark.parametrize("id", forms.FORMS)
    def test_what_it_recommends_runs_there(self, id, cuda):
        for (low, high), other, words in forms.FORMS[id].instead:
            for sm in (low, high):
                here = machine.Machine(machine.NVIDIA, sm=sm, cuda=cuda)
                said = f"{words} is faster" in forms.FORMS[id].better(here)
                assert said is (not here.lacks(forms.FORMS[other].kernel))
                assert not said or here.lacks(forms.FORMS[id].kernel)


def machine_of(sm: int | None) -> machine.Machine:
    return machine.Machine(machine.CPU) if sm is None else machine.Machine(machine.NVIDIA, sm=sm, cuda=(13, 0))


def test_every_packing_format_is_told_by_something():
    """A row of ours or of ComfyUI's that packs codes must be known here, else its K is what is stored."""
    from comfyui_nibble.checkpoints import logical

    as_stored = {"float8_e4m3fn", "float8_e5m2", "mxfp8", "int8_tensorwise"}
    around_another = {"nibble_low_rank"}
    known = {*logical.PAIRS, *logical.GROUPS, comfy_quant.WEIGHT_ONLY, comfy_quant.PARTS, *as_stored, *around_another}
    assert known >= {*comfy_quant.OURS, *comfy_quant.CORE}
