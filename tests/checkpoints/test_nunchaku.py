"""nunchaku's packing against its own exporter: every layer exactly, both ways, and the same numbers computed."""

import json
from dataclasses import replace

import pytest
import torch
from comfyui_nibble.checkpoints import native
from comfyui_nibble.checkpoints.formats import nunchaku
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.quant import kernels, nvfp4_lowrank, packing, parts
from comfyui_nibble.quant.parts import Parts
from safetensors.torch import save_file

from .fixtures import ALONE, DATA, cases, expected, files, raw, relative

CASES = cases()
FLUX, SDXL, QWEN = (
    DATA / f"{n}.safetensors" for n in ("d_mini_flux_int4", "e_mini_sdxl_int4", "e_mini_qwenimage_int4")
)
NVFP4 = DATA / "b_svdq_nvfp4_linear.safetensors"


def unpacked(case):
    """(stored layer, natural bias) of one layer, and what is expected of it."""
    tensors = {n: t for n, t in raw(case.path).items() if n.startswith(case.layer + ".")}
    layer = nunchaku.read(tensors, case.path.name)[case.layer]
    return layer, tensors.get(f"{case.layer}.bias"), expected(case.path)[case.layer]


def vectors(layer: str, want: dict) -> int:
    """How many vectors are woven into each other; the fixtures' names say it."""
    if layer == ALONE:
        return 6 if want["w_codes"].shape[0] == 768 else 0
    if layer.endswith(("norm1.linear", "norm1_context.linear", "_mod.1")):
        return 6
    return 3 if layer.endswith("norm.linear") else 0


@pytest.mark.parametrize("case", [c for c in CASES if "y_w4a4_f64" in expected(c.path)[c.layer]], ids=str)
def test_svdq_layers_unpack_exactly_and_compute_alike(case):
    layer, bias, want = unpacked(case)
    w = layer.weight
    if layer.form == nunchaku.SVDQ:
        codes, scales = packing.unpack_signed(w.qweight), w.wscales.t()
        w = replace(w, act_unsigned="act_shift" in want)
    else:
        codes, scales = nvfp4_lowrank.codes(w).to(torch.int8), w.block_scale.float()
        assert torch.equal(w.channel_scale, want["wtscale"].float().expand(w.shape[0]))
    assert torch.equal(codes, want["w_codes"])
    assert torch.equal(scales.float(), want["w_scales_nk"].float())
    assert torch.equal(w.smooth_factor, want["smooth"])
    assert torch.equal(w.proj_down, want["proj_down_kr"]) and torch.equal(w.proj_up, want["proj_up_nr"])
    assert (bias is None and "bias" not in want) or torch.equal(bias, want["bias"])
    f32 = kernels.wrap(w.to(torch.float32), torch.float32)
    y = torch.nn.functional.linear(want["x"].float(), f32, None if bias is None else bias.float())
    assert relative(y, want["y_w4a4_f64"]) < 2e-2
    if layer.form == nunchaku.SVDQ and "act_shift" in want:
        signed = kernels.wrap(replace(w, act_unsigned=False).to(torch.float32), torch.float32)
        wrong = torch.nn.functional.linear(want["x"].float(), signed, bias.float())
        assert relative(wrong, want["y_w4a4_f64"]) > 0.1, "an unsigned layer run as signed must be told apart here"
        dense = want["x"].float() @ parts.dequantize(w).t() + bias.float() + parts.shift(w)
        assert relative(dense, want["y_dense_f64"]) < 1e-3


@pytest.mark.parametrize("case", [c for c in CASES if "w_zero_int_nk" in expected(c.path)[c.layer]], ids=str)
def test_awq_layers_unpack_exactly_and_compute_alike(case):
    layer, bias, want = unpacked(case)
    w, woven = layer.weight, vectors(case.layer, want)
    assert layer.form == nunchaku.AWQ
    if woven:
        order = native.natural_rows(w.shape[0], woven)
        w = replace(w, qweight=w.qweight[order], wscales=w.wscales[:, order], wzeros=w.wzeros[:, order])
        bias = bias[order].float()
        ones = bias.reshape(woven, -1)
        ones[[1, 4] if woven == 6 else [1]] -= 1
        assert (bias - want["bias_natural"].float()).abs().max() <= 2**-8
    elif bias is not None:
        assert torch.equal(bias, want["bias_natural"])
    assert torch.equal(packing.unpack_unsigned(w.qweight), want["w_codes"])
    assert torch.equal(w.wscales.t(), want["w_scales_nk"])
    y = torch.nn.functional.linear(
        want["x"].float(), kernels.wrap(w.to(torch.float32), torch.float32), None if bias is None else bias.float()
    )
    assert relative(y, want["y_dense_f64"]) < 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repacking_gives_the_same_bytes(case):
    stored = {n: t for n, t in raw(case.path).items() if n.startswith(case.layer + ".")}
    v2 = f"{case.layer}.proj_down" in stored
    layer, bias, _ = unpacked(case)
    again = nunchaku.write(case.layer, layer.weight, v2)
    if bias is not None:
        again[f"{case.layer}.bias"] = bias if layer.form == nunchaku.AWQ else nunchaku.write_bias(bias)
    for name, value in again.items():
        want = stored.pop(name)
        rows = value.shape[0]
        assert torch.equal(value.view(torch.uint8), want[:rows].view(torch.uint8)), name
        assert rows == want.shape[0] or not want[rows:].any(), name  # the exporter's own padding of scales
    assert all(n.endswith(("smooth_orig", "smooth_factor_orig")) for n in stored)  # never read at run time


def test_every_fixture_is_covered():
    packed = [n.removesuffix(".qweight") for p in files() for n in raw(p) if n.endswith(".qweight")]
    assert len(files()) == 13 and len(CASES) == len(packed) == 43


class TestNames:
    @pytest.mark.parametrize("path", [FLUX, SDXL, QWEN], ids=lambda p: p.stem)
    def test_exactly_the_layers_after_a_gelu_are_unsigned(self, path):
        want = sum("act_shift" in e for e in expected(path).values())
        got = 0
        for layer in load(path).layers.values():
            pieces = layer.weight.parts if isinstance(layer.weight, Parts) else (layer.weight,)
            got += sum(getattr(p, "act_unsigned", False) for p in pieces)
        assert got == want == {FLUX: 3, SDXL: 0, QWEN: 2}[path]

    def test_flux_single_block_keeps_two_layers_in_linear2(self):
        weight = load(FLUX).layers["single_blocks.0.linear2"].weight
        want = expected(FLUX)
        names = ["single_transformer_blocks.0.out_proj", "single_transformer_blocks.0.mlp_fc2"]
        assert weight.axis == "columns" and [p.act_unsigned for p in weight.parts] == [False, True]
        for part, name in zip(weight.parts, names, strict=True):
            assert torch.equal(packing.unpack_signed(part.qweight), want[name]["w_codes"])
        x = torch.cat([want[n]["x"] for n in names], 1).float()
        bias = sum(want[n]["bias"].float() for n in names)
        y = torch.nn.functional.linear(x, kernels.wrap(weight.to(torch.float32), torch.float32), bias)
        assert relative(y, sum(want[n]["y_w4a4_f64"] for n in names)) < 2e-2

    def test_second_version_names_give_the_same_model(self, tmp_path):
        """FLUX.1 as the python engine names it."""
        blocks = {
            "qkv_proj_context": "attn.add_qkv_proj", "qkv_proj": "attn.to_qkv", "out_proj_context": "attn.to_add_out",
            "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
            "norm_added_q": "attn.norm_added_q", "norm_added_k": "attn.norm_added_k",
            "norm_q": "attn.norm_q", "norm_k": "attn.norm_k",
        }  # fmt: skip
        double = {"out_proj": "attn.to_out.0", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2"}
        ends = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor"}
        out = {}
        for name, value in raw(FLUX).items():
            for a, b in {
                **blocks,
                **(double if name.startswith("transformer") else {"out_proj": "attn.to_out"}),
            }.items():
                if f".0.{a}." in name:
                    name = name.replace(f".0.{a}.", f".0.{b}.")
                    break
            stem, _, last = name.rpartition(".")
            out[f"{stem}.{ends.get(last, last)}"] = value
        save_file(out, tmp_path / "v2.safetensors")
        one, two = load(FLUX), load(tmp_path / "v2.safetensors")
        assert one.layers.keys() == two.layers.keys() and one.dense.keys() == two.dense.keys()
        for name, layer in one.layers.items():
            assert torch.equal(parts.dequantize(layer.weight), parts.dequantize(two.layers[name].weight)), name
        assert all(torch.equal(t, two.dense[n]) for n, t in one.dense.items())

    def test_split_q_k_v_are_the_rows_of_the_fused_layer(self):
        layers, want = load(QWEN).layers, expected(QWEN)
        fused = want["transformer_blocks.0.attn.add_qkv_proj"]
        rows = [packing.unpack_signed(layers[f"transformer_blocks.0.attn.add_{n}_proj"].weight.qweight) for n in "qkv"]
        assert torch.equal(torch.cat(rows), fused["w_codes"])

    def test_z_image_gate_is_w3_then_w1_and_never_unsigned(self, tmp_path):
        base = nunchaku.read(raw(DATA / "a_svdq_int4_linear.safetensors"), "f")[ALONE].weight  # 256 x 256
        tensors = {"cap_embedder.1.weight": torch.ones(2, 2), "all_x_embedder.2-1.weight": torch.ones(2, 2)}
        for name in ("attention.to_qkv", "attention.to_out.0", "feed_forward.net.0.proj", "feed_forward.net.2"):
            tensors |= {n: t.clone() for n, t in nunchaku.write(f"layers.0.{name}", base, v2=True).items()}
        for n in "qkv":
            tensors[f"noise_refiner.0.attention.to_{n}.weight"] = torch.full((2, 2), float(ord(n)))
        for n in ("attention.norm_q.weight",):
            tensors[f"layers.0.{n}"] = torch.ones(2)
        save_file(tensors, tmp_path / "z.safetensors")
        found = load(tmp_path / "z.safetensors")
        w3, w1 = (found.layers[f"layers.0.feed_forward.{n}"].weight for n in ("w3", "w1"))
        assert torch.equal(torch.cat([w3.qweight, w1.qweight]), base.qweight)
        assert not found.layers["layers.0.feed_forward.w2"].weight.act_unsigned
        assert {"layers.0.attention.qkv", "layers.0.attention.out"} < found.layers.keys()
        assert found.dense["noise_refiner.0.attention.qkv.weight"].shape == (6, 2)
        assert {"x_embedder.weight", "layers.0.attention.q_norm.weight"} < found.dense.keys()

    def test_padding_is_sliced_off(self, tmp_path):
        """SANA's width 2240 stands in 2304; here 192 in 256."""
        n = 192
        base = nunchaku.read(raw(DATA / "a_svdq_int4_linear.safetensors"), "f")[ALONE].weight
        tensors = nunchaku.write("transformer_blocks.0.cross_attn.q_linear", base)
        tensors["transformer_blocks.0.cross_attn.q_linear.bias"] = nunchaku.write_bias(torch.arange(256.0)).bfloat16()
        config = {"num_attention_heads": 3, "attention_head_dim": 64}
        save_file(tensors, tmp_path / "sana.safetensors", {"config": json.dumps(config)})
        found = load(tmp_path / "sana.safetensors")
        w = found.layers["transformer_blocks.0.cross_attn.q_linear"].weight
        assert w.shape == (n, n)
        assert torch.equal(w.qweight, base.qweight[:n, : n // 2]) and torch.equal(w.wscales, base.wscales[:3, :n])
        assert found.dense["transformer_blocks.0.cross_attn.q_linear.bias"].tolist() == list(range(n))

    def test_nvfp4_parts_stay_apart_and_run(self, tmp_path):
        """Two nvfp4 halves of linear2 have scales of their own, which no joined block scale can hold."""
        tensors = {}
        one = nunchaku.read(raw(NVFP4), "f")[ALONE].weight
        two = replace(one, channel_scale=one.channel_scale * 2)
        for stem, names in (("transformer_blocks.0.", ("qkv_proj",)),
                            ("single_transformer_blocks.0.", ("qkv_proj", "mlp_fc1", "out_proj"))):  # fmt: skip
            for n in names:
                tensors |= {k: v.clone() for k, v in nunchaku.write(stem + n, one).items()}
        tensors |= {k: v.clone() for k, v in nunchaku.write("single_transformer_blocks.0.mlp_fc2", two).items()}
        save_file(tensors, tmp_path / "fp4.safetensors")
        layers = load(tmp_path / "fp4.safetensors").layers
        w = layers["single_blocks.0.linear2"].weight
        assert (
            isinstance(w, Parts)
            and w.axis == "columns"
            and layers["single_blocks.0.linear1"].weight.shape == (512, 256)
        )
        x = expected(NVFP4)[ALONE]["x"].float()
        y = torch.nn.functional.linear(torch.cat([x, x], 1), kernels.wrap(w.to(torch.float32), torch.float32))
        reference = nvfp4_lowrank.linear(x, one.to(torch.float32)) + nvfp4_lowrank.linear(x, two.to(torch.float32))
        assert relative(y, reference) < 1e-5


class TestLite:
    def test_folder_is_read_whole_and_stays_signed(self):
        found = load(DATA / "f_lite_int4")
        want = expected(DATA / "f_lite_int4" / "diffusion_pytorch_model.safetensors")
        assert found.layers.keys() == want.keys()
        again = load(DATA / "f_lite_int4" / "diffusion_pytorch_model.safetensors")
        assert again.layers.keys() == want.keys() and again.name == "diffusion_pytorch_model.safetensors"
        w = found.layers["final_linear"].weight
        assert torch.equal(packing.unpack_unsigned(w.qweight), want["final_linear"]["w_codes"])

    def test_names_that_nunchaku_would_shift_are_left_alone(self, tmp_path):
        """A Qwen-Image in Lite: fc2 signed, modulation rows in order, no 1 to take off."""
        keep = ("img_mod.1", "img_mlp.net.2")
        tensors = {n: t for n, t in raw(QWEN).items() if any(k in n for k in keep) and "_orig" not in n}
        tensors["transformer_blocks.0.attn.add_q_proj.weight"] = torch.ones(8, 8)
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "nunchaku_lite"}}))
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
        found = load(tmp_path)
        assert not found.layers["transformer_blocks.0.img_mlp.net.2"].weight.act_unsigned
        name = "transformer_blocks.0.img_mod.1"
        stored = nunchaku.read(dict(tensors), "f")[name].weight
        assert torch.equal(found.layers[name].weight.qweight, stored.qweight)
        assert torch.equal(found.dense[f"{name}.bias"], tensors[f"{name}.bias"])

    def test_shards_are_one_model_and_a_missing_one_is_named(self, tmp_path):
        source = raw(DATA / "f_lite_int4" / "diffusion_pytorch_model.safetensors")
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        where = {n: names[n.startswith("layers")] for n in source}
        for file in names:
            save_file({n: t for n, t in source.items() if where[n] == file}, tmp_path / file)
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        config = (DATA / "f_lite_int4" / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        assert load(tmp_path).layers.keys() == load(tmp_path / names[1]).layers.keys() == expected_names()
        (tmp_path / names[0]).unlink()
        with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors: this part of the folder is not there"):
            load(tmp_path)


def expected_names():
    return expected(DATA / "f_lite_int4" / "diffusion_pytorch_model.safetensors").keys()


def test_older_folders_of_two_files_are_one_model(tmp_path):
    blocks = {n: t for n, t in raw(FLUX).items() if "transformer_blocks" in n}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    rest = {n: t for n, t in raw(FLUX).items() if n not in blocks}
    save_file(rest, tmp_path / "unquantized_layers.safetensors")
    one, two = load(FLUX), load(tmp_path / "transformer_blocks.safetensors")
    assert one.layers.keys() == two.layers.keys() and one.dense.keys() == two.dense.keys()
