"""Few-step sampling in a real server: every preset on a tiny model, and stock graphs with the same picture."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble.families import PRESETS
from comfyui_nibble.sampling.presets import preset

sys.path.insert(0, str(Path(__file__).parent))
import sampling_graphs
from sampling_graphs import SEED, TINY, base, custom, few, ksampler, node, save

further, installed = sampling_graphs.further, sampling_graphs.installed

IN_SERVER = sorted((p.id for p in PRESETS.values() if p.family in TINY), key=lambda id: (preset(id).family, id))


@pytest.mark.parametrize("id", [id for id in IN_SERVER if preset(id).omega is None])
def test_every_preset_samples_in_a_server(id, server, installed):
    row = preset(id)
    graph = base(row.family, installed(row.family))
    graph |= {"sample": few(id, steps=2 if row.steps > 8 else 0), "save": save(["sample", 0], id)}
    result = server.done(graph)
    got = server.latent(result, "save")
    assert torch.isfinite(got).all() and got.std() > 0
    assert result.text("sample").startswith(f"preset {id}: chosen by hand")


STOCK = {
    "lcm": ("sd15", "lcm_lora_sd15", 4, 1.0, {
        "lcm": node("ModelSamplingDiscrete", model=["model", 0], sampling="lcm", zsnr=False),
        "stock": ksampler(4, "lcm", "simple", model="lcm")}),
    "turbo": ("sdxl", "sdxl_turbo", 2, 1.0, {
        "sampler": node("KSamplerSelect", sampler_name="euler_ancestral"),
        "sigmas": node("SDTurboScheduler", model=["model", 0], steps=2, denoise=1.0),
        "stock": custom("sigmas")}),
    "turbo on a picture": ("sdxl", "sdxl_turbo", 2, 0.6, {
        "sampler": node("KSamplerSelect", sampler_name="euler_ancestral"),
        "sigmas": node("SDTurboScheduler", model=["model", 0], steps=2, denoise=0.6),
        "stock": custom("sigmas", latent="picture")}),
    "lightning": ("sdxl", "lightning_sdxl", 4, 1.0, {"stock": ksampler(4, "euler", "simple")}),
    "lightning, one step": ("sdxl", "lightning_sdxl_1step", 0, 1.0, {
        "x0": node("ModelSamplingDiscrete", model=["model", 0], sampling="x0", zsnr=False),
        "stock": ksampler(1, "euler", "simple", model="x0")}),
    "hyper with cfg": ("sd15", "hyper_sd15_cfg", 8, 1.0, {"stock": ksampler(8, "euler", "simple", cfg=5.0)}),
    "hyper on a picture": ("sd15", "hyper_sd15", 4, 0.5, {
        "stock": ksampler(4, "euler", "simple", denoise=0.5, latent="picture")}),
    "dmd2": ("sdxl", "dmd2_sdxl", 4, 1.0, {"stock": ksampler(4, "lcm", "simple")}),
    "sd3.5": ("sd3", "sd35_large_turbo", 4, 1.0, {
        "shift": node("ModelSamplingSD3", model=["model", 0], shift=3.0),
        "stock": ksampler(4, "euler", "normal", model="shift")}),
    "schnell": ("flux_schnell", "flux_schnell", 4, 1.0, {"stock": ksampler(4, "euler", "simple")}),
    "schnell on a picture": ("flux_schnell", "flux_schnell", 3, 0.7, {
        "stock": ksampler(3, "euler", "simple", denoise=0.7, latent="picture")}),
    "flux": ("flux", "hyper_flux", 8, 1.0, {
        "shift": node("ModelSamplingFlux", model=["model", 0], max_shift=1.15, base_shift=0.5, width=128, height=128),
        "guided": node("FluxGuidance", conditioning=["pos", 0], guidance=3.5),
        "stock": ksampler(8, "euler", "simple", model="shift", positive="guided")}),
    "flux2": ("flux2", "flux2_dev_turbo", 4, 1.0, {
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("Flux2Scheduler", steps=4, width=128, height=128),
        "guided": node("FluxGuidance", conditioning=["pos", 0], guidance=4.0),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["guided", 0]),
        "noise": node("RandomNoise", noise_seed=SEED),
        "stock": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                      sigmas=["sigmas", 0], latent_image=["latent", 0])}),
    "qwen": ("qwen_image", "qwen_lightning", 4, 1.0, {
        "shift": node("ModelSamplingAuraFlow", model=["model", 0], shift=3.0),
        "stock": ksampler(4, "euler", "simple", model="shift")}),
    "krea2": ("krea2", "krea2_turbo", 8, 1.0, {"stock": ksampler(8, "euler", "simple")}),
    "mage-flow": ("mage_flow", "mage_flow_turbo", 4, 1.0, {"stock": ksampler(4, "euler", "simple")}),
    "lens": ("lens", "lens_turbo", 4, 1.0, {
        "shift": node("ModelSamplingFlux", model=["model", 0], max_shift=1.15, base_shift=0.5, width=128, height=128),
        "stock": ksampler(4, "euler", "simple", model="shift")}),
}  # fmt: skip


@pytest.mark.parametrize("case", STOCK)
def test_equals_the_stock_graph_bit_for_bit(case, server, installed):
    family, id, steps, denoise, nodes = STOCK[case]
    latent = "latent" if denoise == 1.0 else "picture"
    graph = base(family, installed(family)) | nodes
    graph["picture"] = ksampler(1, "euler", "simple")
    graph |= {"few": few(id, steps, denoise, latent), "a": save(["few", 0], "a"), "b": save(["stock", 0], "b")}
    if latent == "latent":
        del graph["picture"]
    result = server.done(graph)
    ours, stock = server.latent(result, "a"), server.latent(result, "b")
    assert ours.std() > 0
    assert torch.equal(ours, stock)


def test_the_preset_node_gives_the_same_picture(server, installed):
    """Preset -> SamplerCustom is what the sampler node does; cfg and text come with it."""
    graph = base("sd15", installed("sd15"))
    graph["row"] = node(
        "NibbleFewStepPreset", model=["model", 0], preset="tcd_sd15", steps=0, denoise=1.0, width=128, height=128
    )
    graph["stock"] = custom("unused", model="row")
    graph["stock"]["inputs"] |= {"sampler": ["row", 1], "sigmas": ["row", 2], "cfg": ["row", 3]}
    graph |= {"few": few("tcd_sd15"), "a": save(["few", 0], "a"), "b": save(["stock", 0], "b")}
    graph["text"] = node("PreviewAny", source=["row", 4])
    result = server.done(graph)
    assert torch.equal(server.latent(result, "a"), server.latent(result, "b"))
    text = result.text("text")
    assert "sampler tcd, cfg 1, eta 0.3" in text and "sigmas: 14.61, 4.261, 1.613, 0.7194, 0" in text
    assert "https://github.com/jabir-zheng/TCD" in text


def test_same_seed_same_picture_another_seed_another(server, installed):
    graph = base("sd15", installed("sd15"))
    graph |= {"one": few("tcd_sd15"), "a": save(["one", 0], "a")}
    first = server.latent(server.done(graph), "a")
    graph["a"]["inputs"]["filename_prefix"] = "few/again"
    graph["pos2"] = node("NibbleTestConditioning", tokens=8, width=768, pooled=0, seed=1)
    graph["one"]["inputs"]["positive"] = ["pos2", 0]
    assert torch.equal(server.latent(server.done(graph), "a"), first)
    graph["one"]["inputs"]["seed"] = SEED + 1
    assert not torch.equal(server.latent(server.done(graph), "a"), first)


def test_sigmas_from_timesteps(server, installed):
    """DMD2's list by hand equals its preset; a typing error is a sentence."""
    graph = base("sdxl", installed("sdxl"))
    graph["list"] = node("NibbleSigmasFromTimesteps", model=["model", 0], grid="typed list", timesteps="399", steps=4,
                         strength=1.0)  # fmt: skip
    graph["sampler"] = node("KSamplerSelect", sampler_name="lcm")
    graph["stock"] = custom("unused", model="list")
    graph["stock"]["inputs"]["sigmas"] = ["list", 1]
    graph |= {"few": few("dmd2_sdxl_1step"), "a": save(["few", 0], "a"), "b": save(["stock", 0], "b")}
    result = server.done(graph)
    assert torch.equal(server.latent(result, "a"), server.latent(result, "b"))
    graph["list"]["inputs"]["timesteps"] = "249, 499"
    assert "499 comes after 249; write them from high to low" in server.run(graph).error


@pytest.mark.parametrize("grid", ["LCM and TCD", "trailing"])
def test_sigmas_of_the_grids(grid, server, installed):
    graph = base("sd15", installed("sd15"))
    graph["list"] = node(
        "NibbleSigmasFromTimesteps", model=["model", 0], grid=grid, timesteps="", steps=2, strength=0.5
    )
    graph["text"] = node("PreviewAny", source=["list", 1])
    values = json.loads(server.done(graph).text("text").split("tensor(")[1].split("]")[0] + "]")
    assert len(values) == 3 and values[-1] == 0 and 14 > values[0] > values[1] > 0


def test_the_sampler_nodes_and_rectified_flow(server, installed):
    """Each part by hand, in ComfyUI's custom sampler, equals its preset."""
    name = installed("sd15")
    graph = base("sd15", name)
    graph["flow"] = node("NibbleModelSamplingRectifiedFlow", model=["model", 0], velocity="data - noise", shift=1.0)
    graph["stock"] = ksampler(1, "euler", "simple", model="flow")
    graph |= {"few": few("instaflow"), "a": save(["few", 0], "a"), "b": save(["stock", 0], "b")}
    result = server.done(graph)
    assert torch.equal(server.latent(result, "a"), server.latent(result, "b"))
    graph = base("sd15", name)
    graph["list"] = node("NibbleSigmasFromTimesteps", model=["model", 0], grid="LCM and TCD", timesteps="", steps=4,
                         strength=1.0)  # fmt: skip
    graph["sampler"] = node("NibbleSamplerTCD", eta=0.3)
    graph["stock"] = custom("unused", model="list")
    graph["stock"]["inputs"]["sigmas"] = ["list", 1]
    graph |= {"few": few("tcd_sd15"), "a": save(["few", 0], "a"), "b": save(["stock", 0], "b")}
    result = server.done(graph)
    assert torch.equal(server.latent(result, "a"), server.latent(result, "b"))
    graph["row"] = node(
        "NibbleFewStepPreset", model=["model", 0], preset="perflow_sd15", steps=4, denoise=1.0, width=128, height=128
    )
    graph["sampler"] = node("NibbleSamplerPeRFlow", prediction="diff_eps")
    graph["stock"] = custom("unused", cfg=4.5, model="row")
    graph["stock"]["inputs"]["sigmas"] = ["row", 2]
    graph["few"] = few("perflow_sd15", 4)
    result = server.done(graph)
    assert torch.equal(server.latent(result, "a"), server.latent(result, "b"))


def test_straightness_in_a_server(server, installed):
    graph = base("flux", installed("flux"))
    graph["latent"]["inputs"]["batch_size"] = 2
    graph["s"] = node(
        "NibbleStraightness", model=["model", 0], positive=["pos", 0], negative=["neg", 0], latent_image=["latent", 0],
        steps=6, cfg=1.0, seed=3,
    )  # fmt: skip
    graph["chart"] = node("SaveImage", images=["s", 1], filename_prefix="few/straight")
    graph["text"], graph["value"] = node("PreviewAny", source=["s", 2]), node("PreviewAny", source=["s", 0])
    result = server.done(graph)
    value = float(result.text("value"))
    assert math.isfinite(value) and value > 0
    assert result.text("text").startswith("S(Z) = ") and result.text("text").count("\n| ") == 7
    assert server.image(result, "chart").shape[1] == 960
