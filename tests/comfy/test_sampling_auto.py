"""Which preset a real server's graph gets by itself, and which runs it refuses in a sentence."""

import json
import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble.families import PRESETS
from comfyui_nibble.sampling.presets import preset
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import sampling_graphs
from sampling_graphs import base, few, ksampler, node, save

further, installed = sampling_graphs.further, sampling_graphs.installed

FULL_LCM = [p.id for p in PRESETS.values() if p.omega is not None]


@pytest.mark.parametrize("id", FULL_LCM)
def test_a_full_lcm_samples_in_a_server(id, server, tiny):
    """Its own file carries the guidance embedding, which decides without a name; without it, a sentence."""

    family = preset(id).family
    name = f"unnamed-{family}.safetensors"
    target = server.models("diffusion_models") / name
    projection = torch.randn(320, 256, generator=torch.Generator().manual_seed(1)) / 16
    save_file(load_file(tiny(family)) | {"time_embedding.cond_proj.weight": projection}, target)
    graph = base(family, name)
    graph |= {"sample": few("auto"), "save": save(["sample", 0], id)}
    result = server.done(graph)
    assert torch.isfinite(server.latent(result, "save")).all()
    assert result.text("sample").startswith(f"preset {id}: {name} holds the guidance embedding")
    # By the node, at the preset's own scale: the same picture.
    guided = base(family, name)
    guided["lcm"] = node("NibbleLCMGuidance", model=["model", 0], unet_name=name, scale=8.0)
    guided |= {"sample": few("auto", model="lcm"), "save": save(["sample", 0], id)}
    by_node = server.done(guided)
    assert torch.equal(server.latent(by_node, "save"), server.latent(result, "save"))
    guided["lcm"]["inputs"]["scale"] = 2.0
    assert not torch.equal(server.latent(server.done(guided), "save"), server.latent(result, "save"))


def test_a_full_lcm_without_its_embedding_is_refused(server, installed):
    name = installed("sd15")
    graph = base("sd15", name) | {"sample": few("lcm_full_sd15"), "save": save(["sample", 0], "x")}
    assert "needs the guidance embedding of a full LCM" in server.run(graph).error
    graph["lcm"] = node("NibbleLCMGuidance", model=["model", 0], unet_name=name, scale=8.0)
    graph["sample"] = few("auto", model="lcm")
    assert "this file has no guidance embedding" in server.run(graph).error


def lora_file(server, name: str, layer: str, shape: tuple[int, int]) -> str:
    """A small LoRA of one layer in a name that ComfyUI reads."""
    g = torch.Generator().manual_seed(2)
    up, down = torch.randn(shape[0], 4, generator=g) / 50, torch.randn(4, shape[1], generator=g) / 50
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, server.models("loras") / name)
    return name


def test_auto_reads_the_name_of_the_lora(server, installed):
    graph = base("sd15", installed("sd15"))
    name = lora_file(server, "lcm-lora-sdv1-5.safetensors", "diffusion_model.time_embed.2", (1280, 1280))
    graph["lora"] = node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=0.7)
    graph |= {"sample": few("auto", model="lora"), "save": save(["sample", 0], "auto")}
    text = server.done(graph).text("sample")
    assert text.startswith(f"preset lcm_lora_sd15: the file name {name} matches LCM-LoRA")
    assert f"note: {name} is applied at 0.7; it is made for 1" in text


def test_auto_reads_metadata_before_names(server, installed):
    graph = base("sd15", installed("sd15"))
    weights = {"diffusion_model.time_embed.2.lora_up.weight": torch.zeros(1280, 4),
               "diffusion_model.time_embed.2.lora_down.weight": torch.zeros(4, 1280)}  # fmt: skip
    record = {"nibble": json.dumps({"preset": "tcd_sd15"})}
    save_file(weights, server.models("loras") / "my-lcm.safetensors", record)
    graph["lora"] = node("LoraLoaderModelOnly", model=["model", 0], lora_name="my-lcm.safetensors", strength_model=1.0)
    graph |= {"sample": few("auto", model="lora"), "save": save(["sample", 0], "auto")}
    assert server.done(graph).text("sample").startswith("preset tcd_sd15: the metadata of my-lcm.safetensors")


@pytest.mark.parametrize(
    ("family", "name", "id"),
    [
        ("sdxl", "sd_xl_turbo_1.0_fp16.safetensors", "sdxl_turbo"),
        ("sdxl", "sdxl_lightning_8step.safetensors", "lightning_sdxl"),
        ("flux_schnell", "whatever.safetensors", "flux_schnell"),
        ("flux2", "flux-2-klein-4b.safetensors", "flux2_klein"),
    ],
)
def test_auto_reads_the_file_and_the_class(family, name, id, server, installed):
    graph = base(family, installed(family, name))
    graph |= {"sample": few("auto"), "save": save(["sample", 0], "auto")}
    text = server.done(graph).text("sample")
    assert text.startswith(f"preset {id}: ")
    assert f"{preset(id).steps if '8step' not in name else 8} steps" in text


def test_auto_works_on_a_4bit_file(server, tiny_4bit, installed):
    """The pack's own loader leaves word of the file, too."""
    target = server.models("diffusion_models") / "sd15-lcm-4bit.safetensors"
    target.symlink_to(tiny_4bit("sd15"))
    graph = base("sd15", target.name)
    graph["model"] = node("NibbleLoadModel", model_name=target.name)
    graph |= {"sample": few("auto"), "save": save(["sample", 0], "auto")}
    result = server.done(graph)
    assert result.text("sample").startswith("preset lcm_lora_sd15: the file name sd15-lcm-4bit.safetensors")
    assert torch.isfinite(server.latent(result, "save")).all()


def test_a_full_lcm_in_4_bits_keeps_its_guidance(server, tiny, tmp_path):
    """``nibble quantize`` carries the embedding along; the 4-bit model's bias is patched as any other."""
    from comfyui_nibble.headless.cli import main

    projection = torch.randn(320, 256, generator=torch.Generator().manual_seed(1)) / 16
    save_file(load_file(tiny("sd15")) | {"time_embedding.cond_proj.weight": projection}, tmp_path / "full.safetensors")
    target = server.models("diffusion_models") / "full-4bit.safetensors"
    assert main(["quantize", str(tmp_path / "full.safetensors"), "--out", str(target), "--rank", "16"]) == 0
    graph = base("sd15", target.name)
    graph["model"] = node("NibbleLoadModel", model_name=target.name)
    graph |= {"sample": few("auto"), "save": save(["sample", 0], "auto")}
    result = server.done(graph)
    assert result.text("sample").startswith("preset lcm_full_sd15: full-4bit.safetensors holds the guidance")
    plain = graph | {"sample": few("lcm_lora_sd15")}
    guided = server.latent(result, "save")
    assert torch.isfinite(guided).all() and not torch.equal(guided, server.latent(server.done(plain), "save"))


@pytest.mark.parametrize(
    ("family", "name", "sampler", "message"),
    [
        ("flux", "", few("lightning_sdxl"), "preset lightning_sdxl is for SDXL and this model is FLUX.1-dev"),
        ("sd15", "", few("auto"), "no few-step preset was recognised for this SD 1.5 model (looked at: few-sd15"),
        ("sd15", "", few("lcm_lora_sd15", 4, 0.05), "4 steps do not fit into the 2 trained timesteps"),
        ("sd15", "", few("instaflow", 0, 0.5), "has no image-to-image form"),
        ("sd15", "sdxl_lightning_4step_lora.safetensors", few("auto"), "no few-step preset was recognised"),
    ],
)
def test_refusals(family, name, sampler, message, server, installed):
    graph = base(family, installed(family, name)) | {"sample": sampler, "save": save(["sample", 0], "x")}
    result = server.run(graph)
    assert result.status == "error" and message in result.error


def test_a_lora_of_another_family_is_named(server, installed):
    graph = base("sd15", installed("sd15"))
    name = lora_file(server, "sdxl_lightning_4step_lora.safetensors", "diffusion_model.time_embed.2", (1280, 1280))
    graph["lora"] = node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=1.0)
    graph |= {"sample": few("auto", model="lora"), "save": save(["sample", 0], "x")}
    error = server.run(graph).error
    assert "preset lightning_sdxl is for SDXL and this model is SD 1.5" in error and name in error


def test_tcd_on_lcm_sampling_is_refused(server, installed):
    graph = base("sd15", installed("sd15"))
    graph["lcm"] = node("ModelSamplingDiscrete", model=["model", 0], sampling="lcm", zsnr=False)
    graph |= {"sample": few("tcd_sd15", model="lcm"), "save": save(["sample", 0], "x")}
    assert "take ModelSamplingDiscrete (lcm)" in server.run(graph).error


def test_denoise_zero_returns_the_latent(server, installed):
    graph = base("sd15", installed("sd15")) | {"picture": ksampler(1, "euler", "simple")}
    graph |= {"same": few("hyper_sd15", 4, 0.0, "picture"), "a": save(["same", 0], "a"), "b": save(["picture", 0], "b")}
    result = server.done(graph)
    assert torch.equal(server.latent(result, "a"), server.latent(result, "b"))
