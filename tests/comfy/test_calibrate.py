"""Calibration inside a real server: a 4-bit MODEL that samples, saves and reloads; interrupts; resuming; doing nothing
twice.
"""

import math
import time

import pytest
import torch

from .test_tiny_models import FAMILIES, nibble, stock, workflow


def calibrated(family: str, name: str, **options) -> dict:
    """A graph: stock loader -> NibbleCalibrate -> stock KSampler, saving latent and model."""
    graph = workflow(family, stock(name), size=64)
    _, width, pooled, cfg, _ = FAMILIES[family]
    graph["float"] = graph.pop("model")
    for i in range(2):
        graph[f"p{i}"] = {
            "class_type": "NibbleTestConditioning",
            "inputs": dict(tokens=12, width=width, pooled=pooled, seed=10 + i),
        }
    graph["both"] = {
        "class_type": "ConditioningCombine",
        "inputs": dict(conditioning_1=["p0", 0], conditioning_2=["p1", 0]),
    }
    settings = dict(preset="fast", target="svdquant_w4a4", rank=16, budget_mib=0, noise_levels=3, cfg=cfg, seed=1)
    graph["model"] = {
        "class_type": "NibbleCalibrate",
        "inputs": dict(
            model=["float", 0],
            latent=["latent", 0],
            positive=["both", 0],
            negative_cond=["neg", 0],
            **{**settings, **options},
        ),
    }
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["model", 1]}}
    graph["chart"] = {"class_type": "PreviewImage", "inputs": {"images": ["model", 2]}}
    return graph  # fmt: skip


@pytest.fixture
def float_model(server, tiny):
    """float_model(family) -> name in the server's models."""

    def put(family: str) -> str:
        target = server.models("diffusion_models") / f"{family}.safetensors"
        if not target.exists():
            target.symlink_to(tiny(family))
        return target.name

    return put


def latent_of(server, graph) -> torch.Tensor:
    return server.latent(server.done(graph), "save").flatten().double()


@pytest.mark.parametrize("family", ["sd3", "flux", "flux2", "sd15"])
def test_samples_like_the_float_model_and_reports(family, server, float_model):
    name = float_model(family)
    expected = latent_of(server, workflow(family, stock(name), size=64))
    result = server.done(calibrated(family, name))
    got = server.latent(result, "save").flatten().double()
    assert torch.nn.functional.cosine_similarity(expected, got, dim=0).item() > 0.93
    text = result.text("report")
    assert "layers by preset fast" in text and "are calibrated" in text and "| svdquant_w4a4 |" in text
    assert server.image(result, "chart").shape == (420, 1024, 3)
    # layers after a GELU: two of FLUX.1's double block, three of SD3's (its last text half has none), none elsewhere
    unsigned = {"flux": 2, "sd3": 3, "flux2": 0, "sd15": 0}[family]
    assert text.count("| unsigned |") == unsigned
    assert (f"{unsigned} have unsigned activations" in text) is (unsigned > 0)


def test_what_it_keeps_and_what_it_sees(inside):
    """Nothing of the model that went in stays in memory, also of LoftQ's, Refine's and a slimmed one, and ComfyUI can
    make the new model again; layers behind ComfyUI's fused calls (Wan's int8 feed-forwards) are seen.
    """
    found = inside("calibrate_keeps")
    assert found["alive"] == {"calibrate": [], "loftq": [], "refine": [], "slim, then calibrate": []}
    assert all(found["again"].values())
    assert found["seen"]["calibrating"] == found["layers"] and len(found["layers"]) == 4
    assert found["seen"]["plainly"] != found["layers"] and found["left"] is False


def test_solved_layers_leave_the_gpu(inside):
    """They stayed on it for life, and ComfyUI could not unload them."""
    found = inside("calibrate_on_gpu")
    assert found.keys() == {"calibrate", "without data", "loftq", "refine"}
    assert all(x == {"where": ["cpu"], "room": True, "mixes": []} for x in found.values()), found


def errors(table: str) -> list[tuple[float, float]]:
    """(error, data-free error) of every measured layer in a report, on tokens that its calibration did not see. (A
    modulation of FLUX.1 sees too few to keep some back.)
    """
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "| error |" not in line]
    return [(float(r[4]), float(r[5])) for r in rows if "-" not in (r[4].strip(), r[5].strip())]


@pytest.mark.parametrize(("family", "layers"), [("flux", 10), ("flux2", 10), ("sd3", 17)])
def test_calibrated_is_closer_than_data_free(family, layers, server, float_model):
    """Over all layers, each by its own outputs. (One picture of a tiny model is a tie: an activation that rounds the
    other way on another processor moves it by as much as the two differ.)
    """
    found = errors(server.done(calibrated(family, float_model(family))).text("report"))
    assert len(found) == layers and all(error <= free for error, free in found)
    ratio = math.exp(sum(math.log(error / free) for error, free in found) / layers)
    print(f"{family}: {ratio:.3f} of the data-free error")
    assert ratio < 0.75


def test_saved_file_reloads_to_the_same_images(server, float_model):
    graph = calibrated("sd3", float_model("sd3"))
    graph["file"] = {
        "class_type": "NibbleSaveModel",
        "inputs": dict(model=["model", 0], filename_prefix="diffusion_models/cal"),
    }
    result = server.done(graph)
    again = latent_of(server, workflow("sd3", nibble(result.text("file").split("/")[1]), size=64))
    assert torch.equal(server.latent(result, "save").flatten().double(), again)
    table = server.done({"n": {"class_type": "NibbleInspect", "inputs": {"file": result.text("file")}}}).text("n")
    assert "calibration fast, prompts 2, seed 1" in table


def test_the_same_again_does_nothing(server, float_model):
    graph = calibrated("sd3", float_model("sd3"), seed=77)
    server.done(graph)
    second = server.done(graph)
    cached = next(d["nodes"] for kind, d in second.messages if kind == "execution_cached")
    assert "model" in cached


def test_a_lora_before_is_baked_in(server, float_model, tmp_path):
    """Calibrating a patched model equals patching, for the float part of the graph: the LoRA's effect is there."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    key = "diffusion_model.joint_blocks.0.x_block.mlp.fc1"
    lora = {
        f"{key}.lora_down.weight": torch.randn(4, 128, generator=g),
        f"{key}.lora_up.weight": torch.randn(512, 4, generator=g),
    }
    save_file(lora, server.models("loras") / "bake.safetensors")
    name = float_model("sd3")
    plain = calibrated("sd3", name)
    baked = calibrated("sd3", name)
    baked["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": dict(model=["float", 0], lora_name="bake.safetensors", strength_model=1.0),
    }
    baked["model"]["inputs"]["model"] = ["lora", 0]
    direct = workflow("sd3", stock(name), size=64)
    direct["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": dict(model=["model", 0], lora_name="bake.safetensors", strength_model=1.0),
    }
    direct["sample"]["inputs"]["model"] = ["lora", 0]
    expected, without, got = (latent_of(server, x) for x in (direct, plain, baked))
    print(f"{float((got - expected).norm() / (without - expected).norm()):.3f} of the distance without the LoRA")
    assert (got - expected).norm() < 0.7 * (without - expected).norm()


@pytest.mark.parametrize("target", ["convrot_w4a4", "asym_w4a8_int8", "nvfp4"])
def test_core_formats_load_without_any_pack(target, server, float_model):
    """What is written in one of ComfyUI's own formats goes through its stock loader."""
    graph = calibrated("flux", float_model("flux"), target=target, preset="data_free")
    graph["file"] = {
        "class_type": "NibbleSaveModel",
        "inputs": dict(model=["model", 0], filename_prefix=f"diffusion_models/{target}"),
    }
    result = server.done(graph)
    expected = latent_of(server, workflow("flux", stock(float_model("flux")), size=64))
    got = latent_of(server, workflow("flux", stock(result.text("file").split("/")[1]), size=64))
    assert torch.nn.functional.cosine_similarity(expected, got, dim=0).item() > 0.9
    mine = server.latent(result, "save").flatten().double()
    assert torch.nn.functional.cosine_similarity(mine, got, dim=0).item() > 0.999


def test_a_byte_budget_holds(server, float_model):
    """The whole file fits, header and all, and more bytes are used when they are given."""
    sizes = {}
    for budget in (5, 6):
        graph = calibrated("flux", float_model("flux"), budget_mib=budget)
        graph["file"] = {
            "class_type": "NibbleSaveModel",
            "inputs": dict(model=["model", 0], filename_prefix=f"diffusion_models/b{budget}"),
        }
        sizes[budget] = (server.base / "output" / server.done(graph).text("file")).stat().st_size
    assert all(size <= budget * 2**20 for budget, size in sizes.items()), sizes
    assert sizes[5] < sizes[6]


def test_a_budget_that_cannot_be_met_says_what_it_takes(server, float_model):
    result = server.run(calibrated("flux", float_model("flux"), budget_mib=1))
    assert result.status == "error" and "of the smallest choice for every layer; raise it" in result.error


class TestInterrupt:
    def test_stops_within_a_second_leaves_nothing_and_goes_on(self, server, float_model):
        graph = calibrated("sd15", float_model("sd15"), noise_levels=30, seed=5)
        prompt = server.queue(graph)
        end = time.monotonic() + 60
        while not server.get("/queue")["queue_running"] and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(3)
        start = time.time()
        server.post("/interrupt", {})
        result = server.wait(prompt)
        assert result.moments[1] - start < 2  # one second, and one that a busy machine adds to it
        assert any(kind == "execution_interrupted" for kind, _ in result.messages)
        assert not list(server.base.rglob("*.part"))
        hooks = server.done({
            "model": graph["float"], "hooks": {"class_type": "NibbleTestHooks", "inputs": {"model": ["model", 0]}},
        }).text("hooks")  # fmt: skip
        assert hooks == "0"
        assert "are calibrated" in server.done({**graph, "model": {**graph["model"], "inputs": {
            **graph["model"]["inputs"], "noise_levels": 3}}}).text("report")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "4bit"}, "This model is 4-bit already. Calibrate the 16-bit original"),
        ({"positive": None}, "Preset fast needs prompts to sample: connect CLIP and write some, or connect positive"),
    ],
)
def test_refusals_are_sentences(options, words, server, float_model, tiny_4bit):
    graph = calibrated("sd3", float_model("sd3"))
    if options.get("model"):
        target = server.models("diffusion_models") / "sd3-4bit.safetensors"
        if not target.exists():
            target.symlink_to(tiny_4bit("sd3"))
        graph["float"] = nibble(target.name)
    else:
        for key in ("positive", "negative_cond"):
            graph["model"]["inputs"].pop(key)
    result = server.run(graph)
    assert result.status == "error" and words in result.error
