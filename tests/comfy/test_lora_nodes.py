"""NibbleApplyLora, NibbleLoraStack, NibbleChooseLora and NibbleLoraReport in a real server."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
import lora_files
from lora_graphs import Kit, four, graph, lora_node, node

NODES = ["NibbleApplyLora", "NibbleChooseLora", "NibbleLoraStack", "NibbleLoraReport"]


@pytest.fixture
def kit(server, tiny, tiny_4bit):
    return Kit(server, tiny, tiny_4bit)


def apply_node(lora: str, strength: float = 1.0, model: str = "model", **more) -> dict:
    inputs = dict(model=[model, 0], lora_name=lora, strength_model=strength, strength_clip=1.0)
    return node("NibbleApplyLora", **inputs, **more)


def applied(name: str, lora: str) -> dict:
    return {"model": four(name), "lora": apply_node(lora), "show": node("PreviewAny", source=["lora", 2])}


def of_text_encoder(layers: dict) -> dict:
    file = lora_files.spell(lora_files.factors(layers), "kohya")
    return {k.replace("lora_unet_", "lora_te1_"): v for k, v in file.items()}


def test_a_stack_is_its_loras_in_any_order(server, kit):
    """Two orders of the stack, and a chain of other loaders: the same picture, bit for bit."""
    _, name, layers = kit.models("flux")
    chosen = []
    for seed, (spelling, rank, strength) in enumerate((("kohya", 4, 0.7), ("peft", 7, -0.4), ("comfyui", 16, 1.0))):
        lora = kit.lora(f"stack{seed}.safetensors", layers, spelling, 0.3, seed, rank=rank, alpha=3.0)
        chosen.append((lora, strength))

    def stacked(order) -> dict:
        picks = {
            f"c{i}": node("NibbleChooseLora", lora_name=lora, strength_model=strength, strength_clip=1.0)
            for i, (lora, strength) in enumerate(chosen[j] for j in order)
        }
        loras = {f"loras.lora{i}": [f"c{i}", 0] for i in range(len(order))}
        return graph("flux", four(name), "stack", stack=node("NibbleLoraStack", model=["model", 0], **loras), **picks)

    result = server.done(stacked((0, 1, 2)) | {"show": node("PreviewAny", source=["stack", 2])})
    expected = server.latent(result, "save")
    assert result.text("show").count("keys: ") == 3
    assert torch.equal(kit.latent(stacked((2, 0, 1))), expected)
    (a, x), (b, y), (c, z) = chosen
    chain = dict(one=lora_node(c, z), two=apply_node(b, y, "one"), three=lora_node(a, x, "two"))
    assert torch.equal(kit.latent(graph("flux", four(name), "three", **chain)), expected)
    assert not torch.equal(kit.latent(stacked((0, 1))), expected)


def test_report_counts_every_key_once(server, kit):
    """Half of the keys unknown, some of another shape, one half missing, some for a text encoder."""
    _, name, layers = kit.models("flux")
    layers = dict(list(layers.items())[:6])
    file = lora_files.spell(lora_files.factors(layers), "comfyui", alpha=4.0)
    good = len(file)
    file |= lora_files.spell(lora_files.factors({f"double_blocks.{i}.nowhere": (8, 8) for i in range(5)}), "comfyui")
    file |= lora_files.spell(lora_files.factors({"double_blocks.0.txt_attn.proj": (256, 128)}), "kohya")
    file |= of_text_encoder({"text_model.encoder.layers.0.mlp.fc1": (8, 8)})
    file |= {"diffusion_model.single_blocks.0.linear1.lora_down.weight": torch.zeros(4, 256), "note": torch.zeros(1)}
    report = server.done(applied(name, kit.put("half.safetensors", file))).text("show")
    assert report.splitlines()[1] == (
        f"{len(file)} keys: {good} applied to the model, 2 for a part that is not connected, 10 unknown to this model, "
        "2 of another shape than the layer, 1 of a kind that is not read, 1 without the other half"
    )
    assert "unknown to this model: diffusion_model.double_blocks.0.nowhere.lora_" in report
    assert "of another shape than the layer: lora_unet_double_blocks_0_txt_attn_proj.lora_" in report
    assert "(made for 256 x 128, the layer has 256 x 256)" in report
    assert "without the other half: diffusion_model.single_blocks.0.linear1.lora_down.weight (no up)" in report
    assert "6 quantized layers take it into their low-rank branch" in report
    both = {"n": node("NibbleLoraReport", lora_name="half.safetensors"), "p": node("PreviewAny", source=["n", 1])}
    found = server.done(both)
    assert "**half.safetensors**: looks like a LoRA for FLUX.1" in found.text("n")
    assert len(json.loads(found.text("p"))["keys"]) == len(file)


def test_a_lora_that_does_nothing_is_an_error(server, kit):
    """Another family's file, a text encoder's without a CLIP, and no LoRA at all: one sentence that names keys."""
    _, name, _ = kit.models("flux")
    wrong = kit.lora("wrong.safetensors", {"input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, 2048)})
    error = server.run(applied(name, wrong)).error
    assert (
        "wrong.safetensors: none of its 2 keys fits: it looks like a LoRA for SDXL UNet, the model is FLUX.1" in error
    )
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight" in error
    assert len(error.strip().splitlines()) == 1
    text = kit.put("text.safetensors", of_text_encoder({"text_model.encoder.layers.0.mlp.fc1": (8, 8)}))
    error = server.run(applied(name, text)).error
    assert "text.safetensors: it changes a text encoder only, and no CLIP is connected. Connect it" in error
    error = server.run(applied(name, kit.put("nothing.safetensors", {"weight": torch.zeros(4)}))).error
    assert "nothing.safetensors: none of its 1 keys fits" in error
    path = server.models("loras") / "broken.safetensors"
    path.write_bytes(b"<html>404 not found</html>" * 40)
    error = server.run(applied(name, path.name)).error
    assert "broken.safetensors: not a whole safetensors file" in error


def test_nan_is_an_error_that_names_the_keys(server, kit):
    _, name, layers = kit.models("flux")
    file = lora_files.spell(lora_files.factors(layers), "comfyui")
    file["diffusion_model.double_blocks.0.img_mlp.0.lora_up.weight"][3, 1] = torch.nan
    lora = kit.put("nan.safetensors", file)
    error = server.run(applied(name, lora)).error
    assert "nan.safetensors: 2 keys hold NaN or infinity (diffusion_model.double_blocks.0.img_mlp.0." in error
    found = server.done({"model": four(name), "n": node("NibbleLoraReport", lora_name=lora, model=["model", 0])})
    assert f"{len(file) - 2} applied to the model, 2 with NaN or infinity" in found.text("n")


def test_kinds_and_bytes_are_said(server, kit):
    """The report says which layers leave 4 bits while a LoRA is on, and what that costs."""
    _, name, layers = kit.models("flux")
    report = server.done(applied(name, kit.kind("said-dora.safetensors", layers, "dora"))).text("show")
    assert "looks like a LoRA for FLUX.1; 13 lora, rank 4" in report
    assert "13 quantized layers become 16-bit while it is on: " in report and "low-rank branch" not in report
    report = server.done(applied(name, kit.kind("said-loha.safetensors", layers, "loha"))).text("show")
    assert "13 loha" in report and "13 quantized layers take it into their low-rank branch" in report


def test_a_peft_folder_has_its_own_alpha(server, kit):
    """An adapter folder in models/loras: the scale is in adapter_config.json, which ComfyUI's loader does not read."""
    _, name, layers = kit.models("flux")
    lora = kit.lora("my_adapter/adapter_model.safetensors", layers, "peft", seed=3)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "alpha_pattern": {}}
    (server.models("loras") / "my_adapter" / "adapter_config.json").write_text(json.dumps(config))
    same = kit.lora("same.safetensors", layers, "comfyui", seed=3, alpha=2.0)
    expected = kit.latent(graph("flux", four(name), "lora", lora=lora_node(same)))
    assert torch.equal(kit.latent(graph("flux", four(name), "lora", lora=apply_node(lora))), expected)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "x.ckpt", "gone.safetensors"])
@pytest.mark.parametrize("kind", ["NibbleApplyLora", "NibbleChooseLora", "NibbleLoraReport"])
def test_names_outside_the_list_never_reach_a_file(name, kind, server, kit):
    _, model, _ = kit.models("flux")
    inputs = dict(lora_name=name, strength_model=1.0, strength_clip=1.0, model=["model", 0])
    workflow = {"model": four(model), "n": node(kind, **inputs)}
    if kind != "NibbleLoraReport":
        workflow["show"] = node("PreviewAny", source=["n", 0])
    reply = server.post("/prompt", {"prompt": workflow})
    assert reply["http"] == 400 and "not in list" in str(reply)


@pytest.mark.parametrize("name", NODES)
def test_help_pages_are_served(name, server):
    assert server.get(f"/extensions/ComfyUI-Nibble/docs/{name}.md", raw=True).startswith(b"# ")
