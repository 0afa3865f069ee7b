"""A quantized model is no source: whatever made it, wherever it says so, and also where nothing says so."""

import json

import pytest
import torch
from comfyui_nibble.checkpoints import marks
from comfyui_nibble.checkpoints.convert import Options, quantize
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import comfy_quant, core_quant, nunchaku
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.repack import repack
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.headless.cli import main
from comfyui_nibble.quant import awq, core_formats, datafree
from comfyui_nibble.quant.calib import engine, presets
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan
from safetensors.torch import load_file, save_file

from .conftest import flux_tensors
from .fixtures import DATA

LAYER = "double_blocks.0.img_attn.proj"
WEIGHT = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


def parts_of(tensors: dict) -> dict:
    return {n.removeprefix("x."): t for n, t in tensors.items()}


def fp8(dtype=torch.float8_e4m3fn, **sides) -> dict:
    return {"weight": WEIGHT.to(dtype), **sides}


def entry(fmt: str) -> torch.Tensor:
    return comfy_quant.encode_config({"format": fmt})


ONE = torch.ones(())
KINDS = {
    **{f: parts_of(core_quant.write("x", core_formats.quantize(WEIGHT, f, torch.bfloat16)))
       for f in core_formats.FORMATS},
    "svdquant_w4a4": parts_of(comfy_quant.write("x", datafree.quantize(WEIGHT, 16))),
    "svdquant_w4a4 tiled": parts_of(comfy_quant.write("x", datafree.quantize(WEIGHT, 16), True)),
    "awq_w4a16": parts_of(comfy_quant.write("x", awq.quantize(WEIGHT))),
    "float8_e4m3fn": fp8(weight_scale=ONE, comfy_quant=entry("float8_e4m3fn")),
    "float8_e5m2": fp8(torch.float8_e5m2, weight_scale=ONE, comfy_quant=entry("float8_e5m2")),
    "mxfp8": fp8(weight_scale=torch.ones(128, 4).to(torch.float8_e8m0fnu), comfy_quant=entry("mxfp8")),
}  # fmt: skip
BNB = {
    n.removeprefix("blocks.0.nf4_320."): t
    for n, t in load_file(DATA.parent / "bnb" / "layers.safetensors").items()
    if n.startswith("blocks.0.nf4_320.")
}
# No entry of ComfyUI's anywhere: what tells is there by nature, or was lost.
BARE = {
    "nunchaku": (parts_of(nunchaku.write("x", datafree.quantize(WEIGHT, 16))), "nunchaku_svdq_int4"),
    "nunchaku awq": (parts_of(nunchaku.write("x", awq.quantize(WEIGHT))), "nunchaku_awq_w4a16"),
    "gptq": ({"qweight": torch.zeros(8, 8, dtype=torch.int32), "qzeros": torch.zeros(1, 1)}, "qweight"),
    "bnb": (BNB, "bitsandbytes"),
    "bnb without its state": ({n: t for n, t in BNB.items() if "quant_state" not in n}, "bitsandbytes"),
    "int8": ({"weight": WEIGHT.char()}, "I8"),
    "uint8": ({"weight": WEIGHT.byte()}, "U8"),
    "int16": ({"weight": WEIGHT.short()}, "I16"),
    "int32": ({"weight": WEIGHT.int()}, "I32"),
    "int64": ({"weight": WEIGHT.long()}, "I64"),
    "int8 convolution": ({"weight": torch.zeros(8, 8, 3, 3, dtype=torch.int8)}, "I8"),
    "codes under another name": ({"weight_q": torch.zeros(64, 64, dtype=torch.uint8)}, "U8"),
    "compressed": ({"weight_packed": torch.zeros(8, 8, dtype=torch.int32)}, "weight_packed"),
    "hqq": ({"W_q": torch.zeros(8, 8, dtype=torch.uint8), "scale": ONE, "zero": ONE}, "W_q"),
    "fp8": (fp8(), "float8_e4m3fn"),
    "fp8 scaled, older marks": (
        fp8(scale_weight=ONE, scale_input=ONE) | {"..scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)},
        "float8_e4m3fn",
    ),
    "fp8 as numbers of another kind": (fp8(torch.float8_e4m3fnuz), "F8_E4M3FNUZ"),
    "e8m0": ({"weight": torch.zeros(64, 64, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, "F8_E8M0"),
    "f4": ({"weight": torch.zeros(64, 64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "F4"),
    **{f"float with {n}": ({"weight": WEIGHT, n: torch.ones(128, 2)}, n) for n in marks.SIDES},
}


def model(parts: dict) -> dict:
    """A FLUX.1 with one layer of a kind. A name that starts with two dots is the file's own."""
    tensors = {n: t for n, t in flux_tensors().items() if n != f"{LAYER}.weight"}
    return tensors | {n[2:] if n.startswith("..") else f"{LAYER}.{n}": t.clone() for n, t in parts.items()}


def refused(call, word: str) -> str:
    with pytest.raises(CheckpointError, match=rf"layer {LAYER}: it is quantized already \(.*{word}.*") as caught:
        call()
    assert str(caught.value).endswith("Quantize the 16-bit original instead") and "\n" not in str(caught.value)
    return str(caught.value)


def command_refuses(path, word: str, capsys, *more: str) -> None:
    out = path.with_name("out.safetensors")
    assert main(["quantize", str(path), "--out", str(out), *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"nibble: {path.name}, layer {LAYER}: it is quantized already") and word in error
    assert not out.exists()


@pytest.mark.parametrize("where", ["layers", "metadata", "nowhere"])
@pytest.mark.parametrize("kind", KINDS)
def test_formats_of_comfyui_wherever_they_are_marked(kind, where, tmp_path, capsys):
    parts, metadata, path = dict(KINDS[kind]), {}, tmp_path / "model.safetensors"
    if where != "layers":
        mark = json.loads(bytes(parts.pop("comfy_quant").tolist()))
        metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: mark}})} if where == "metadata" else {}
    save_file(model(parts), path, metadata)
    refused(lambda: open_source(path), kind.split()[0])
    command_refuses(path, kind.split()[0], capsys)
    command_refuses(path, kind.split()[0], capsys, "--preset", "fast")
    if "fp8" in kind or "float8" in kind:
        return
    if where == "nowhere":
        with pytest.raises(CheckpointError, match=rf"layer {LAYER}: its .* comfy_quant entry"):
            repack(path, tmp_path / "converted.safetensors")
    else:
        repack(path, tmp_path / "converted.safetensors")
        converted = load_file(tmp_path / "converted.safetensors")
        assert all(torch.equal(converted[f"{LAYER}.{n}"].float(), t.float()) for n, t in parts.items())


@pytest.mark.parametrize("kind", BARE)
def test_layers_that_nothing_marks(kind, tmp_path, capsys):
    parts, word = BARE[kind]
    path = tmp_path / "model.safetensors"
    save_file(model(parts), path)
    refused(lambda: open_source(path), word)
    command_refuses(path, word, capsys)


@pytest.mark.parametrize("way", [load, inspect, lambda p: repack(p, p.with_name("out.safetensors"))])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int8 convolution"])
def test_integers_are_not_loaded_as_numbers(kind, way, tmp_path):
    """ComfyUI's loader would: 127 for a weight of 0.1."""
    save_file(model(BARE[kind][0]), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layer {LAYER}: its weights are integers, and it has no comfy_quant"):
        way(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["int32", "fp8", "fp8 scaled, older marks", "e8m0"])
def test_converting_what_has_no_4_bit_layer_does_not_call_it_a_float_model(kind, tmp_path):
    parts, word = BARE[kind]
    save_file(model(parts), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layer {LAYER}: it has no 4-bit layer .*{word}.*16-bit original"):
        repack(tmp_path / "model.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", [*KINDS, *BARE])
def test_diffusers_folders(kind, tmp_path):
    parts, word = BARE.get(kind) or (KINDS[kind], kind.split()[0])
    folder = diffusers_folder(tmp_path)
    file, layer = folder / "diffusion_pytorch_model.safetensors", "transformer_blocks.0.attn.to_out.0"
    tensors = {n: t for n, t in load_file(file).items() if n != f"{layer}.weight"}
    save_file(tensors | {n[2:] if n.startswith("..") else f"{layer}.{n}": t.clone() for n, t in parts.items()}, file)
    with pytest.raises(CheckpointError, match=rf"layer {layer}: it is quantized already \(.*{word}"):
        open_source(folder)


def diffusers_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    return tmp_path / "transformer"


def test_a_folder_whose_config_says_so(tmp_path):
    folder = diffusers_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(CheckpointError, match=r"config\.json says that it is quantized \(torchao\)\. Quantize the 16"):
        open_source(folder)


def test_a_float_model_with_integer_buffers_passes(tmp_path):
    """Positions, counters and embeddings are no codes."""
    buffers = {
        "text.embeddings.position_ids": torch.arange(77).unsqueeze(0),
        "text.embeddings.token_embedding.weight": torch.ones(100, 64),
        "norm.num_batches_tracked": torch.tensor(3),
        "window.relative_position_index": torch.zeros(64, 64, dtype=torch.int64),
        "mask": torch.zeros(64, 64, dtype=torch.bool),
        "text.spiece_model": torch.zeros(5000, dtype=torch.uint8),
        "small.table": torch.zeros(2, 3, dtype=torch.uint8),
        "classes.weight": torch.zeros(10, dtype=torch.int64),
        "norm.scale": torch.ones(64), "log.smooth_factor": torch.ones(3), "quantize.codebook": torch.ones(8, 8),
        "mlp.proj_down.weight": torch.ones(8, 8), "counts": torch.zeros(3, dtype=torch.uint32),
    }  # fmt: skip
    save_file(flux_tensors() | buffers, tmp_path / "model.safetensors", {"_quantization_metadata": '{"layers": {}}'})
    with open_source(tmp_path / "model.safetensors") as source:
        done = quantize(source, tmp_path / "out.safetensors", Options(rank=16))
    assert len(done.layers) == 13
    out = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(out[n], t) for n, t in buffers.items())


def test_metadata_that_does_not_parse_is_said(tmp_path):
    save_file(flux_tensors(), tmp_path / "model.safetensors", {"_quantization_metadata": "{"})
    with pytest.raises(CheckpointError, match="_quantization_metadata is not valid"):
        open_source(tmp_path / "model.safetensors")


class TestTheQuantizerItself:
    """What the nodes and the command line share, for weights that came past every file check."""

    @pytest.mark.parametrize("scheme", ["svdquant_w4a4", "awq_w4a16"])
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
    def test_one_weight(self, scheme, dtype):
        with pytest.raises(ValueError, match=rf"the weight is {dtype}, codes of a layer that is quantized already"):
            quantize_weight(WEIGHT.to(dtype), None, LayerPlan(scheme, "", 16), torch.bfloat16)

    @pytest.mark.parametrize("fit", [None, 2**20])
    def test_a_calibration(self, fit):
        module = torch.nn.ModuleDict({"a": torch.nn.Linear(128, 128)})
        job = engine.Job(
            plans={"a": LayerPlan("svdquant_w4a4", "", 16)}, preset=presets.preset("data_free"), dtype=torch.bfloat16,
            run=lambda: None, weight=lambda _: (WEIGHT.char(), None), fit=fit,
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"layer a: the weight is torch\.int8, codes.*16-bit original"):
            engine.calibrate(module, job)
