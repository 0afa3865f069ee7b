"""bitsandbytes against its own code, and stored codes as a layer: values equal, codes kept, joined and cut alike."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import bnb, comfy_quant
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.quant import kernels, parts, weight_only
from comfyui_nibble.quant.weight_only import WeightOnly
from safetensors.torch import load_file, save_file

from .fixtures import blocks

BNB = Path(__file__).resolve().parent.parent / "data" / "bnb"  # written by bitsandbytes 0.50.2 on a CPU


class TestBitsandbytes:
    def test_values_equal_its_own(self):
        found, want = load(BNB / "layers.safetensors"), load_file(BNB / "layers.expected.safetensors")
        assert found.layers.keys() == want.keys() and not found.dense
        for name, layer in found.layers.items():
            assert torch.equal(weight_only.dequantize(layer.weight).to(torch.bfloat16), want[name]), name
            assert layer.form == name.split(".")[2][:3]

    def test_inspect_reads_shapes_and_bits(self):
        rows = {r.layer: r for r in inspect(BNB / "layers.safetensors").rows}
        plain, nested = rows["blocks.0.nf4_320"], rows["blocks.0.nf4_nested_320"]
        assert (plain.n, plain.k, plain.scheme) == (320, 256, "nf4")
        assert 4.5 < plain.bits < 4.52 and 4.1 < nested.bits < 4.3

    @pytest.mark.parametrize(("change", "sentence"), [
        ({"absmax": None}, "nf4 needs absmax, which is not there"),
        ({"absmax": torch.ones(3)}, r"absmax has shape \(3,\)"),
        ({"quant_map": torch.full((16,), float("nan"))}, "its scales hold NaN"),
        ({"": torch.zeros(5, dtype=torch.uint8)}, "weight holds 5 bytes"),
        ({"quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}, "layer a:"),
    ])  # fmt: skip
    def test_broken_layers_are_named(self, change, sentence, tmp_path):
        state = torch.tensor(list(json.dumps({"shape": [8, 64], "blocksize": 64}).encode()), dtype=torch.uint8)
        parts = {"": torch.zeros(256, 1, dtype=torch.uint8), "absmax": torch.ones(8), "quant_map": torch.ones(16)}
        parts |= {"quant_state.bitsandbytes__nf4": state} | change
        tensors = {f"a.weight{'.' * bool(n)}{n}": t for n, t in parts.items() if t is not None}
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=sentence):
            load(tmp_path / "bad.safetensors")

    def test_split_q_k_v_of_diffusers_become_one_layer(self, tmp_path):
        """A FLUX.1 of diffusers in NF4: rows joined without touching a code."""
        source = load_file(BNB / "layers.safetensors")
        layer = {n.split(".weight")[1]: t for n, t in source.items() if n.startswith("blocks.0.nf4_320.")}
        tensors = {"single_transformer_blocks.0.norm.linear.bias": torch.ones(2)}
        for stem, names in (("transformer_blocks.0.attn.", ("add_q_proj", "add_k_proj", "add_v_proj")),
                            ("single_transformer_blocks.0.",
                             ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))):  # fmt: skip
            tensors |= {f"{stem}{n}.weight{end}": t.clone() for n in names for end, t in layer.items()}
        save_file(tensors, tmp_path / "flux.safetensors")
        found = load(tmp_path / "flux.safetensors")
        one = load(BNB / "layers.safetensors").layers["blocks.0.nf4_320"].weight
        w = found.layers["single_blocks.0.linear1"].weight
        assert w.shape == (1280, 256) and torch.equal(w.qdata, one.qdata.repeat(4, 1))
        assert torch.equal(weight_only.dequantize(w), weight_only.dequantize(one).repeat(4, 1))
        assert found.layers["double_blocks.0.txt_attn.qkv"].weight.shape == (960, 256)


@pytest.mark.parametrize("codec", ["nf4", "q4_k"])
def test_runs_as_the_dense_weight_and_takes_a_lora(codec, tmp_path):
    if codec == "nf4":
        w = load(BNB / "layers.safetensors").layers["blocks.0.nf4_320"].weight
    else:
        w = WeightOnly(codec, (320, 256), torch.from_numpy(blocks(codec, 320, 256)))
    x, bias, dense = torch.randn(3, 5, 256), torch.randn(320), weight_only.dequantize(w)
    wrapped = kernels.wrap(w, torch.float32)
    assert wrapped.shape == dense.shape and kernels.is_ours(wrapped)
    want = torch.nn.functional.linear(x, dense, bias)
    assert torch.allclose(torch.nn.functional.linear(x, wrapped, bias), want, atol=1e-5)
    down, up = torch.randn(256, 4), torch.randn(320, 4)
    grown = kernels.extend(wrapped, down, up)
    assert torch.allclose(torch.nn.functional.linear(x, grown, bias), want + (x @ down) @ up.t(), atol=1e-3)
    assert grown._qdata.data_ptr() == wrapped._qdata.data_ptr()
    assert torch.allclose(kernels.dense(grown), dense + up @ down.t(), atol=1e-4)
    halves = [parts.take_rows(w, 0, 160), parts.take_rows(w, 160, 320)]
    assert torch.equal(weight_only.dequantize(parts.join(halves, "rows")), dense)
    stored = comfy_quant.write("a", w)
    again = comfy_quant.read(stored, "f")["a"].weight
    assert not stored and torch.equal(again.qdata, w.qdata) and torch.equal(weight_only.dequantize(again), dense)


def test_bnb_marks_only_its_own():
    assert bnb.layers({"a.weight.quant_state.bitsandbytes__nf4": 0, "b.weight": 0}) == {"a": "nf4"}
