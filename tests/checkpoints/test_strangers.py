"""Layers that look like something they are not: told apart by their marks and refused with a remedy, never misread."""

import json

import pytest
import torch
from comfyui_nibble.checkpoints import forms
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import nunchaku
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.families import detect, detect_published
from comfyui_nibble.quant import machine
from safetensors.torch import load_file, save_file

from .fixtures import ALONE, DATA, raw

I8, U8, I32, F8 = torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn
SVDQ = {n.removeprefix(f"{ALONE}."): t for n, t in raw(DATA / "a_svdq_int4_linear.safetensors").items()}


def logical(layout) -> dict:
    target = {"export_name": "a", "runtime_tensor_layout": layout, "weight_layout": {"name": "svdq"}}
    return {"quantization_config": json.dumps({"quant_method": "svdquant", "targets": [target]})}


CASES = {
    "mxfp4": ({**SVDQ, "wscales": torch.zeros(8, 256, dtype=U8)}, {}, "SVDQuant with MXFP4 codes"),
    "tinychat": (
        {"qweight": torch.zeros(32, 128, dtype=torch.int16), "scales": torch.ones(1, 128)}, {}, "a tinychat W4A16"
    ),
    "gptq": ({"qweight": torch.zeros(8, 8, dtype=I32), "qzeros": torch.zeros(1, 1, dtype=I32)}, {}, "GPTQ or AutoAWQ"),
    "cozy": ({**SVDQ, "lora_down": torch.zeros(256, 32, dtype=I8)}, {}, "low-rank branch is stored in 8 bits"),
    "logical": (SVDQ, logical("logical"), "diffuse-compressor wrote it in the layout 'logical'"),
    "unnamed layout": (SVDQ, logical(None), "diffuse-compressor wrote it in the layout 'None'"),
    "not packed": ({**SVDQ, "qweight": SVDQ["qweight"][:100].contiguous()}, {}, "N=100, K=256 are not"),
    "kitchen": ({"weight": torch.zeros(8, 4, dtype=I8), "weight_scale": torch.ones(1), "proj_down": torch.ones(8, 2),
                 "proj_up": torch.ones(8, 2)}, {}, "SVDQuant layers have no comfy_quant entry"),
    "modelopt": ({"weight": torch.zeros(8, 8, dtype=U8), "weight_scale": torch.zeros(8, 1).to(torch.float8_e4m3fn),
                  "weight_scale_2": torch.ones(())}, {}, "NVFP4 layers have no comfy_quant entry"),
    "sdnq": ({"weight": torch.zeros(8, 8, dtype=U8), "scale": torch.ones(1), "zero_point": torch.ones(1)}, {}, "SDNQ"),
    **{f"fp8 beside {scale}": ({"weight": torch.zeros(8, 8).to(F8), scale: torch.ones(())}, {},
                               "its fp8 weight has a scale beside it, and neither")
       for scale in ("weight_scale", "weight_scale_inv", "scale_weight")},
    "hqq": ({"W_q": torch.zeros(8, 8, dtype=U8), "scale": torch.ones(1), "zero": torch.ones(1)}, {}, "HQQ"),
    "nan": ({**SVDQ, "smooth": torch.full((256,), float("nan"), dtype=torch.bfloat16)}, {}, "smooth_factor holds NaN"),
    "rank 8": ({**SVDQ, "lora_down": torch.zeros(256, 8), "lora_up": torch.zeros(256, 8)}, {}, "multiple of 16, not 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_with_one_sentence(name, tmp_path):
    parts, metadata, sentence = CASES[name]
    path = tmp_path / "odd.safetensors"
    save_file({f"a.{n}": t.clone() for n, t in parts.items()}, path, metadata)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert str(caught.value).count(". ") >= 1, "what, and what to do"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_with_its_mark_is_no_stranger(prefix, tmp_path):
    """The mark stands for all layers below its own name, and for no others."""
    layer = {"weight": torch.zeros(8, 8).to(F8), "scale_weight": torch.ones(())}
    tensors = {f"{prefix}a.{n}": t.clone() for n, t in layer.items()} | {f"{prefix}scaled_fp8": torch.zeros(2).to(F8)}
    save_file(tensors, tmp_path / "scaled.safetensors")
    assert inspect(tmp_path / "scaled.safetensors").rows
    if prefix:
        save_file(tensors | {f"clip.b.{n}": t for n, t in layer.items()}, tmp_path / "odd.safetensors")
        with pytest.raises(CheckpointError, match=r"layer clip\.b: its fp8 weight has a scale"):
            load(tmp_path / "odd.safetensors")


def test_inspect_takes_weights_of_no_size_and_nested_records(tmp_path):
    tensors = {"blocks.0.attn.q.weight": torch.zeros(0, 64), "blocks.0.attn.k.weight": torch.zeros(64, 0)}
    save_file(tensors, tmp_path / "empty.safetensors", {"nibble": "[" * 100_000})
    found = inspect(tmp_path / "empty.safetensors")
    assert found.record == {} and found.totals()["keep"]["bits"] == 0
    assert "empty.safetensors" in found.table() and found.to_json()


@pytest.mark.parametrize("name", ["mxfp4", "tinychat", "gptq", "cozy", "logical", "kitchen", "modelopt", "sdnq", "hqq"])
def test_inspect_says_the_same(name, tmp_path):
    parts, metadata, sentence = CASES[name]
    save_file({f"a.{n}": t.clone() for n, t in parts.items()}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(CheckpointError, match=sentence):
        inspect(tmp_path / "odd.safetensors")


def test_a_lite_file_that_lost_its_config_is_not_taken_for_nunchakus(tmp_path):
    layers = {f"transformer_blocks.0.attn.{n}.{k}": t.clone() for n in ("to_q", "to_k") for k, t in SVDQ.items()}
    save_file(layers, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"part of a diffusers Nunchaku Lite folder.*Put the folder's config\.json next"
    ):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("file", "family"), [
    ("d_mini_flux_int4", "flux"), ("e_mini_sdxl_int4", "sdxl"), ("e_mini_qwenimage_int4", "qwen_image")])  # fmt: skip
def test_families_are_told_by_names_with_and_without_prefix(file, family):
    names = list(load_file(DATA / f"{file}.safetensors"))
    for prefix in ("", "model.diffusion_model."):
        found, published, where = detect_published([prefix + n for n in names])
        assert (found.id, published.title, where) == (family, "nunchaku", prefix)


def test_other_programs_metadata_does_not_matter(tmp_path):
    """A float file may keep anything under these names."""
    info = {"config": "model: yaml", "quantization_config": "[", "model_class": "x"}
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "x.safetensors", info)
    assert (
        load(tmp_path / "x.safetensors").dense.keys() == {"a.weight"} and not inspect(tmp_path / "x.safetensors").maker
    )
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "y.safetensors", {"config": '{"num_layers": null}'})
    assert inspect(tmp_path / "y.safetensors").family


@pytest.mark.parametrize("config", ['{"num_layers": 1e99}', '{"layers_per_block": "x"}', '{"num_layers": 1000000000}'])
def test_a_config_of_no_model_is_refused(config, tmp_path):
    tensors = load_file(DATA / "e_mini_sdxl_int4.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", {"config": config})
    with pytest.raises(CheckpointError, match="its config describes no model"):
        load(tmp_path / "x.safetensors")


def test_native_names_of_the_new_families():
    qwen = {f"transformer_blocks.0.{n}.weight": (8, 8) for n in ("img_mod.1", "attn.add_q_proj")}
    z = {"layers.0.attention.qkv.weight": (11520, 3840), "cap_embedder.1.weight": (3840, 2560),
         "noise_refiner.0.attention.k_norm.weight": (128,)}  # fmt: skip
    assert detect(qwen)[0].id == "qwen_image" and detect(z)[0].id == "z_image"
    pixart = {
        "blocks.0.cross_attn.kv_linear.weight": (8, 8),
        "blocks.0.scale_shift_table": (6, 8),
        "t_block.1.weight": (8, 8),
    }
    assert detect(pixart)[0].id == "pixart"


@pytest.mark.parametrize("file", [DATA / "d_mini_flux_int4.safetensors", DATA.parent / "bnb" / "layers.safetensors"])
def test_quantizing_them_again_is_refused(file):
    with pytest.raises(CheckpointError, match="it is quantized already"):
        open_source(file)


INTEGERS = {"other.weight": torch.ones(64, 64, dtype=torch.int8), "other.weight_scale": torch.ones(64, 1)}
BESIDE = {
    "nf4": dict(load_file(DATA.parent / "bnb" / "layers.safetensors")),
    "scaled fp8": {"scaled_fp8": torch.empty(0), "a.weight": torch.ones(64, 64).to(torch.float8_e4m3fn),
                   "a.scale_weight": torch.ones(())},
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE)
def test_a_layer_that_is_read_excuses_no_other(beside, tmp_path):
    """One of them in the file, and every integer weight in it was taken for numbers."""
    save_file(BESIDE[beside], tmp_path / "read.safetensors")
    load(tmp_path / "read.safetensors")
    save_file(BESIDE[beside] | INTEGERS, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="layer other: its weights are integers"):
        load(tmp_path / "x.safetensors")


class TestInspect:
    def test_says_maker_family_scheme_and_gpu(self):
        found = inspect(DATA / "d_mini_flux_int4.safetensors")
        assert found.family_id == "flux"
        assert found.family == "FLUX.1" and found.maker.endswith("as NunchakuFluxTransformer2dModel")
        totals = found.totals()
        assert totals["nunchaku_svdq_int4"]["layers"] == 12 and totals["nunchaku_awq_w4a16"]["layers"] == 3
        row = next(r for r in found.rows if r.layer == "single_transformer_blocks.0.mlp_fc2")
        assert (row.n, row.k, row.rank) == (256, 384, 32)
        assert "native on NVIDIA Ampere, Ada, Blackwell" in found.table()

    def test_a_folder_and_its_maker(self):
        found = inspect(DATA / "f_lite_int4")
        assert found.maker == "diffusers (Nunchaku Lite)" and len(found.quantized) == 3

    def test_sana_says_that_comfyui_cannot(self, tmp_path):
        layer = {f"transformer_blocks.0.cross_attn.q_linear.{n}": t.clone() for n, t in SVDQ.items()}
        save_file(layer, tmp_path / "sana.safetensors")
        assert "ComfyUI has no SANA model class" in inspect(tmp_path / "sana.safetensors").table()

    @pytest.mark.parametrize(("capability", "form", "native"), [
        (75, "svdquant_w4a4", False), (86, "svdquant_w4a4", True), (89, "nunchaku_svdq_int4", True),
        (90, "nunchaku_svdq_int4", False), (90, "asym_w4a8_int8", True), (120, "svdquant_w4a4", True),
        (120, "nvfp4", True), (89, "nvfp4", False), (None, "nvfp4", False)])  # fmt: skip
    def test_the_verdict_on_each_gpu(self, capability, form, native):
        here = machine.Machine(machine.NVIDIA if capability else machine.CPU, sm=capability, cuda=(13, 0))
        (line,) = forms.advice([form], here)
        assert ("runs it natively" in line) is native and ("does not, " in line) is not native

    def test_every_form_that_is_read_has_a_row(self):
        assert {nunchaku.SVDQ, nunchaku.SVDQ_FP4, nunchaku.AWQ} <= forms.FORMS.keys()


def test_the_page_of_formats_holds_the_generated_table():
    page = (DATA.parents[2] / "docs" / "formats" / "README.md").read_text(encoding="utf-8")
    assert forms.table() in page, "run python -m comfyui_nibble.checkpoints.forms and paste its output"
