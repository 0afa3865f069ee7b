"""LoRAs on 4-bit models in a real server: the stock loaders, hooks and savers of ComfyUI."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
import lora_files
from lora_graphs import FAMILIES, Kit, cosine, four, graph, lora_node, node, stock


@pytest.fixture
def kit(server, tiny, tiny_4bit):
    return Kit(server, tiny, tiny_4bit)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_loader_does_what_it_does_on_the_float_model(family, kit):
    """LoraLoaderModelOnly in both models; then strength 0 and removal, bit for bit. (Random weights amplify the 4-bit
    noise, so the direction of the change is held loosely here; test_lora_models.py holds layers exactly.)
    """
    float_name, name, layers = kit.models(family)
    lora = kit.lora(f"{family}.safetensors", layers, size=1.0, alpha=2.0)
    plain = kit.latent(graph(family, stock(float_name)))
    with_plain = kit.latent(graph(family, stock(float_name), "lora", lora=lora_node(lora)))
    before = kit.latent(graph(family, four(name)))
    after = kit.latent(graph(family, four(name), "lora", lora=lora_node(lora)))
    found = cosine(after - before, with_plain - plain)
    print(family, "cosine of the changes", found)
    assert found > 0.75
    assert torch.equal(kit.latent(graph(family, four(name), "lora", lora=lora_node(lora, 0.0))), before)
    again = graph(family, four(name))
    again["save"]["inputs"]["filename_prefix"] = "lora/removed"
    assert torch.equal(kit.latent(again), before)


def whole(server, inside, folder: Path) -> str:
    """A 4-bit SD1.5 checkpoint with its text encoder, in the server's models."""
    from comfyui_nibble.headless.cli import main

    inside("whole_checkpoint", folder / "whole.safetensors")
    assert main(["quantize", str(folder / "whole.safetensors"), "--out", str(folder / "l4.safetensors")]) == 0
    shutil.copy(folder / "l4.safetensors", server.models("checkpoints") / "l4.safetensors")
    return "l4.safetensors"


def test_the_stock_loader_with_a_text_encoder(server, inside, kit, tmp_path):
    """LoraLoader on a whole SD1.5 checkpoint, the UNet 4-bit: both parts act, and NibbleApplyLora does the same."""
    checkpoint, block = whole(server, inside, tmp_path), "input_blocks.1.1.transformer_blocks.0"
    unet = {f"{block}.attn1.to_q": (320, 320), f"{block}.attn2.to_k": (320, 768)}
    text = {f"text_model.encoder.layers.{i}.mlp.fc1": (3072, 768) for i in range(12)}
    file = lora_files.spell(lora_files.factors(unet, size=1.0), "kohya")
    parts = lora_files.spell(lora_files.factors(text, size=1.0), "kohya")
    file |= {k.replace("lora_unet_", "lora_te_"): v for k, v in parts.items()}
    lora = kit.put("both.safetensors", file)

    def run(kind: str, model: float, clip: float, wired: bool = True, name: str = lora) -> tuple:
        inputs = dict(model=["ckpt", 0], lora_name=name, strength_model=model, strength_clip=clip)
        workflow = {
            "ckpt": node("NibbleLoadCheckpoint", ckpt_name=checkpoint),
            "lora": node(kind, **inputs, **({"clip": ["ckpt", 1]} if wired else {})),
            "pos": node("CLIPTextEncode", clip=["lora" if wired else "ckpt", 1], text="a fox"),
            "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "sample": node("KSampler", model=["lora", 0], positive=["pos", 0], negative=["pos", 0],
                           latent_image=["latent", 0], seed=5, steps=2, cfg=1.0, sampler_name="euler",
                           scheduler="normal", denoise=1.0),
            "save": node("SaveLatent", samples=["sample", 0], filename_prefix="lora/both"),
        }  # fmt: skip
        if kind == "NibbleApplyLora":
            workflow["show"] = node("PreviewAny", source=["lora", 2])
        result = server.done(workflow)
        return server.latent(result, "save"), result.text("show") if "show" in workflow else ""

    stock_both, stock_model = run("LoraLoader", 1.0, 1.0)[0], run("LoraLoader", 1.0, 0.0)[0]
    stock_clip = run("LoraLoader", 0.0, 1.0)[0]
    assert not torch.equal(stock_both, stock_model) and not torch.equal(stock_both, stock_clip)
    ours, report = run("NibbleApplyLora", 1.0, 1.0)
    assert torch.equal(ours, stock_both)
    assert f"{len(file)} keys: {2 * len(unet)} applied to the model, {2 * len(text)} applied to the text" in report
    unwired, report = run("NibbleApplyLora", 1.0, 1.0, wired=False)
    assert torch.equal(unwired, stock_model)
    assert f"{2 * len(unet)} applied to the model, {2 * len(text)} for a part that is not connected" in report
    factors = lora_files.factors(text, size=1.0)
    dotted = {k.replace("unet.", "text_encoder.", 1): v for k, v in lora_files.spell(factors, "diffusers unet").items()}
    for i, file in enumerate((lora_files.spell(factors, "peft"), dotted)):
        ours, report = run("NibbleApplyLora", 1.0, 1.0, name=kit.put(f"text{i}.safetensors", file))
        assert torch.equal(ours, stock_clip)
        assert f"{len(file)} keys: 0 applied to the model, {len(file)} applied to the text encoder" in report


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_hook_loras(family, kit):
    """Create Hook LoRA against the stock loader; on the positive condition alone; and the model is clean afterwards."""
    _, name, layers = kit.models(family)
    lora = kit.lora("hook.safetensors", layers, "comfyui")
    before = kit.latent(graph(family, four(name)))
    loaded = graph(family, four(name), "lora", lora=lora_node(lora))
    expected = kit.latent(loaded)
    hooked = graph(
        family, four(name),
        hook=node("CreateHookLoraModelOnly", lora_name=lora, strength_model=1.0),
        with_hook=node("PairConditioningSetProperties", positive_NEW=["pos", 0], negative_NEW=["neg", 0], strength=1.0,
                       set_cond_area="default", hooks=["hook", 0]),
    )  # fmt: skip
    hooked["sample"]["inputs"] |= {"positive": ["with_hook", 0], "negative": ["with_hook", 1]}
    assert torch.equal(kit.latent(hooked), expected)
    hooked["sample"]["inputs"]["negative"] = ["neg", 0]
    one_sided = kit.latent(hooked)
    assert torch.isfinite(one_sided).all() and not torch.equal(one_sided, before)
    # cfg 1 skips the negative condition, so there the hook on the positive one is all there is
    assert torch.equal(one_sided, expected) == (FAMILIES[family][3] == 1)
    clean = graph(family, four(name))
    clean["save"]["inputs"]["filename_prefix"] = "lora/clean"
    clean["sample"]["inputs"]["seed"] = 5
    assert torch.equal(kit.latent(clean), before)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft", "diff"])
def test_other_kinds_through_the_stock_loader(kind, kit):
    """No crash and no silent skip: the picture moves the way the float model's does."""
    float_name, name, layers = kit.models("flux")
    lora = kit.kind(f"{kind}.safetensors", layers, kind, size=0.6)
    plain = kit.latent(graph("flux", stock(float_name)))
    with_plain = kit.latent(graph("flux", stock(float_name), "lora", lora=lora_node(lora)))
    before = kit.latent(graph("flux", four(name)))
    after = kit.latent(graph("flux", four(name), "lora", lora=lora_node(lora)))
    error_before = ((before - plain).norm() / plain.norm()).item()
    error_after = ((after - with_plain).norm() / with_plain.norm()).item()
    print(kind, error_before, error_after)
    assert not torch.equal(before, after) and error_after < 2 * error_before + 0.05


def test_the_bypass_loader_gives_the_same_picture(kit):
    """ComfyUI's LoraLoaderBypass adds the LoRA beside the layer by itself; only rounding differs."""
    _, name, layers = kit.models("flux")
    lora = kit.lora("bypass.safetensors", layers)
    expected = kit.latent(graph("flux", four(name), "lora", lora=lora_node(lora)))
    bypass = lora_node(lora) | {"class_type": "LoraLoaderBypassModelOnly"}
    got = kit.latent(graph("flux", four(name), "lora", lora=bypass))
    before = kit.latent(graph("flux", four(name)))
    assert ((got - expected).norm() / (expected - before).norm()).item() < 0.15 and not torch.equal(got, before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saving_keeps_the_lora(kind, server, kit):
    """NibbleSaveModel and the stock Save Model: the file draws the same picture without the LoRA, AWQ layers too."""
    _, name, layers = kit.models("sd3")
    lora = kit.kind(f"baked-{kind}.safetensors", layers, kind)
    workflow = graph("sd3", four(name), "lora", lora=lora_node(lora))
    workflow["ours"] = node("NibbleSaveModel", model=["lora", 0], filename_prefix=f"diffusion_models/ours-{kind}")
    workflow["stock"] = node("ModelSave", model=["lora", 0], filename_prefix=f"diffusion_models/stock-{kind}")
    expected = server.latent(server.done(workflow), "save")
    for saved in (f"ours-{kind}_00001_.safetensors", f"stock-{kind}_00001_.safetensors"):
        path = server.base / "output" / "diffusion_models" / saved
        downs = [k for k in load_file(path) if k.endswith("proj_down")]
        assert len(downs) == (len(layers) if kind == "lora" else 0)
        again = kit.latent(graph("sd3", four(saved)))
        if kind == "lora":
            assert torch.equal(again, expected)
        else:  # an unsigned layer's true bias is rounded to the file's 16 bits
            assert ((again - expected).norm() / expected.norm()).item() < 0.02


def test_one_server_and_several_loras_of_one_model(server, kit):
    """A/B/A in one workflow: no sampler sees another's LoRA."""
    _, name, layers = kit.models("sd3")
    loras = [kit.lora(f"ab{seed}.safetensors", layers, seed=seed) for seed in (1, 2)]
    first = [kit.latent(graph("sd3", four(name), "lora", lora=lora_node(x))) for x in loras]
    both = graph("sd3", four(name), "a", a=lora_node(loras[0]), b=lora_node(loras[1]))
    for i, model in ((2, "b"), (3, "a")):
        inputs = {**both["sample"]["inputs"], "model": [model, 0], "sampler_name": "euler"}
        both[f"sample{i}"] = node("KSampler", **inputs)
        both[f"save{i}"] = node("SaveLatent", samples=[f"sample{i}", 0], filename_prefix="lora/ab")
    result = server.done(both)
    for save, expected in (("save", first[0]), ("save2", first[1]), ("save3", first[0])):
        assert torch.equal(server.latent(result, save), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_an_error_that_names_the_layer(value, server, kit):
    """A float model would draw black pictures."""
    _, name, layers = kit.models("flux")
    file = lora_files.spell(lora_files.factors(layers), "comfyui")
    file["diffusion_model.double_blocks.0.img_mlp.0.lora_up.weight"][3, 1] = value
    result = server.run(graph("flux", four(name), "lora", lora=lora_node(kit.put("stock-nan.safetensors", file))))
    expected = "The LoRA holds NaN or infinity for diffusion_model.double_blocks.0.img_mlp.0.weight"
    assert result.status == "error" and expected in result.error


def test_a_lora_of_another_size_is_an_error_and_a_few_wrong_layers_are_named(server, kit):
    """Right names, wrong widths. Mostly wrong: an error; a few: left out, and named in the log."""
    _, name, layers = kit.models("flux")
    lora = kit.lora("wide.safetensors", {n: (2 * a, 2 * b) for n, (a, b) in layers.items()})
    result = server.run(graph("flux", four(name), "lora", lora=lora_node(lora)))
    assert "The LoRA does not fit" in result.error and "most of its layers have another shape" in result.error
    lora = kit.lora("few.safetensors", layers | {"double_blocks.0.img_mlp.0": (64, 64)})
    assert torch.isfinite(kit.latent(graph("flux", four(name), "lora", lora=lora_node(lora)))).all()
    said = "LoRA patches of another shape were left out: diffusion_model.double_blocks.0.img_mlp.0.weight"
    assert said in server.tail(400)
