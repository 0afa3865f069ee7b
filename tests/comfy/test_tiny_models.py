"""4-bit files of every family in a real server: stock KSampler and SaveLatent, against the float model."""

import shutil

import pytest
import torch

FAMILIES = {
    # family: (latent node, conditioning width, pooled width, cfg, scheduler)
    "sd15": ("EmptyLatentImage", 768, 0, 4.0, "normal"),
    "sdxl": ("EmptyLatentImage", 2048, 1280, 4.0, "normal"),
    "flux": ("EmptySD3LatentImage", 64, 64, 1.0, "simple"),
    "flux2": ("EmptyFlux2LatentImage", 64, 0, 1.0, "simple"),
    "sd3": ("EmptySD3LatentImage", 128, 128, 4.0, "simple"),
}


def workflow(family: str, loader: dict, batch: int = 1, size: int = 128) -> dict:
    latent, width, pooled, cfg, scheduler = FAMILIES[family]
    return {
        "model": loader,
        "pos": {"class_type": "NibbleTestConditioning", "inputs": dict(tokens=20, width=width, pooled=pooled, seed=1)},
        "neg": {"class_type": "NibbleTestConditioning", "inputs": dict(tokens=20, width=width, pooled=pooled, seed=2)},
        "latent": {"class_type": latent, "inputs": dict(width=size, height=size, batch_size=batch)},
        "sample": {"class_type": "KSampler", "inputs": dict(
            model=["model", 0], positive=["pos", 0], negative=["neg", 0], latent_image=["latent", 0], seed=5, steps=4,
            cfg=cfg, sampler_name="euler", scheduler=scheduler, denoise=1.0)},
        "save": {"class_type": "SaveLatent", "inputs": dict(samples=["sample", 0], filename_prefix=f"t/{family}")},
    }  # fmt: skip


def nibble(name: str) -> dict:
    return {"class_type": "NibbleLoadModel", "inputs": {"model_name": name}}


def stock(name: str) -> dict:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}}


@pytest.fixture
def installed(server, tiny, tiny_4bit):
    """installed(family) -> (float name, 4-bit name) in the server's models/diffusion_models."""

    def put(family: str) -> tuple[str, str]:
        names = []
        for path in (tiny(family), tiny_4bit(family)):
            target = server.models("diffusion_models") / path.name
            if not target.exists():
                target.symlink_to(path)
            names.append(path.name)
        return tuple(names)

    return put


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_like_the_float_model(family, server, installed):
    float_name, name = installed(family)
    expected = server.latent(server.done(workflow(family, stock(float_name))), "save").flatten().double()
    got = server.latent(server.done(workflow(family, nibble(name))), "save").flatten().double()
    assert torch.isfinite(got).all()
    cosine = torch.nn.functional.cosine_similarity(expected, got, dim=0).item()
    assert cosine > 0.93
    assert not torch.equal(expected, got)


@pytest.mark.parametrize("family", FAMILIES)
def test_takes_the_bytes_of_its_file(family, server, installed, tiny_4bit):
    _, name = installed(family)
    graph = {"model": nibble(name), "size": {"class_type": "NibbleTestModelSize", "inputs": {"model": ["model", 0]}}}
    size = int(server.done(graph).text("size"))
    assert abs(size / tiny_4bit(family).stat().st_size - 1) < 0.01


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_batches_and_odd_sizes(family, server, installed):
    """Batch 3 equals three single pictures' shapes and stays finite; 136 is no multiple of 64."""
    _, name = installed(family)
    got = server.latent(server.done(workflow(family, nibble(name), batch=3, size=144)), "save")
    assert got.shape[0] == 3 and got.shape[-1] == 18 and torch.isfinite(got).all()


def test_a_float_file_loads_as_the_stock_loader_loads_it(server, installed):
    float_name, _ = installed("flux")
    one = server.latent(server.done(workflow("flux", stock(float_name))), "save")
    two = server.latent(server.done(workflow("flux", nibble(float_name))), "save")
    assert torch.equal(one, two)


def test_saves_and_loads_again_unchanged(server, installed):
    """NibbleSaveModel writes where NibbleLoadModel lists; the reloaded model samples bit for bit the same."""
    _, name = installed("sd3")
    graph = workflow("sd3", nibble(name))
    before = server.latent(server.done(graph), "save")
    graph["file"] = {
        "class_type": "NibbleSaveModel",
        "inputs": dict(model=["model", 0], filename_prefix="diffusion_models/again"),
    }
    saved = server.done(graph).text("file")
    assert saved == "diffusion_models/again_00001_.safetensors"
    after = server.latent(server.done(workflow("sd3", nibble(saved.split("/")[1]))), "save")
    assert torch.equal(before, after)


def test_checkpoint_with_text_encoder_and_vae_is_split(server, inside, tmp_path):
    """NibbleLoadCheckpoint on a whole SD1.5-style checkpoint, quantized by the command line."""
    from comfyui_nibble.headless.cli import main

    inside("whole_checkpoint", tmp_path / "whole.safetensors")
    assert (
        main(
            [
                "quantize",
                str(tmp_path / "whole.safetensors"),
                "--out",
                str(tmp_path / "whole4.safetensors"),
                "--rank",
                "16",
            ]
        )
        == 0
    )
    shutil.copy(tmp_path / "whole4.safetensors", server.models("checkpoints") / "whole4.safetensors")
    graph = {
        "ckpt": {"class_type": "NibbleLoadCheckpoint", "inputs": {"ckpt_name": "whole4.safetensors"}},
        "pos": {"class_type": "CLIPTextEncode", "inputs": dict(clip=["ckpt", 1], text="a fox")},
        "latent": {"class_type": "EmptyLatentImage", "inputs": dict(width=64, height=64, batch_size=1)},
        "sample": {"class_type": "KSampler", "inputs": dict(
            model=["ckpt", 0], positive=["pos", 0], negative=["pos", 0], latent_image=["latent", 0], seed=5, steps=2,
            cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)},
        "decode": {"class_type": "VAEDecode", "inputs": dict(samples=["sample", 0], vae=["ckpt", 2])},
        "save": {"class_type": "SaveImage", "inputs": dict(images=["decode", 0], filename_prefix="whole")},
        "size": {"class_type": "NibbleTestModelSize", "inputs": {"model": ["ckpt", 0]}},
    }  # fmt: skip
    result = server.done(graph)
    assert server.image(result, "save").shape == (64, 64, 3)
    assert int(result.text("size")) < 0.5 * 61.8 * 2**20
