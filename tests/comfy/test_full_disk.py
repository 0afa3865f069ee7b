"""A full, a read-only and a filling disk under a real server: one sentence without this machine's paths, before the
work where it can be known, and what took long is not lost.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comfyui_nibble.writing import unfinished
from safetensors import safe_open

from .conftest import start

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
from lora_graphs import node

ROOT = Path(__file__).resolve().parents[2]
DEMO = {
    "1": node("NibbleLoadDemo", precision="4-bit", rank=16),
    "16": node("NibbleLoadDemo", precision="16-bit", rank=16),
}


def mount(where: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, "-t", "tmpfs", "tmpfs", str(where)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no disk can be mounted here")


@pytest.fixture(scope="module")
def disk(tmp_path_factory, tiny_4bit):
    """A ComfyUI whose output/ and temp/ are small disks of their own."""
    base, server = tmp_path_factory.mktemp("disk"), None
    folders = [base / "output", base / "temp"]
    models = base / "models" / "diffusion_models"
    for folder in (*folders, models):
        folder.mkdir(parents=True)
    (models / "tiny.safetensors").symlink_to(tiny_4bit("sd3"))
    try:
        mount(folders[0], "-o", "size=64k")
        server = start(base)
        folders[1].mkdir(exist_ok=True)  # ComfyUI removed it
        mount(folders[1], "-o", "size=30m")
        yield server
    finally:
        if server is not None:
            server.process.kill()
            server.process.wait()
        for folder in folders:
            subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.fixture
def output(disk):
    """output(flags): output/, empty and mounted anew."""

    def anew(flags: str) -> Path:
        where = disk.base / "output"
        subprocess.run(["umount", str(where)], check=True)
        mount(where, "-o", flags)
        return where

    return anew


def load(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def api(workflow: str, id: str, /, **inputs) -> dict:
    """The node ``id`` of a shipped workflow and what it hangs on, with other ``inputs``; its texts are shown."""
    graph = load(workflow)
    graph[id]["inputs"] |= inputs
    needed, seen = [id], {}
    while needed:
        at = needed.pop()
        seen[at] = graph[at]
        needed += [v[0] for v in graph[at]["inputs"].values() if isinstance(v, list) and v[0] not in seen]
    return seen


def text(graph: dict, **sources) -> dict:
    return graph | {name: node("PreviewAny", source=source) for name, source in sources.items()}


GRAPHS = {
    "save": {**DEMO, "out": node("NibbleSaveModel", model=["1", 0], filename_prefix="diffusion_models/x")},
    "train": text(api("train-lora", "2", steps=4, batch=1, name="loras/x"), said=["2", 2]),
    "distill": text(api("distill", "5", updates=2, batch=1, pairs=1, teacher_steps=2, name="loras/x"), said=["5", 2]),
    "loftq": text({**DEMO, "2": node("NibbleLoftQ", model=["16", 0], rank=8, base_rank=16, rounds=1, name="loras/x")},
                  said=["2", 3]),
    "convert": {"out": node("NibbleConvert", file="diffusion_models/tiny.safetensors", requantize=False, rank=32,
                            filename_prefix="diffusion_models/x")},
}  # fmt: skip
DISKS = {"size=64k": "free. Nothing was begun. Free ", "size=99m,ro": "(the disk is read-only). Nothing was begun. "}


@pytest.mark.parametrize("flags", DISKS)
@pytest.mark.parametrize("what", GRAPHS)
def test_it_is_said_before_the_work(disk, output, what, flags):
    folder = output("size=64k,mode=777") if "ro" not in flags else output("size=99m")
    for name in ("loras", "diffusion_models"):
        (folder / name).mkdir()
    if "ro" in flags:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    began = time.monotonic()
    error = disk.run(GRAPHS[what]).error
    assert DISKS[flags] in error and error.startswith("x_00001_.safetensors: ") and str(disk.base) not in error
    assert "\n" not in error.strip() and time.monotonic() - began < 60
    assert [p.name for p in folder.rglob("*") if p.is_file()] == []


def test_a_folder_that_cannot_be_made(disk, output):
    folder = output("size=99m")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for what, name in (("save", "diffusion_models/x"), ("train", "loras/x"), ("loftq", "loras/x")):
        error = disk.run(GRAPHS[what]).error
        assert error.startswith(f"{name}: it cannot be written (the disk is read-only). Choose another name"), error
        assert str(disk.base) not in error


@pytest.mark.parametrize("flags", DISKS)
def test_calibrate_needs_no_room(disk, output, flags):
    output(flags)
    calibrate = api("calibrate", next(i for i, n in load("calibrate").items() if n["class_type"] == "NibbleCalibrate"),
                    preset="data_free", noise_levels=2)  # fmt: skip
    id = next(i for i, n in calibrate.items() if n["class_type"] == "NibbleCalibrate")
    said = disk.done(text(calibrate, said=[id, 1])).text("said")
    assert "If this run is stopped it begins anew: run.json: it " in said and str(disk.base) not in said


def filled(folder: Path) -> None:
    """Leaves no room in it."""
    with (folder / "filler").open("wb", buffering=0) as f:
        try:
            while True:
                f.write(b"x" * 4096)
        except OSError:
            return


def test_the_disk_fills_up_while_a_lora_is_trained(disk, output):
    """What was trained is in temp/, and said."""
    folder, name = output("size=60m"), "temp/nibble_rescued/full_00001_.safetensors"
    graph = text(api("train-lora", "2", steps=30, batch=2, name="loras/full"), said=["2", 2], file=["2", 1])
    prompt, end = disk.queue(graph), time.monotonic() + 120
    while not any((folder / unfinished.FOLDER).glob("*/lora.state.safetensors")) and time.monotonic() < end:
        time.sleep(0.005)
    filled(folder)
    result = disk.wait(prompt)
    assert result.status == "success", result.error
    said = result.text("said")
    assert "full_00001_.safetensors: it needs" in said and "and 0 kB are free" in said
    assert f"It is kept as {name} until ComfyUI is started again" in said and str(disk.base) not in said
    assert result.text("file") == name
    with safe_open(disk.base / name, "pt") as f:
        assert len(f.keys()) == 210


def test_small_files(disk, output):
    output("size=4k,ro")
    domain = api("domain-prompts", "11", name="mine")
    error = disk.run(domain).error
    assert error.startswith("mine.yaml: it cannot be written (the disk is read-only). Choose another name"), error
    profile = node("NibbleProfiler", anything=["1", 0], label="x", filename_prefix="run")
    error = disk.run({"1": DEMO["1"], "profile": profile}).error
    assert "it cannot be written (the disk is read-only)" in error and str(disk.base) not in error


def test_scores_are_shown_all_the_same(disk, output):
    output("size=4k,ro")
    picture = {"p": node("EmptyImage", width=64, height=64, batch_size=2, color=0xFF8800)}
    values = dict(folder="none", reference_folder="none", prompts="a fox", image_reward=False)
    scores = node("NibbleScores", images=["p", 0], clip=["1", 1], clip_vision=["1", 3], **values)
    said = disk.done({**DEMO, **picture, "s": scores}).text("s")
    assert "| CLIP-T |" in said and "The scores are not saved. nibble/scores: it cannot be written (the disk is" in said
