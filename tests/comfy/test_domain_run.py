"""NibbleDomain in a real ComfyUI: LoRAs there and missing, few and ordinary steps, and the demo model."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import recognise
from comfyui_nibble.prompts import domain, expand, record
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import prompt_graphs
from prompt_graphs import MINE, show

own = prompt_graphs.own

ROOT = Path(__file__).resolve().parent.parent.parent
HAS_DEMO = pytest.mark.skipif(not (demo.MODEL / "unet").exists(), reason="the demo model is not trained yet")
HAS_LORAS = pytest.mark.skipif(
    not all(p.exists() for p in demo.LORAS.values()), reason="the demo's LoRAs are not trained yet"
)


@pytest.fixture(scope="module")
def whole(server, inside, tmp_path_factory):
    """A whole SD1.5-class checkpoint with random weights, and LoRAs for it, in the server's folders."""
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    inside("whole_checkpoint", path)
    for left in server.models("loras").iterdir():  # by tests of other files: what is found by name must be ours
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (server.models("checkpoints") / "domain-test.safetensors").symlink_to(path)
    g = torch.Generator().manual_seed(1)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_{}"
    tensors = {}
    for layer, width in (("q", 320), ("k", 768)):
        tensors[f"{key.format(layer)}.lora_down.weight"] = torch.randn(4, width, generator=g)
        tensors[f"{key.format(layer)}.lora_up.weight"] = torch.randn(320, 4, generator=g)
        tensors[f"{key.format(layer)}.alpha"] = torch.tensor(4.0)

    def lora(name: str, **changed) -> None:
        save_file({k.replace(*changed.get("keys", ("", ""))): v for k, v in tensors.items()},
                  server.models("loras") / f"{name}.safetensors")  # fmt: skip

    return lora


def remove(server, *names: str) -> None:
    for name in names:
        (server.models("loras") / f"{name}.safetensors").unlink(missing_ok=True)


def domain_graph(choice: str, **changed) -> dict:
    inputs = dict(model=["m", 0], clip=["m", 1], domain=choice, subject="a cup", seed=4, style="auto", overrides="",
                  lora="if present", sampling="few steps", steps=0, width=0, height=0, batch_size=2)  # fmt: skip
    return {
        "m": {"class_type": "NibbleLoadCheckpoint", "inputs": {"ckpt_name": "domain-test.safetensors"}},
        "n": {"class_type": "NibbleDomain", "inputs": {**inputs, **changed}},
        "sample": {"class_type": "SamplerCustom", "inputs": dict(
            model=["n", 0], positive=["n", 1], negative=["n", 2], sampler=["n", 3], sigmas=["n", 4],
            latent_image=["n", 5], cfg=["n", 6], add_noise=True, noise_seed=9)},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "t/domain"}},
        "show": show("n", 7),
    }  # fmt: skip


def by_hand(text: str, sampler: str, scheduler: str, steps: int, cfg: float, lora: str = "") -> dict:
    """The same from stock nodes."""
    model = ["lora", 0] if lora else ["m", 0]
    nodes = {
        "m": {"class_type": "NibbleLoadCheckpoint", "inputs": {"ckpt_name": "domain-test.safetensors"}},
        "pos": {"class_type": "CLIPTextEncode", "inputs": dict(clip=["lora", 1] if lora else ["m", 1], text=text)},
        "neg": {"class_type": "CLIPTextEncode", "inputs": dict(clip=["lora", 1] if lora else ["m", 1], text="lowres")},
        "latent": {"class_type": "EmptyLatentImage", "inputs": dict(width=192, height=128, batch_size=2)},
        "sample": {"class_type": "KSampler", "inputs": dict(
            model=model, positive=["pos", 0], negative=["neg", 0], latent_image=["latent", 0], seed=9, steps=steps,
            cfg=cfg, sampler_name=sampler, scheduler=scheduler, denoise=1.0)},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "t/hand"}},
    }  # fmt: skip
    if lora:
        nodes["lora"] = {"class_type": "LoraLoader", "inputs": dict(
            model=["m", 0], clip=["m", 1], lora_name=f"{lora}.safetensors", strength_model=0.5,
            strength_clip=0.5)}  # fmt: skip
    return nodes


def test_domain_without_its_loras_names_them_and_draws(server, own, whole):
    """Nothing installed: ordinary steps, both LoRAs named with their links; equal to the stock graph by hand."""
    choice = own("tea-shop", MINE.replace("resolution:", "presets: {sd15: lcm_lora_sd15}\nresolution:"))
    remove(server, "gone", "lcm-lora-sdv1-5")
    result = server.done(domain_graph(choice, steps=3))
    told = json.loads(result.text("show"))
    assert told["style"] == "tags" and told["family"] == "sd15" and told["size"] == [192, 128]
    assert told["loras"] == [] and told["preset"] == ""
    assert [m["file"] for m in told["missing"]] == ["gone.safetensors", "lcm-lora-sdv1-5.safetensors"]
    assert "get it at https://huggingface.co/x/gone: the picture is drawn without it" in told["notes"][0]
    assert "get it at https://huggingface.co/latent-consistency/lcm-lora-sdv1-5" in told["notes"][1]
    hand = by_hand(told["positive"], "dpmpp_2m", "karras", 3, 7.0)
    assert torch.equal(server.latent(result, "save"), server.latent(server.done(hand), "save"))


def test_domain_may_insist_on_its_loras(server, own, whole):
    remove(server, "gone", "lcm-lora-sdv1-5")
    result = server.run(domain_graph(own("tea-shop", MINE), lora="required"))
    assert "the LoRA gone.safetensors of user/tea-shop is not in models/loras; get it at " in result.error
    assert "https://huggingface.co/x/gone, or set 'lora' to 'if present'" in result.error


def test_domain_with_its_lora(server, own, whole):
    """Found in a folder of models/loras, applied at the domain's strength, as the stock loader would."""
    choice = own("tea-shop", MINE)
    whole("gone")
    told = json.loads((result := server.done(domain_graph(choice, sampling="ordinary", steps=3))).text("show"))
    assert told["loras"] == [{"file": "gone.safetensors", "strength": 0.5}] and told["missing"] == []
    hand = by_hand(told["positive"], "dpmpp_2m", "karras", 3, 7.0, "gone")
    with_lora = server.latent(result, "save")
    assert torch.equal(with_lora, server.latent(server.done(hand), "save"))
    without = server.latent(server.done(domain_graph(choice, sampling="ordinary", lora="none", steps=3)), "save")
    assert not torch.equal(with_lora, without)
    remove(server, "gone")


def test_domain_in_few_steps(server, own, whole):
    """With the few-step LoRA of its preset: four steps, cfg 1."""
    choice = own("tea-shop", MINE.replace("resolution:", "presets: {sd15: lcm_lora_sd15}\nresolution:"))
    remove(server, "gone")
    whole("lcm-lora-sdv1-5")
    workflow = domain_graph(choice) | {"cfg": show("n", 6), "sigmas": show("n", 4)}
    result = server.done(workflow)
    told = json.loads(result.text("show"))
    assert told["preset"] == "lcm_lora_sd15"
    assert [lora["file"] for lora in told["loras"]] == ["lcm-lora-sdv1-5.safetensors"]
    assert float(result.text("cfg")) == 1.0
    assert torch.isfinite(server.latent(result, "save")).all()
    assert len(re.findall(r"\d+\.\d*", result.text("sigmas"))) == 5
    remove(server, "lcm-lora-sdv1-5")


def test_a_model_that_is_distilled_already_keeps_its_preset(server, own, whole):
    """A few-step LoRA above the node is recognised and not applied a second time."""
    remove(server, "gone")
    whole("lcm-lora-sdv1-5")
    workflow = domain_graph(own("tea-shop", MINE))
    del workflow["sample"], workflow["save"]
    workflow["n"]["inputs"]["model"] = ["fast", 0]
    workflow["fast"] = {"class_type": "LoraLoaderModelOnly", "inputs": dict(
        model=["m", 0], lora_name="lcm-lora-sdv1-5.safetensors", strength_model=1.0)}  # fmt: skip
    told = json.loads(server.done(workflow).text("show"))
    assert told["preset"] == "lcm_lora_sd15" and told["loras"] == []
    remove(server, "lcm-lora-sdv1-5")


def test_a_lora_that_fits_nothing_is_an_error(server, own, whole):
    whole("gone", keys=("lora_unet_down", "lora_unet_sideways"))
    result = server.run(domain_graph(own("tea-shop", MINE)))
    assert "gone.safetensors: none of its 6 keys fits" in result.error, result.error
    assert "unknown to this model" in result.error and "set 'lora' to 'none'" in result.error
    remove(server, "gone")


def test_domain_on_other_families(server, tiny_4bit):
    """The style, the family and the size are the model's: a 4-bit SDXL-class file under SD1.5's CLIP."""
    target = server.models("diffusion_models") / "sdxl-4bit.safetensors"
    if not target.exists():
        target.symlink_to(tiny_4bit("sdxl"))
    workflow = domain_graph("landscape@1", sampling="ordinary", steps=2, batch_size=1)
    workflow["x"] = {"class_type": "NibbleLoadModel", "inputs": {"model_name": target.name}}
    workflow["n"]["inputs"]["model"] = ["x", 0]
    workflow["n"]["inputs"]["width"] = 256
    del workflow["sample"], workflow["save"]
    workflow["size"] = {"class_type": "SaveLatent", "inputs": {"samples": ["n", 5], "filename_prefix": "t/empty"}}
    result = server.done(workflow)
    told = json.loads(result.text("show"))
    assert told["family"] == "sdxl" and told["size"] == [256, 832]
    assert tuple(server.latent(result, "size").shape) == (1, 4, 104, 32)


def api_file(name: str) -> dict:
    text = (ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


@pytest.mark.parametrize("name", ["domain", "domain-prompts"])
def test_workflows_are_valid(name, server):
    """ComfyUI accepts them; without the demo model they end in the loader's sentence."""
    reply = server.post("/prompt", {"prompt": api_file(name), "client_id": server.client})
    assert "prompt_id" in reply, reply
    server.wait(reply["prompt_id"])


@HAS_DEMO
@HAS_LORAS
def test_domain_on_the_demo_model(server):
    """The one-node start: four steps, the emoji domain, "apple": a picture that is an apple, and that says how."""
    result = server.done(api_file("domain"))
    told = json.loads(result.text("8"))
    assert told["family"] == "demo" and told["preset"] == "lcm_lora_sd15" and told["missing"] == []
    assert {lora["file"] for lora in told["loras"]} == {path.name for path in demo.LORAS.values()}
    sigmas = server.done({**api_file("domain"), "s": show("2", 4)}).text("s")
    assert len(re.findall(r"\d+\.\d*", sigmas)) == 5
    assert recognise.load("twemoji").recognised(server.image(result, "6"), "apple")
    entry = result.outputs["6"]["images"][0]
    found = record.read(server.base / "output" / entry["subfolder"] / entry["filename"])["2"]
    assert found == told
    again = expand.resolve(
        domain.load(found["domain"]), found["subject"], found["seed"], found["style"], {}, "flat style"
    )
    assert (again.positive, again.hash) == (found["positive"], found["hash"])


@HAS_DEMO
def test_domain_prompts_on_the_demo_model(server):
    result = server.done(api_file("domain-prompts"))
    assert result.text("11").startswith("nibble_domains/my-emoji_")
    assert len(result.text("9").splitlines()) == 16
