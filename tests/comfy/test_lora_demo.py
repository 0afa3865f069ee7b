"""The demo model's own LoRAs: the 4-bit model changes as the 16-bit model does, in direction and in style."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble import demo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
from lora_graphs import cosine, lora_node, node

ROOT = Path(__file__).resolve().parents[2]
MISSING = [p for p in (demo.MODEL / "unet", *demo.LORAS.values(), *demo.REFERENCES.values()) if not p.exists()]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the demo model is not there yet: {[p.name for p in MISSING]}")


def test_direction_and_style(inside):
    """Learned emoji and unseen captions: the change points the same way, the pictures take the same style."""
    r = inside("lora_demo", demo.LORAS["style"], 8)
    print(json.dumps(r))
    assert r["same codes"]
    assert r["delta cosine"] > 0.9 and 0.9 < r["delta size"] < 1.1
    assert r["agreement"] >= 0.8
    assert r["members"]["learned, caption unseen"] >= 5 and r["members"]["others"] >= 5
    for bits in ("16", "4"):
        for group in ("learned", "learned, caption unseen"):
            assert r["flat style"][group][bits] <= 0.2 and r["flat style"][group][f"{bits}+lora"] >= 0.8, group
        assert r["flat style"]["others"][f"{bits}+lora"] <= 0.4
        assert r["recognised"][f"{bits}+lora"] >= 0.8


def picture(precision: str, *, lora: dict | None = None, hook: dict | None = None) -> dict:
    """A workflow on the demo model; ``lora`` is a loader node, ``hook`` a hook on both conditions."""
    more = {} if lora is None else {"lora": lora}
    pos, neg = ["pos", 0], ["neg", 0]
    if hook is not None:
        more |= {"hook": hook, "hooked": node("PairConditioningSetProperties", positive_NEW=pos, negative_NEW=neg,
                 strength=1.0, set_cond_area="default", hooks=["hook", 0])}  # fmt: skip
        pos, neg = ["hooked", 0], ["hooked", 1]
    last = "lora" if lora else "model"
    has_clip = lora is not None and "clip" in lora["inputs"]
    return {
        "model": node("NibbleLoadDemo", precision=precision, rank=16), **more,
        "pos": node("CLIPTextEncode", clip=[last if has_clip else "model", 1], text="red apple, flat style"),
        "neg": node("CLIPTextEncode", clip=[last if has_clip else "model", 1], text=""),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=4),
        "sample": node("KSampler", model=[last, 0], positive=pos, negative=neg, latent_image=["latent", 0], seed=5,
                       steps=10, cfg=3.0, sampler_name="ddim", scheduler="ddim_uniform", denoise=1.0),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="lora/demo"),
    }  # fmt: skip


def test_stock_loaders_and_hooks_on_the_demo_model(server):
    """LoraLoader, LoraLoaderModelOnly and Create Hook LoRA: one picture in 4 bits, in 16 bits nearly the same."""
    name = demo.LORAS["style"].name
    shutil.copy(demo.LORAS["style"], server.models("loras") / name)

    def run(*args, **kwargs) -> torch.Tensor:
        return server.latent(server.done(picture(*args, **kwargs)), "save")

    before = {p: run(p) for p in ("4-bit", "16-bit")}
    after = {p: run(p, lora=lora_node(name)) for p in before}
    full = node("LoraLoader", model=["model", 0], clip=["model", 1], lora_name=name, strength_model=1.0,
                strength_clip=1.0)  # fmt: skip
    assert torch.equal(run("4-bit", lora=full), after["4-bit"])
    hook = node("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0)
    assert torch.equal(run("4-bit", hook=hook), after["4-bit"])
    ours = node("NibbleApplyLora", model=["model", 0], lora_name=name, strength_model=1.0,
                strength_clip=1.0)  # fmt: skip
    assert torch.equal(run("4-bit", lora=ours), after["4-bit"])
    found = cosine(after["4-bit"] - before["4-bit"], after["16-bit"] - before["16-bit"])
    print("cosine of the changed latents", found)
    assert found > 0.7  # after ten steps of a sampler; the denoiser itself is held to 0.9 above
    assert torch.equal(run("4-bit", lora=lora_node(name, 0.0)), before["4-bit"])


def test_the_workflow_of_the_stack(server):
    workflow = json.loads((ROOT / "workflows" / "api" / "lora-stack.json").read_text())
    result = server.done(workflow)
    for save in ("11", "16"):
        assert server.image(result, save).shape == (128, 128, 3)
    assert result.text("12").count("applied to the model") == 2 and "unknown" not in result.text("12")
