"""Sources and files in a real server: quantized models are no source, shards are one model, and what is saved loads."""

import json

import pytest
import torch
from comfyui_nibble.checkpoints import convert, folder
from comfyui_nibble.checkpoints.header import read
from comfyui_nibble.checkpoints.source import open_source
from safetensors.torch import load_file, save_file

from .test_calibrate import calibrated
from .test_tiny_models import nibble, stock, workflow


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """quantized(format) -> a tiny SD3 in one of ComfyUI's own formats."""
    at = tmp_path_factory.mktemp("core")

    def make(fmt: str):
        path = at / f"{fmt}.safetensors"
        if not path.exists():
            with open_source(tiny("sd3")) as source:
                convert.quantize(source, path, convert.Options(target=fmt))
        return path

    return make


def by_metadata(path, out) -> None:
    """``path`` with its marks in the metadata only, as ComfyUI's older files have them."""
    tensors = load_file(path)
    marks = {n.removesuffix(".comfy_quant"): json.loads(bytes(tensors.pop(n).tolist()))
             for n in list(tensors) if n.endswith(".comfy_quant")}  # fmt: skip
    save_file(tensors, out, {"_quantization_metadata": json.dumps({"layers": marks})})


def put(server, path, name: str) -> str:
    target = server.models("diffusion_models") / name
    if not target.exists():
        target.write_bytes(path.read_bytes())
    return name


@pytest.mark.parametrize("where", ["layers", "metadata"])
@pytest.mark.parametrize("fmt", ["int8_tensorwise", "nvfp4", "convrot_w4a4", "asym_w4a8_int8"])
def test_calibrate_and_loftq_refuse_a_quantized_model(fmt, where, server, quantized, tmp_path):
    path = quantized(fmt)
    if where == "metadata":
        by_metadata(path, tmp_path / "old.safetensors")
        path = tmp_path / "old.safetensors"
    name = put(server, path, f"{fmt}-{where}.safetensors")
    graph = calibrated("sd3", name, preset="data_free")
    loftq = {"class_type": "NibbleLoftQ", "inputs": dict(
        model=["float", 0], rank=4, base_rank=0, rounds=1, name="loras/refused")}  # fmt: skip
    for made in (graph["model"], loftq):
        result = server.run({**graph, "model": made})
        assert result.status == "error"
        assert f"This model is quantized already (layer joint_blocks.0.context_block.attn.qkv: {fmt})" in result.error
        assert "16-bit original" in result.error
    assert not list((server.base / "output").rglob("refused*"))


def test_fp8_counts_as_numbers(server, tiny, tmp_path):
    """Scaled fp8, which the node says it takes: its weights are read with their scales."""
    tensors = load_file(tiny("sd3"))
    names = [n for n, t in tensors.items() if n.startswith("joint_blocks") and n.endswith(".weight") and t.dim() == 2]
    for n in names:
        scale = tensors[n].abs().max() / 448
        tensors[n] = (tensors[n] / scale).to(torch.float8_e4m3fn)
        tensors[n.removesuffix("weight") + "scale_weight"] = scale
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    name = put(server, tmp_path / "fp8.safetensors", "sd3-fp8.safetensors")
    result = server.done(calibrated("sd3", name, preset="data_free"))
    expected = server.latent(server.done(workflow("sd3", stock(put(server, tiny("sd3"), "sd3-whole.safetensors")),
                                                  size=64)), "save")  # fmt: skip
    got = server.latent(result, "save")
    assert torch.nn.functional.cosine_similarity(expected.flatten(), got.flatten(), dim=0) > 0.97


def test_one_shard_loads_as_the_whole_model(server, tiny_4bit, tiny):
    at = server.models("diffusion_models")
    for source in (tiny_4bit("flux"), tiny("flux")):
        tensors, stem = load_file(source), f"sharded-{source.stem}"
        names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        where = {n: names[i % 2] for i, n in enumerate(sorted(tensors))}
        for file in names:
            save_file({n: t for n, t in tensors.items() if where[n] == file}, at / file)
        (at / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        whole = put(server, source, f"whole-{source.name}")
        expected, *got = (
            server.latent(server.done(workflow("flux", nibble(n), size=64)), "save") for n in (whole, *names)
        )
        assert all(torch.equal(expected, x) for x in got)
    (at / f"{stem}.safetensors.index.json").unlink()
    error = server.run(workflow("flux", nibble(names[0]), size=64)).error
    assert f"{names[0]}: it is part 1 of 2 of a model, and {stem}.safetensors.index.json is not beside it" in error


def test_a_workflow_that_is_too_large_is_left_out_of_the_file(server, tiny_4bit):
    name = put(server, tiny_4bit("sd3"), "sd3-to-save.safetensors")
    graph = workflow("sd3", nibble(name), size=64)
    save = dict(model=["model", 0], filename_prefix="diffusion_models/large")
    graph["file"] = {"class_type": "NibbleSaveModel", "inputs": save}
    extra = {"extra_pnginfo": {"workflow": {"nodes": ["x" * 1000] * 5000}, "other": {"small": True}}}
    reply = server.post("/prompt", {"prompt": graph, "client_id": server.client, "extra_data": extra})
    result = server.wait(reply["prompt_id"])
    assert result.status == "success", result.error
    path = server.base / "output" / result.text("file")
    metadata = read(path).metadata
    assert metadata.keys() >= {"nibble", "prompt", "other"} and "workflow" not in metadata
    assert f"{path.name}: its metadata entry workflow (4.8 MiB) is left out" in server.log.read_text(errors="replace")
    again = server.latent(server.done(workflow("sd3", nibble(path.name), size=64)), "save")
    assert torch.equal(server.latent(result, "save"), again)
    assert folder.files(path) == [path]
