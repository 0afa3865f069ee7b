"""The profiling workflows on the demo model in a real server, against what ComfyUI itself says of the runs."""

import json
from pathlib import Path

import pytest
from comfyui_nibble import demo

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
pytestmark = pytest.mark.skipif(not (demo.MODEL / "unet").exists(), reason="the demo model is not in this checkout")


def by_id(run: dict) -> dict[str, dict]:
    return {n["id"]: n for n in run["nodes"]}


def shipped(name: str, seed: int) -> dict:
    """An API workflow of this pack with another seed, so that no other test's result is taken for it."""
    graph = json.loads((API / f"{name}.json").read_text())
    for entry in graph.values():
        if "seed" in entry["inputs"]:
            entry["inputs"]["seed"] = seed
    return graph


def report_of(server, result) -> tuple[dict, str]:
    """(the saved run of the workflow's profiler as it is after the run, the profiler node's id)"""
    (id,) = [id for id, out in result.outputs.items() if "nibble_run" in out]
    entry = result.outputs[id]["nibble_run"][0]["file"]
    return json.loads((server.base / "output" / entry["subfolder"] / entry["filename"]).read_text()), id


def test_quickstart_is_profiled(server):
    """Every node, every step, the whole wall time, and recording at 2 % of it at most."""
    graph = shipped("profile", seed=901)
    result = server.done(graph)
    run, _ = report_of(server, result)
    nodes = by_id(run)
    assert set(nodes) == set(graph) and {n["state"] for n in nodes.values()} <= {"ran", "cached"}
    assert len(nodes["6"]["steps"]) == 25 and nodes["6"]["exact"]
    assert sum(n["seconds"] for n in nodes.values()) == pytest.approx(result.wall, rel=0.05)
    assert run["recording"] <= 0.02 * run["seconds"]
    assert nodes["7"]["kind"] == "vae" and nodes["11"]["kind"] == "other"  # it asks about the VAE, and codes nothing
    text = result.text("12")
    assert "**It fits**" in text and "memory = max(" in text
    again = by_id(report_of(server, server.done(graph))[0])
    assert again["6"]["state"] == again["1"]["state"] == "cached"


def test_16_bit_against_4_bit(server):
    """One workflow shows both pictures, PSNR, time and memory side by side."""
    result = server.done(shipped("compare", seed=902))
    report, profile = result.text("13"), result.text("17")
    assert "PSNR (dB)" in report and "SSIM" in report
    psnr = float(next(line for line in report.splitlines() if line.startswith("| PSNR")).split("|")[2])
    assert psnr > 15
    rows = [line for line in profile.splitlines() if line.startswith(("| 16-bit |", "| 4-bit |"))]
    assert len(rows) == 2 and all("MiB" in row and "25" in row for row in rows)
    run, _ = report_of(server, result)
    sizes = {s["label"]: s["weight_bytes"] for s in run["samplings"]}
    assert sizes["4-bit"] < sizes["16-bit"] and rows[0].startswith("| 16-bit |")  # the larger model stands first
    kinds = {n["id"]: n["kind"] for n in run["nodes"]}
    assert {id: kinds[id] for id in ("1", "3", "8", "10", "12")} == dict(zip(
        ("1", "3", "8", "10", "12"), ("load", "text", "sample", "vae", "other"), strict=True))  # fmt: skip
    picture = server.image(result, "14")
    assert picture.shape[1] == 3 * 128 + 2 * 8 and picture.std() > 0.05


def test_the_last_two_runs_are_compared(server):
    for seed in (903, 904):
        server.done(shipped("profile", seed))
    result = server.done(shipped("compare-runs", 0))
    assert "| measure |" in result.text("2") and server.image(result, "3").std() > 0.05


def test_a_saved_demo_model_is_estimated_from_its_file(server):
    """ComfyUI's detection does not know its widths; the estimate does, and counts it as the loaded model."""
    loader = {"class_type": "NibbleLoadDemo", "inputs": {"precision": "4-bit", "rank": 16}}
    saver = {"class_type": "NibbleSaveModel", "inputs": {"model": ["m", 0], "filename_prefix": "t/demo"}}
    written = server.base / "output" / server.done({"m": loader, "s": saver}).text("s")
    written.rename(server.models("diffusion_models") / "saved-demo.safetensors")
    task = dict(width=128, height=128, batch=1, steps=4, cfg=3.0, precision="as stored", rank=16, lora_rank=0,
                gpu="this one")  # fmt: skip
    asked = {"file": {"file": "diffusion_models/saved-demo.safetensors"}, "loaded": {"file": "none", "model": ["m", 0]}}
    graph = {"m": loader}
    for name, what in asked.items():
        graph[name] = {"class_type": "NibbleEstimate", "inputs": task | what}
        graph[f"{name}_json"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 1]}}
    result = server.done(graph)
    file, loaded = (json.loads(result.text(f"{name}_json")) for name in asked)
    for number in ("weights", "flops_per_evaluation", "live_bytes", "family"):
        assert file[number] == loaded[number], number
