"""LoftQ, distillation and refinement in a real server on the demo model: files load, codes stay, stopping is clean."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.quant import kernels, parts
from comfyui_nibble.sampling.detect import Facts, File, detect
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "red apple\nfox face\nrocket\nsunflower"
FOUR, SIXTEEN = ["base", 0], ["teacher", 0]


@pytest.fixture(autouse=True)
def own_loras(server):
    """The server is shared, and a LoRA that says it is for few steps is one that other nodes find and use."""
    yield
    for made in (server.base / "output" / "loras").glob("test-*"):
        made.unlink()


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(**more) -> dict:
    """The demo in both precisions, a size, and ``more``."""
    return {
        "base": node("NibbleLoadDemo", precision="4-bit", rank=16),
        "teacher": node("NibbleLoadDemo", precision="16-bit", rank=16),
        "size": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "pos": node("CLIPTextEncode", clip=["base", 1], text="red apple"),
        "neg": node("CLIPTextEncode", clip=["base", 1], text=""),
        **more,
    }


def drawn(model: list, name: str = "drawn") -> dict:
    """Two steps with ``model``, saved as a latent."""
    sample = node("KSampler", model=model, positive=["pos", 0], negative=["neg", 0], latent_image=["size", 0], seed=7,
                  steps=2, cfg=1.0, sampler_name="euler", scheduler="sgm_uniform", denoise=1.0)  # fmt: skip
    return {
        f"{name}_sample": sample,
        name: node("SaveLatent", samples=[f"{name}_sample", 0], filename_prefix="distill"),
    }


def distilling(way: str, **options) -> dict:
    settings = dict(
        model=FOUR, teacher=SIXTEEN, latent=["size", 0], way=way, updates=2, batch=1, rank=4, learning_rate=1e-3,
        cfg=3.0, steps=2, seed=0, name=f"loras/test-{way}", start=4, pairs=1, teacher_steps=2, clip=["base", 1],
        prompts=PROMPTS, negative="",
    )  # fmt: skip
    last = drawn(["made", 0]) if way == "lcm" else {}
    made = graph(made=node("NibbleDistill", **{**settings, **options}), **last)
    made["name"], made["report"] = node("PreviewAny", source=["made", 1]), node("PreviewAny", source=["made", 2])
    return made


def through_stock_loader(server, file: str, base: list = FOUR, strength: float = 1.0) -> torch.Tensor:
    lora = node("LoraLoaderModelOnly", model=base, lora_name=os.path.basename(file), strength_model=strength)
    return server.latent(server.done(graph(lora=lora, **drawn(["lora", 0]))), "drawn")


def unfinished(server) -> set[str]:
    """Runs that were stopped, other tests' among them."""
    return {p.name for p in (server.base / "output" / "nibble_unfinished").glob("*")}


@pytest.mark.parametrize("way", ["lcm", "phased", "reflow", "one_step", "progressive"])
def test_every_way_gives_a_lora_that_stock_loaders_read(way, server):
    left = unfinished(server)
    result = server.done(distilling(way))
    name = result.text("name")
    with safe_open(server.base / "output" / name, framework="pt") as f:
        keys, about = list(f.keys()), json.loads(f.metadata()["nibble_distill"])
        record = json.loads(f.metadata()["nibble"])
    match = detect(Facts("sd15", "SD15", (File(name, 1.0, {"nibble": json.dumps(record)}),)))
    assert match.preset.id == record["preset"] == ("lcm_lora_sd15" if way == "lcm" else "distilled_sd15")
    assert match.steps == record["sampling"]["steps"] == (1 if way == "one_step" else about["steps"])
    assert len(keys) == 3 * 70 and all(k.startswith("diffusion_model.") for k in keys)
    assert about["way"] == way and about["omega"] == [2.0, 2.0] and len(about["base_sha256"]) == 32
    assert about["sampling"] in result.text("report") and "distance to the teacher's pictures" in result.text("report")
    if way == "lcm":
        got = server.latent(result, "drawn")
        assert torch.equal(got, through_stock_loader(server, name))
        assert not torch.equal(got, through_stock_loader(server, name, strength=0.0))
    assert unfinished(server) <= left


def test_lcf_learns_from_ones_own_pictures(server):
    picture = node("EmptyImage", width=128, height=128, batch_size=2, color=0xFF8800)
    pixels = node("VAEEncode", pixels=["picture", 0], vae=["base", 2])
    made = distilling("lcf", latent=["pixels", 0], teacher=None)
    del made["made"]["inputs"]["teacher"]
    result = server.done({**made, "picture": picture, "pixels": pixels})
    assert "consistency loss" in result.text("report") and "lcf" in result.text("name")


def test_loftq_gives_a_base_and_its_lora(server):
    made = graph(
        made=node("NibbleLoftQ", model=SIXTEEN, rank=8, base_rank=16, rounds=2, name="loras/test-loftq"),
        name=node("PreviewAny", source=["made", 2]),
        report=node("PreviewAny", source=["made", 3]),
        file=node("NibbleSaveModel", model=["made", 0], filename_prefix="diffusion_models/test-loftq"),
        **drawn(["made", 0], "alone"),
        **drawn(["made", 1], "both"),
    )
    result = server.done(made)
    name, file = result.text("name"), os.path.basename(result.text("file"))
    assert result.text("report").startswith("70 layers, mean weight error")
    alone, both = (server.latent(result, n) for n in ("alone", "both"))
    again = graph(four=node("NibbleLoadModel", model_name=file), **drawn(["four", 0]))
    assert torch.equal(server.latent(server.done(again), "drawn"), alone)
    again["lora"] = node("LoraLoaderModelOnly", model=["four", 0], lora_name=os.path.basename(name), strength_model=1.0)
    again["drawn_sample"]["inputs"]["model"] = ["lora", 0]
    assert torch.equal(server.latent(server.done(again), "drawn"), both)
    means = [float(x) for x in re.findall(r"0\.\d{4}", result.text("report").splitlines()[0])]
    assert len(means) == 3 and means[2] < means[1] < means[0]


def test_refine_keeps_codes_and_saves(server):
    refined = node("NibbleRefine", model=FOUR, teacher=SIXTEEN, latent=["size", 0], updates=3, batch=2,
                   learning_rate=1e-3, stops=2, cfg=3.0, seed=0, clip=["base", 1], prompts=PROMPTS,
                   negative="")  # fmt: skip
    result = server.done(graph(
        made=refined,
        report=node("PreviewAny", source=["made", 1]),
        file=node("NibbleSaveModel", model=["made", 0], filename_prefix="diffusion_models/test-refined"),
        before=node("NibbleSaveModel", model=FOUR, filename_prefix="diffusion_models/test-base"),
        **drawn(["made", 0]),
    ))  # fmt: skip
    paths = {n: server.base / "output" / result.text(n) for n in ("file", "before")}
    one, two = (load(p) for p in (paths["file"], paths["before"]))
    assert "prompts held out" in result.text("report") and one.layers.keys() == two.layers.keys()
    changed = 0
    for layer in two.layers:
        a, b = one.layers[layer].weight, two.layers[layer].weight
        assert torch.equal(a.qweight, b.qweight), layer
        changed += not torch.equal(a.wscales, b.wscales)
        assert torch.isfinite(parts.dequantize(a)).all() and kernels.wrap(a).shape == a.shape
    assert changed > 35  # the smallest changes are lost in 16 bits
    assert abs(paths["file"].stat().st_size - paths["before"].stat().st_size) < 10_000
    assert json.loads(one.metadata["nibble"])["refined"]["updates"] == 3
    again = graph(four=node("NibbleLoadModel", model_name=os.path.basename(result.text("file"))), **drawn(["four", 0]))
    assert torch.equal(server.latent(server.done(again), "drawn"), server.latent(result, "drawn"))


@pytest.mark.parametrize("kind", ["NibbleDistill", "NibbleRefine"])
def test_stopped_within_a_second_and_nothing_left(kind, server):
    plain = server.latent(server.done(graph(**drawn(FOUR))), "drawn")
    made = distilling("one_step", updates=100_000, seed=3, name="loras/stopped")
    if kind == "NibbleRefine":
        inputs = {k: made["made"]["inputs"][k] for k in ("model", "teacher", "latent", "clip", "prompts", "negative")}
        more = dict(updates=100_000, batch=1, learning_rate=1e-3, stops=1, cfg=1.0, seed=0)
        made = graph(made=node(kind, **inputs, **more), **drawn(["made", 0]))
    before = set((server.base / "output").rglob("*"))
    prompt = server.queue(made)
    time.sleep(8)
    began = time.monotonic()
    server.post("/interrupt", {})
    result = server.wait(prompt, 60)
    assert time.monotonic() - began < 5 and any(k == "execution_interrupted" for k, _ in result.messages)
    left = {p.name for p in set((server.base / "output").rglob("*")) - before if p.is_file()}
    assert not [n for n in left if n.endswith(".part")] and "stopped_00001_.safetensors" not in left
    kept = {"lock", "run.json"}
    assert all(n.startswith("pairs-") or n.endswith(".state.safetensors") or n in kept for n in left), left
    assert torch.equal(server.latent(server.done(graph(**drawn(FOUR))), "drawn"), plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(way="lcf"), "lcf learns from pictures"),
        (dict(way="progressive", start=6, steps=4), "cannot be halved"),
        (dict(prompts=" "), "write prompts"),
    ],
)
def test_refuses_in_one_sentence(change, words, server):
    made = distilling("lcm", **{k: v for k, v in change.items() if k != "way"})
    made["made"]["inputs"]["way"] = change.get("way", "lcm")
    assert words in server.run(made).error


def test_refine_and_loftq_refuse_the_wrong_precision(server):
    made = dict(latent=["size", 0], updates=1, batch=1, learning_rate=1e-3, stops=1, cfg=1.0, seed=0,
                clip=["base", 1], prompts="fox")  # fmt: skip
    error = server.run(graph(made=node("NibbleRefine", model=SIXTEEN, teacher=SIXTEEN, **made), **drawn(["made", 0])))
    assert "no svdquant_w4a4 layer" in error.error
    base = node("NibbleLoftQ", model=FOUR, rank=4, base_rank=0, rounds=1, name="loras/no")
    assert "4-bit already" in server.run(graph(made=base, **drawn(["made", 0]))).error


def test_the_workflow_runs_and_few_steps_are_recognised(server):
    """workflows/distill.json with less to do; Few-Step Sampler knows the LoRA by what NibbleDistill says of it."""
    workflow = json.loads((ROOT / "workflows" / "api" / "distill.json").read_text(encoding="utf-8"))
    workflow["5"]["inputs"] |= dict(updates=2, batch=1, pairs=1, teacher_steps=2, name="loras/test-workflow")
    result = server.done(workflow)
    assert server.image(result, "14").shape == (128, 128, 3) and "LCM-LoRA" in result.text("15")
    file = next((server.base / "output" / "loras").glob("test-workflow*"))
    assert len(load_file(file)) == 210
