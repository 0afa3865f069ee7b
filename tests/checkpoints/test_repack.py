"""Converting: codes byte for byte the published ones, nothing lost, everything recorded."""

import json

import pytest
import torch
from comfyui_nibble.checkpoints import repack as repacking
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import nunchaku
from comfyui_nibble.checkpoints.load import load, needs_reader
from comfyui_nibble.checkpoints.repack import Options, repack
from comfyui_nibble.headless.cli import main
from comfyui_nibble.quant import packing, parts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .fixtures import DATA, raw
from .test_weight_only import BNB

SOURCES = {
    "flux": DATA / "d_mini_flux_int4.safetensors",
    "sdxl": DATA / "e_mini_sdxl_int4.safetensors",
    "qwen": DATA / "e_mini_qwenimage_int4.safetensors",
    "lite": DATA / "f_lite_int4",
    "bnb": BNB / "layers.safetensors",
}


def pieces(weight) -> list:
    return list(weight.parts) if isinstance(weight, parts.Parts) else [weight]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_lost(name, tiled, tmp_path):
    out = repack(SOURCES[name], tmp_path / "out.safetensors", Options(tiled=tiled))
    assert out.requantized == 0 and not needs_reader(out.path)
    one, two = load(SOURCES[name]), load(out.path)
    assert one.layers.keys() == two.layers.keys() and one.dense.keys() == two.dense.keys()
    assert all(torch.equal(t, two.dense[n]) for n, t in one.dense.items())
    for layer, stored in one.layers.items():
        for a, b in zip(pieces(stored.weight), pieces(two.layers[layer].weight), strict=True):
            assert type(a) is type(b)
            for field in (
                "qweight",
                "qdata",
                "wscales",
                "wzeros",
                "smooth_factor",
                "proj_down",
                "proj_up",
                "act_unsigned",
            ):
                x, y = getattr(a, field, None), getattr(b, field, None)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, (layer, field)


def test_converted_codes_go_back_to_the_published_bytes(tmp_path):
    """nunchaku -> this contract -> nunchaku, int4 codes byte for byte."""
    source = SOURCES["sdxl"]
    layers = load(repack(source, tmp_path / "out.safetensors").path).layers
    stem, native = "down_blocks.1.attentions.0.transformer_blocks.0.", "input_blocks.4.1.transformer_blocks.0."
    fused = parts.join([layers[f"{native}attn1.to_{n}"].weight for n in "qkv"], "rows")
    for name, weight in {
        "attn1.to_qkv": fused,
        **{n: layers[native + n].weight for n in ("attn2.to_q", "ff.net.2")},
    }.items():
        for key, value in nunchaku.write(stem + name, weight).items():
            assert torch.equal(value.view(torch.uint8), raw(source)[key].view(torch.uint8)), key


def test_the_record_says_where_it_came_from(tmp_path):
    out = repack(SOURCES["flux"], tmp_path / "out.safetensors")
    with safe_open(out.path, "pt") as f:
        record = json.loads(f.metadata()["nibble"])
    assert record["family"] == "flux" and record["converted_from"] == {
        "nunchaku_awq_w4a16": 3,
        "nunchaku_svdq_int4": 10,
    }
    assert record["requantized"] == 0 and len(record["source_sha256"]) == 64
    assert "13 layers kept their codes" in out.summary()


def one_attention() -> dict[str, torch.Tensor]:
    tensors = load_file(BNB / "layers.safetensors")
    return {n.replace("blocks.0.nf4_320.", "blocks.0.attn.qkv."): t for n, t in tensors.items() if "nf4_320." in n}


def test_requantizing_is_asked_for_and_counted(tmp_path):
    save_file(one_attention(), tmp_path / "in.safetensors")
    out = repack(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Options(requantize=True, rank=16))
    assert out.forms == {"nf4": 1} and out.formats == {"svdquant_w4a4": 1} and out.requantized == 1
    before, after = (load(p).layers["blocks.0.attn.qkv"].weight for p in (tmp_path / "in.safetensors", out.path))
    a, b = parts.dequantize(before), parts.dequantize(after)
    assert 0 < float((a - b).norm() / a.norm()) < 0.2


def test_a_layer_that_cannot_be_requantized_is_named_in_its_file(tmp_path, monkeypatch):
    """The layer's name stood where the file's belongs."""

    def refuse(*_args):
        raise ValueError("the weight is odd")

    monkeypatch.setattr(repacking, "quantize_weight", refuse)
    save_file(one_attention(), tmp_path / "in.safetensors")
    with pytest.raises(
        CheckpointError, match=r"^in\.safetensors, layer blocks\.0\.attn\.qkv: the weight is odd\. Convert it without"
    ):
        repack(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Options(requantize=True))
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_file_level_configurations_become_entries(tmp_path):
    w = torch.zeros(64, 64, dtype=torch.int8)
    info = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "int8_tensorwise"}}})}
    save_file({"a.weight": w, "a.weight_scale": torch.ones(64, 1)}, tmp_path / "old.safetensors", info)
    out = load_file(repack(tmp_path / "old.safetensors", tmp_path / "new.safetensors").path)
    assert json.loads(bytes(out["a.comfy_quant"].tolist()))["format"] == "int8_tensorwise"


def test_a_float_file_and_an_existing_name_are_refused(tmp_path, flux_file, capsys):
    with pytest.raises(CheckpointError, match="it has no 4-bit layer"):
        repack(flux_file, tmp_path / "out.safetensors")
    (tmp_path / "out.safetensors").write_text("mine")
    assert main(["convert", str(SOURCES["sdxl"]), "--out", str(tmp_path / "out.safetensors")]) == 1
    assert "there is a file of this name already" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_the_command_line_converts_and_tells(tmp_path, capsys):
    assert main(["convert", str(SOURCES["qwen"]), "--out", str(tmp_path / "q.safetensors"), "--tile-packed"]) == 0
    printed = capsys.readouterr().out
    assert "Qwen-Image: 2 nunchaku_awq_w4a16, 12 nunchaku_svdq_int4 -> 2 awq_w4a16, 12 svdquant_w4a4" in printed
    tiled = load(tmp_path / "q.safetensors").layers["transformer_blocks.0.attn.to_q"]
    assert tiled.tiled and packing.tiles_fit(*tiled.weight.shape)
