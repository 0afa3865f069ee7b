"""Estimates of every tiny model in a real server, against real tensors and real samplings."""

import json

import pytest
import torch
from comfyui_nibble.checkpoints import header
from comfyui_nibble.checkpoints.convert import plan_source
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.profiling import calibrate, memory
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import KEEP, SCHEMES
from safetensors.torch import load_file

# family: latent channels, conditioning width, pooled width, cfg
FAMILIES = {
    "sd15": (4, 768, 0, 4.0),
    "sdxl": (4, 2048, 1280, 4.0),
    "flux": (16, 64, 64, 1.0),
    "sd3": (16, 128, 128, 4.0),
}
RANK = 16


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def ask(**changes) -> dict:
    task = dict(file="none", width=128, height=128, batch=1, steps=4, cfg=4.0, precision="as stored", rank=RANK,
                lora_rank=0, gpu="this one")  # fmt: skip
    return node("NibbleEstimate", **task | changes)


CARD = {"gpu": "RTX 4060 8 GB"}  # where weights and growth are asked for: one simulation a question, not two


def answers(server, asked: dict[str, dict], more: dict | None = None) -> dict[str, dict]:
    """The JSON of several estimates, asked in one workflow."""
    graph = dict(more or {})
    for name, estimate in asked.items():
        graph |= {name: estimate, f"{name}_json": node("PreviewAny", source=[name, 1])}
    result = server.done(graph)
    return {name: json.loads(result.text(f"{name}_json")) for name in asked}


@pytest.fixture
def installed(server, tiny, tiny_4bit):
    """installed(family) -> (16-bit name, 4-bit name) in the server's models/diffusion_models."""

    def put(family: str) -> tuple[str, str]:
        for path in (tiny(family), tiny_4bit(family)):
            target = server.models("diffusion_models") / path.name
            if not target.exists():
                target.symlink_to(path)
        return tiny(family).name, tiny_4bit(family).name

    return put


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def file_bytes(path) -> int:
    return sum(e.nbytes for n, e in header.read(path).tensors.items() if not n.endswith(".comfy_quant"))


def as_scheme(path, id: str) -> int:
    """Bytes of a float file's tensors with every planned layer in scheme ``id``, rank 0: one layer of each shape is
    quantized for real.
    """
    tensors = load_file(path)
    with open_source(path) as source:
        plans = {n: p for n, p in plan_source(source, 0).items() if p.scheme != KEEP}
    total, known = 0, {}
    for name, planned in plans.items():
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        unsigned = planned.act_unsigned and SCHEMES[id].act_bits == 4
        kind = (weight.shape, bias is None, unsigned)
        if kind not in known and SCHEMES[id].fits(*weight.shape):
            done = quantize_weight(weight, bias, LayerPlan(id, "", 0, unsigned), torch.bfloat16)
            known[kind] = nbytes(vars(done.weight).values()) + (0 if done.bias is None else 2 * len(done.bias))
        elif kind not in known:
            known[kind] = 2 * weight.numel() + (0 if bias is None else 2 * len(bias))
        total += known[kind]
    return total + sum(2 * t.numel() for t in tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_exact_for_every_precision(family, server, installed, tiny, tiny_4bit):
    name, name4 = (f"diffusion_models/{n}" for n in installed(family))
    asked = {"stored": ask(file=name), "stored4": ask(file=name4), "sixteen": ask(file=name, precision="16-bit"),
             "four": ask(file=name, precision="4-bit"), "eight": ask(file=name, precision="8-bit"),
             "back": ask(file=name4, precision="16-bit")}  # fmt: skip
    asked |= {id: ask(file=name, precision=id, rank=0) for id in SCHEMES}
    for question in asked.values():
        question["inputs"] |= CARD
    found = {n: a["weights"] for n, a in answers(server, asked).items()}
    assert found["stored"] == file_bytes(tiny(family))
    assert found["stored4"] == file_bytes(tiny_4bit(family))
    assert found["four"] == found["stored4"]  # what nibble quantize made of it, to the byte
    assert found["sixteen"] == sum(2 * t.numel() for t in load_file(tiny(family)).values())
    assert found["back"] == found["sixteen"]
    for id in SCHEMES:
        assert found[id] == as_scheme(tiny(family), id), id
    assert found["four"] < found["eight"] < found["sixteen"] < found["stored"]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_loaded_model_counts_as_its_file(family, server, installed, tiny_4bit):
    _, name = installed(family)
    more = {"model": node("NibbleLoadModel", model_name=name)}
    found = answers(server, {"file": ask(file=f"diffusion_models/{name}"), "loaded": ask(model=["model", 0])}, more)
    assert found["file"]["weights"] == found["loaded"]["weights"] == file_bytes(tiny_4bit(family))
    assert found["file"]["flops_per_evaluation"] == found["loaded"]["flops_per_evaluation"] > 10**8
    assert found["file"]["live_bytes"] == found["loaded"]["live_bytes"]


def test_flux2_is_simulated_on_its_own_latent(server, tiny):
    """It has FLUX.1's class without a pooled vector, and 16 pixels to a pixel of its latent."""
    path = tiny("flux2")
    (server.models("diffusion_models") / path.name).symlink_to(path)
    found = answers(server, {"e": ask(file=f"diffusion_models/{path.name}", width=1024, height=1024, cfg=1.0)})["e"]
    layers = sum(t.numel() for n, t in load_file(path).items() if "_blocks." in n and t.ndim == 2)
    tokens, hidden, blocks = (1024 // 16) ** 2, 256, 2
    attention = 4 * blocks * hidden * (tokens + 256) ** 2
    assert found["flops_per_evaluation"] == pytest.approx(2 * layers * tokens + attention, rel=0.2)  # text is a little


def test_it_grows_with_the_picture_the_batch_and_the_guidance(server, installed):
    name = f"diffusion_models/{installed('sd15')[1]}"
    grows = {"w": [dict(width=w) for w in (64, 128, 256)], "b": [dict(batch=b) for b in (1, 2, 5)],
             "c": [dict(cfg=c) for c in (1.0, 4.0)], "l": [dict(lora_rank=r) for r in (0, 8, 64)],
             "p": [dict(precision=p, rank=4) for p in ("4-bit", "8-bit", "16-bit")]}  # fmt: skip
    asked = {f"{k}{i}": ask(file=name, **task | CARD) for k, tasks in grows.items() for i, task in enumerate(tasks)}
    found = answers(server, asked)
    for key, tasks in grows.items():
        peaks = [found[f"{key}{i}"]["peak"] for i in range(len(tasks))]
        assert peaks == sorted(set(peaks)), (key, peaks)


def test_the_report_answers_and_shows_its_numbers(server, installed):
    name = f"diffusion_models/{installed('sd15')[0]}"
    graph = {"e": ask(file=name, gpu="RTX 4060 8 GB", precision="4-bit"),
             "chart": node("SaveImage", images=["e", 2], filename_prefix="estimate")}  # fmt: skip
    result = server.done(graph)
    text = result.text("e")
    assert text.startswith("**It fits**") and "RTX 4060 8 GB" in text and "memory = max(" in text
    assert "RTX 5090" in text and all(id in text for id in SCHEMES) and "nobody ran" in text
    assert server.image(result, "chart").std() > 0.05
    huge = {"e": ask(file=name, gpu="RTX 4060 8 GB", width=16384, height=16384)}
    assert server.done(huge).text("e").startswith("**It does not fit**")


def test_wrong_questions_are_answered_in_one_sentence(server, installed):
    name = installed("sd15")[0]
    assert "one of the two" in server.run({"e": ask()}).error
    both = {"m": node("NibbleLoadModel", model_name=name), "e": ask(file=f"diffusion_models/{name}", model=["m", 0])}
    assert "one of the two" in server.run(both).error
    for bad in ("../x.safetensors", "diffusion_models/../../x.safetensors", "vae/x.safetensors"):
        reply = server.post("/prompt", {"prompt": {"e": ask(file=bad)}, "client_id": server.client})
        assert reply["http"] == 400


def test_runs_on_this_machine_calibrate_the_estimate(server, installed):
    """After self-recorded runs the estimate knows the seconds; before, it says that it does not."""
    file = installed("sd3")[0]
    _, width, pooled, cfg = FAMILIES["sd3"]
    question = {"e": ask(file=f"diffusion_models/{file}", width=256, height=256, cfg=cfg)}
    before = answers(server, question)["e"]
    for size, steps in ((128, 2), (128, 6), (256, 2), (256, 6)):
        server.done({
            "model": node("NibbleLoadModel", model_name=file),
            "timed": node("NibbleProfileModel", model=["model", 0], label="16-bit"),
            "pos": node("NibbleTestConditioning", tokens=154, width=width, pooled=pooled, seed=1),
            "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
            "sample": node("KSampler", model=["timed", 0], positive=["pos", 0], negative=["pos", 0], seed=steps,
                           latent_image=["latent", 0], steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple",
                           denoise=1.0),
            "save": node("SaveLatent", samples=["sample", 0], filename_prefix="t/calibrate"),
        })  # fmt: skip
    damaged = server.base / "output" / "nibble" / "damaged.json"
    damaged.write_text('{"format": "nibble-profile-1", "nodes": 3}')  # a broken file must not end all estimates
    after = answers(server, question)["e"]
    damaged.unlink()
    assert not before["calibrated"] and before["seconds"] is None and "was measured" in before["how"]
    assert after["calibrated"] and after["seconds"] > 0 and "4 measured runs of sd3" in after["how"]
    assert after["weights"] == before["weights"]


def test_what_nibble_profile_wrote_is_used(server, installed):
    """Its file in output/nibble; a row of the other engine is used where there is none of ComfyUI's own, and said."""
    question = {"e": ask(file=f"diffusion_models/{installed('flux')[0]}", cfg=1.0)}
    key = calibrate.Key("diffusers", "flux", "float32", "matrix", "16-bit", memory.probe("cpu").device.name)
    file = server.base / "output" / "nibble" / "mine.calibration.json"
    file.parent.mkdir(exist_ok=True)
    assert not answers(server, question)["e"]["calibrated"]
    file.write_text(calibrate.to_json([calibrate.Constants(key, 1e6, 1.5, 0.25, 0.0, 0.125, 1e20, 4)]))
    found = answers(server, question)["e"]
    file.write_text("{}")
    assert "mine.calibration.json: it is not a calibration" in server.run(question).error
    file.unlink()
    assert found["how"] == "fitted on 4 measured runs of flux on this machine in diffusers"
    assert found["activation"] == round(1e6 + 1.5 * found["live_bytes"])
    assert found["seconds"] == pytest.approx(0.25 + 4 * 0.125, rel=1e-6)


MEASURED = [("sd15", True), ("flux", False), ("flux", True), ("sd3", False)]


@pytest.fixture(scope="module")
def measured(inside, tiny, tiny_4bit):
    """What ComfyUI's sampler took of each `MEASURED` model, against the prediction; all in one start of ComfyUI."""
    asked = []
    for family, four_bit in MEASURED:
        channels, width, pooled, cfg = FAMILIES[family]
        path = str((tiny_4bit if four_bit else tiny)(family))
        asked.append(dict(path=path, family=family, channels=channels, width=width, pooled=pooled, cfg=cfg))
    return dict(zip(MEASURED, inside("profiling_calibrate", json.dumps(asked)), strict=True))


@pytest.mark.parametrize("family, four_bit", MEASURED)
def test_memory_is_predicted_within_15_percent(family, four_bit, measured):
    """Of three sizes, one of them unseen. The simulation alone is enough for 16-bit weights; the 4-bit kernels' own
    buffers come with the fit.
    """
    peaks = measured[family, four_bit]["peaks"]
    assert len(peaks) == 3
    for peak in peaks:
        assert peak["predicted"] == pytest.approx(peak["measured"], rel=0.15), peak
        assert four_bit or peak["simulated"] == pytest.approx(peak["measured"], rel=0.15), peak


@pytest.mark.parametrize("family, four_bit", MEASURED)
def test_steps_never_run_are_predicted_within_5_percent(family, four_bit, measured):
    """Fitted on 2 and 6 steps of two sizes, asked for 4 and 10 of a third."""
    checks = measured[family, four_bit]["checks"]
    assert [c["steps"] for c in checks] == [4, 10]
    for check in checks:
        assert check["predicted"] == pytest.approx(check["measured"], rel=0.05), check
