"""Writing and reading 4-bit files: nothing lost, everything recorded, every bad file one sentence."""

import errno
import json
import os

import pytest
import torch
from comfyui_nibble.checkpoints import convert, header, save
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import comfy_quant
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.quant import kernels, svdquant
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import flux_tensors


def quantize(source, out, **options):
    with open_source(source) as opened:
        return convert.quantize(opened, out, convert.Options(**options))


class TestRoundTrip:
    def test_layers_come_back_as_written(self, flux_4bit):
        checkpoint = load(flux_4bit)
        assert len(checkpoint.layers) == 13
        again = {}
        for name, layer in checkpoint.layers.items():
            again |= comfy_quant.write(name, layer.weight, layer.tiled)
        on_disk = load_file(flux_4bit)
        assert again.keys() <= on_disk.keys()
        assert all(torch.equal(again[k], on_disk[k]) for k in again)
        assert set(checkpoint.dense) == set(on_disk) - set(again)

    def test_every_float_tensor_is_still_there(self, flux_file, flux_4bit):
        checkpoint = load(flux_4bit)
        for name, value in load_file(flux_file).items():
            layer, _, end = name.rpartition(".")
            if layer in checkpoint.layers and end == "weight":
                assert checkpoint.layers[layer].weight.shape == tuple(value.shape)
            elif layer not in checkpoint.layers:
                assert torch.equal(checkpoint.dense[name], value)
            else:
                assert name in checkpoint.dense

    def test_tile_packed_holds_the_same_numbers(self, tmp_path):
        source = tmp_path / "wide.safetensors"
        save_file(flux_tensors(128), source)
        natural = load(quantize(source, tmp_path / "natural.safetensors", rank=16).path)
        tiled = load(quantize(source, tmp_path / "tiled.safetensors", rank=16, tiled=True).path)
        assert sum(layer.tiled for layer in tiled.layers.values()) == 10
        for name, layer in natural.layers.items():
            for field in ("qweight", "wscales", "proj_up"):
                one, other = getattr(layer.weight, field, None), getattr(tiled.layers[name].weight, field, None)
                assert one is other is None or torch.equal(one, other)

    def test_same_seed_same_file(self, flux_file, tmp_path):
        files = [
            quantize(flux_file, tmp_path / f"{i}.safetensors", rank=16, seed=s).path for i, s in enumerate((3, 3, 4))
        ]
        first, second, third = (f.read_bytes() for f in files)
        assert first == second != third

    def test_awq_branch_is_stored(self, weight):
        from comfyui_nibble.quant import awq

        q = awq.quantize(weight(64, 64))
        grown = kernels.unwrap(kernels.extend(kernels.wrap(q), torch.randn(64, 2), torch.randn(64, 2)))
        tensors = comfy_quant.write("a", grown)
        back = comfy_quant.read(tensors, "f")["a"].weight
        assert torch.equal(back.proj_up, grown.proj_up) and back.rank == 2 and not tensors


class TestRecord:
    def test_says_how_the_file_was_made(self, flux_file, flux_4bit):
        with safe_open(flux_4bit, "pt") as f:
            metadata = f.metadata()
        record = json.loads(metadata["nibble"])
        assert record["rank"] == 16 and record["group_size"] == 64 and record["family"] == "flux"
        assert record["scheme"] == "awq_w4a16 + svdquant_w4a4" and record["layers"] == 13
        assert record["source_sha256"] == save.sha256([flux_file])
        assert record["tool"].startswith("ComfyUI-Nibble 0.")
        assert record["calibration"] == {"method": "data_free", "seed": 0}
        assert metadata["modelspec.title"] == "tiny" and "secret" not in metadata

    def test_32_bit_sources_are_stored_in_the_familys_16_bits(self, tmp_path):
        source = tmp_path / "f32.safetensors"
        save_file(flux_tensors(dtype=torch.float32), source)
        checkpoint = load(quantize(source, tmp_path / "out.safetensors", rank=16).path)
        dtypes = {t.dtype for t in checkpoint.dense.values()} | {
            q.weight.wscales.dtype for q in checkpoint.layers.values()
        }
        assert dtypes == {torch.bfloat16}


class TestSave:
    def test_never_overwrites(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save.save(path, {"a": torch.ones(2)}, {})
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=r"x\.safetensors: there is a file of this name already"):
            save.save(path, {"a": torch.zeros(2)}, {})
        assert path.read_bytes() == before

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*_args):
            raise OSError(errno.ENOSPC, "No space left on device", "/home/someone/x.safetensors")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(ValueError, match=r"^x.safetensors: it cannot be written \(the disk is full\). Free some"):
            save.save(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
        assert list(tmp_path.iterdir()) == []


class TestInspect:
    def test_totals_and_reasons(self, flux_4bit):
        found = inspect(flux_4bit)
        assert found.family == "FLUX.1" and len(found.quantized) == 13
        assert found.totals()["awq_w4a16"] == {"layers": 3, "bytes": 15 * 64 * 64 * 4.5 / 8, "bits": 4.5}
        rows = {r.layer: r for r in found.rows}
        assert rows["double_blocks.0.img_mlp.2"].rank == 16
        assert rows["img_in"].scheme == "keep" and "embedder" in rows["img_in"].why
        assert found.nbytes == header.read(flux_4bit).nbytes

    def test_table_and_json_agree(self, flux_4bit):
        found = inspect(flux_4bit)
        data = json.loads(found.to_json())
        assert len(data["rows"]) == len(found.rows)
        assert found.table().count("| svdquant_w4a4 |") == 10 + 1
        assert "svdquant_w4a4" in found.table(limit=0) and "more layers" in found.table(limit=0)

    def test_a_float_file_says_what_could_be_done(self, flux_file):
        found = inspect(flux_file)
        assert not found.quantized
        assert any("the policy would make it svdquant_w4a4" in r.why for r in found.rows)

    def test_file_level_configurations_count(self, tmp_path, weight):
        """ComfyUI's older way: one JSON in the metadata instead of a tensor per layer."""
        layers = {"blocks.0.attn.q": {"format": "int8_tensorwise"}}
        path = tmp_path / "old.safetensors"
        tensors = {"blocks.0.attn.q.weight": torch.zeros(64, 64, dtype=torch.int8)}
        save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": layers})})
        assert inspect(path).rows[0].scheme == "int8_tensorwise"


def broken(name, flux_4bit, folder):
    """One deliberately bad file each, and what its sentence must say."""
    path = folder / f"{name}.safetensors"
    tensors = load_file(flux_4bit)
    layer = "double_blocks.0.img_attn.proj"
    if name == "truncated":
        path.write_bytes(flux_4bit.read_bytes()[:-1000])
    elif name == "not_safetensors":
        path.write_bytes(b"this is not a model file at all, just text of some length")
    elif name == "pickle":
        path.write_bytes(b"PK\x03\x04" + bytes(64))
    elif name == "gguf":
        path.write_bytes(b"GGUF" + bytes(64))
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "wrong_shape":
        save_file(tensors | {f"{layer}.weight_scale": torch.zeros(3, 64)}, path)
    elif name == "unknown_format":
        save_file(tensors | {f"{layer}.comfy_quant": comfy_quant.encode_config({"format": "svdquant_w2a2"})}, path)
    elif name == "missing_part":
        save_file({k: v for k, v in tensors.items() if k != f"{layer}.proj_up"}, path)
    elif name == "k_not_64":
        small = {"weight": torch.zeros(64, 50, dtype=torch.int8), "weight_scale": torch.zeros(1, 64)}
        small |= {"smooth_factor": torch.ones(100), "proj_down": torch.zeros(100, 16)}
        save_file(tensors | {f"{layer}.{k}": v for k, v in small.items()}, path)
    elif name == "not_json":
        save_file(tensors | {f"{layer}.comfy_quant": torch.tensor([1, 2, 3], dtype=torch.uint8)}, path)
    elif name == "wrong_basis":
        config = comfy_quant.config("svdquant_w4a4") | {"lowrank_branch_input_basis": "sideways"}
        save_file(tensors | {f"{layer}.comfy_quant": comfy_quant.encode_config(config)}, path)
    elif name == "float_weight":
        save_file(tensors | {f"{layer}.weight": torch.zeros(64, 64)}, path)
    elif name == "nunchaku":
        save_file({"transformer_blocks.0.qkv_proj.qweight": torch.zeros(8, 8, dtype=torch.int8)}, path)
    return path


LAYER = r"layer double_blocks\.0\.img_attn\.proj: "
SENTENCES = {
    "truncated": r"^truncated\.safetensors: not a whole safetensors file \(it is truncated\)\. Download",
    "not_safetensors": r"^not_safetensors\.safetensors: not a whole safetensors file \(its header is not valid\)\.",
    "pickle": r"^pickle\.safetensors: this is a pickle .*Convert it to safetensors first",
    "gguf": r"^gguf\.safetensors: this is a GGUF file\. Let its name end in \.gguf, and load it with",
    "empty": r"^empty\.safetensors: not a whole safetensors file",
    "wrong_shape": LAYER
    + r"svdquant_w4a4: wscales has shape \(3, 64\), expected \(1, 64\) for N=64, K=64\. Write the file again",
    "unknown_format": LAYER + r"format 'svdquant_w2a2' is unknown to this version, which reads .*Update this",
    "missing_part": LAYER + r"svdquant_w4a4 needs proj_up, which is not there\. Write the file again",
    "k_not_64": LAYER + r"svdquant_w4a4: K=100 is not a multiple of 64\. Write the file again",
    "not_json": LAYER + r"its comfy_quant entry is not JSON",
    "wrong_basis": LAYER + r"lowrank_branch_input_basis 'sideways' is neither",
    "float_weight": LAYER + r"weight is torch\.float32, svdquant_w4a4 stores int8",
    "nunchaku": r"layer transformer_blocks\.0\.qkv_proj: its 4-bit layers are in nunchaku's packing",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_bad_file_gets_one_sentence(name, flux_4bit, tmp_path):
    path = broken(name, flux_4bit, tmp_path)
    with pytest.raises(CheckpointError, match=SENTENCES[name]) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_post_smoothing_basis_is_brought_to_raw(weight):
    q = svdquant.SVDQuantWeight(
        torch.zeros(64, 32, dtype=torch.int8),
        torch.ones(1, 64),
        torch.rand(64) + 0.5,
        torch.randn(64, 4),
        torch.randn(64, 4),
    )
    tensors = comfy_quant.write("a", q)
    config = comfy_quant.config("svdquant_w4a4") | {"lowrank_branch_input_basis": "post_smoothing"}
    tensors["a.comfy_quant"] = comfy_quant.encode_config(config)
    tensors["a.proj_down"] = q.proj_down * q.smooth_factor.unsqueeze(1)
    assert torch.allclose(comfy_quant.read(tensors, "f")["a"].weight.proj_down, q.proj_down)


class TestSources:
    def test_quantized_files_are_refused(self, flux_4bit):
        with pytest.raises(CheckpointError, match="it is quantized already"):
            open_source(flux_4bit)

    def test_a_checkpoint_keeps_its_other_parts(self, tmp_path):
        inner = {f"model.diffusion_model.{k}": v for k, v in flux_tensors().items()}
        other = {"first_stage_model.decoder.conv.weight": torch.ones(4, 4), "cond.text.fc1.weight": torch.ones(64, 64)}
        save_file(inner | other, tmp_path / "whole.safetensors")
        checkpoint = load(quantize(tmp_path / "whole.safetensors", tmp_path / "out.safetensors", rank=16).path)
        assert len(checkpoint.layers) == 13
        assert all(k.startswith("model.diffusion_model.") for k in checkpoint.layers)
        assert all(torch.equal(checkpoint.dense[k], v) for k, v in other.items())

    def test_nothing_to_quantize_says_why(self, tmp_path):
        save_file({f"blocks.{i}.attn.q.weight": torch.ones(50, 50) for i in range(8)}, tmp_path / "odd.safetensors")
        with pytest.raises(
            CheckpointError, match=r"odd\.safetensors, layer blocks\.0\.attn\.q: nothing can be quantized"
        ):
            quantize(tmp_path / "odd.safetensors", tmp_path / "out.safetensors")

    def test_a_nan_names_its_layer(self, tmp_path):
        tensors = flux_tensors()
        tensors["double_blocks.0.txt_mlp.0.weight"][0, 0] = float("nan")
        save_file(tensors, tmp_path / "nan.safetensors")
        with pytest.raises(CheckpointError, match=r"layer double_blocks\.0\.txt_mlp\.0: the weight holds NaN"):
            quantize(tmp_path / "nan.safetensors", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(CheckpointError, match="not a diffusers folder"):
            open_source(tmp_path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="there is no such file"):
            open_source(tmp_path / "gone.safetensors")
