"""A bad file in a real server: one sentence that names file, layer and remedy, and the server goes on."""

import pytest
import torch
from comfyui_nibble.checkpoints.formats import comfy_quant
from safetensors.torch import load_file, save_file

LAYER = "double_blocks.0.img_attn.proj"
CASES = {
    "truncated": ("truncated.safetensors: not a whole safetensors file (it is truncated). Download",),
    "not_safetensors": ("not_safetensors.safetensors: not a whole safetensors file",),
    "wrong_part": (f"wrong_part.safetensors, layer {LAYER}: svdquant_w4a4: wscales has shape", "Write the file again"),
    "wrong_shape": ("wrong_shape.safetensors, layer ", "does not fit the model", "Download or write the file again"),
    "wrong_dense": ("wrong_dense.safetensors, layer ", "does not fit the model", "Download or write the file again"),
    "missing_layer": (f"missing_layer.safetensors, layer {LAYER}: the model has this layer and the file does not",),
    "unknown_format": (f"layer {LAYER}: format 'svdquant_w2a2' is unknown to this version", "Update this pack"),
    "k_not_64": (f"layer {LAYER}: svdquant_w4a4: K=100 is not a multiple of 64. Write the file again",),
    "no_model": ("no_model.safetensors: ComfyUI does not recognise the model in it. Use the loader",),
}


@pytest.fixture
def bad(server, tiny_4bit):
    """bad(case) -> name of the broken file in the server's models."""

    def make(case: str) -> str:
        path = server.models("diffusion_models") / f"{case}.safetensors"
        good = tiny_4bit("flux")
        tensors = load_file(good)
        if case == "truncated":
            path.write_bytes(good.read_bytes()[:-1000])
        elif case == "not_safetensors":
            path.write_bytes(b"<html>404 not found</html>" * 40)
        elif case == "wrong_part":
            save_file(tensors | {f"{LAYER}.weight_scale": torch.zeros(3, 256)}, path)
        elif case == "wrong_shape":
            other = {
                k.replace("txt_mlp.0", "img_attn.proj"): v.clone() for k, v in tensors.items() if ".txt_mlp.0." in k
            }
            save_file(tensors | other, path)
        elif case == "wrong_dense":
            save_file(tensors | {"img_in.weight": torch.zeros(100, 64)}, path)
        elif case == "missing_layer":
            save_file({k: v for k, v in tensors.items() if not k.startswith(LAYER)}, path)
        elif case == "unknown_format":
            config = comfy_quant.encode_config({"format": "svdquant_w2a2"})
            save_file(tensors | {f"{LAYER}.comfy_quant": config}, path)
        elif case == "k_not_64":
            parts = {"weight": torch.zeros(256, 50, dtype=torch.int8), "weight_scale": torch.zeros(1, 256)}
            parts |= {"smooth_factor": torch.ones(100), "proj_down": torch.zeros(100, 16)}
            save_file(tensors | {f"{LAYER}.{k}": v for k, v in parts.items()}, path)
        elif case == "no_model":
            save_file({k.replace("double_blocks", "blobs"): v for k, v in tensors.items()}, path)
        return path.name

    return make


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_the_server_goes_on(case, server, bad):
    result = server.run({
        "model": {"class_type": "NibbleLoadModel", "inputs": {"model_name": bad(case)}},
        "size": {"class_type": "NibbleTestModelSize", "inputs": {"model": ["model", 0]}},
    })  # fmt: skip
    assert result.status == "error"
    for part in CASES[case]:
        assert part in result.error
    assert len(result.error.strip().splitlines()) == 1
    assert str(server.base) not in result.error
    assert server.get("/system_stats")["system"]["comfyui_version"]


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "x.ckpt", "gone.safetensors", "a\0b.safetensors"]
)
@pytest.mark.parametrize(
    ("node", "field"),
    [("NibbleLoadModel", "model_name"), ("NibbleLoadCheckpoint", "ckpt_name"), ("NibbleInspect", "file")],
)
def test_names_outside_the_list_never_reach_a_file(name, node, field, server):
    """A stranger's workflow can put anything into a combo; ComfyUI refuses what is not listed."""
    reply = server.post("/prompt", {"prompt": {
        "n": {"class_type": node, "inputs": {field: name}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["n", 0]}},
    }})  # fmt: skip
    assert reply["http"] == 400
    assert "not in list" in str(reply)


def test_saving_never_leaves_the_output_folder(server, tiny_4bit):
    target = server.models("diffusion_models") / "flux-4bit.safetensors"
    if not target.exists():
        target.symlink_to(tiny_4bit("flux"))
    result = server.run({
        "model": {"class_type": "NibbleLoadModel", "inputs": {"model_name": target.name}},
        "file": {"class_type": "NibbleSaveModel", "inputs": dict(model=["model", 0], filename_prefix="../../escaped")},
    })  # fmt: skip
    assert result.status == "error" and "leads out of the output folder" in result.error
    assert not list(server.base.parent.rglob("escaped*"))


def test_inspect_says_what_a_file_is(server, tiny_4bit):
    target = server.models("diffusion_models") / "sd3-4bit.safetensors"
    if not target.exists():
        target.symlink_to(tiny_4bit("sd3"))
    text = server.done({
        "n": {"class_type": "NibbleInspect", "inputs": {"file": "diffusion_models/sd3-4bit.safetensors"}}
    }).text("n")  # fmt: skip
    assert "**sd3-4bit.safetensors**: Stable Diffusion 3" in text
    assert "| svdquant_w4a4 | 13 |" in text and "| awq_w4a16 | 4 |" in text
    assert "embedder, norm or output layer" in text
