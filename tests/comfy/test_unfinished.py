"""ComfyUI is killed half way, started again, and the same workflow queued: what was done is not done again, and the
result is that of an undisturbed run, byte for byte.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from comfyui_nibble import demo
from comfyui_nibble.writing import kept, unfinished

from .conftest import start
from .test_calibrate import calibrated

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def servers(tmp_path):
    """servers() -> a ComfyUI on one and the same base, started again each time."""
    running = []

    def begin():
        running.append(start(tmp_path))
        return running[-1]

    yield begin
    for server in running:
        server.process.kill()
        server.process.wait()


def killed(server, graph: dict, enough) -> Path:
    """Queues ``graph`` and kills the server as soon as ``enough(folder)``; the folder of the unfinished run."""
    server.queue(graph)
    root, end = server.base / "output" / unfinished.FOLDER, time.monotonic() + 120
    while time.monotonic() < end:
        folders = [p for p in root.iterdir() if p.is_dir()] if root.exists() else []
        if len(folders) == 1 and enough(folders[0]):
            server.process.kill()
            server.process.wait()
            return folders[0]
        time.sleep(0.002)
    raise AssertionError(f"it did not get half way:\n{server.tail()}")


def layers(folder: Path) -> int:
    return sum(len(p.stem) == 24 and p.suffix == ".safetensors" for p in folder.iterdir())


def updates(folder: Path) -> int:
    try:
        return len(kept.load(folder / "lora.state.safetensors")[0]["losses"])
    except kept.Damaged:  # not there yet
        return 0


def undisturbed(server, graph: dict, name: str) -> bytes:
    """The file ``name`` again, made from nothing under the same name."""
    (server.base / "output" / name).unlink()
    server.post("/free", {"free_memory": True, "unload_models": True})
    time.sleep(3)  # it is done beside the queue
    result = server.done(graph)
    assert "Went on with" not in result.text("report") and result.text("file") == name
    return (server.base / "output" / name).read_bytes()


@pytest.mark.parametrize("budget", [0, 4])
def test_calibrate(servers, tiny, budget):
    server = servers()
    target = server.models("diffusion_models") / "sd3.safetensors"
    if not target.exists():
        target.symlink_to(tiny("sd3"))
    graph = calibrated("sd3", "sd3.safetensors", preset="fast", budget_mib=budget, noise_levels=4)
    graph["file"] = {
        "class_type": "NibbleSaveModel",
        "inputs": dict(model=["model", 0], filename_prefix=f"diffusion_models/killed{budget}"),
    }
    folder = killed(server, graph, lambda folder: layers(folder) >= 3)
    done = layers(folder)
    server = servers()
    assert folder.is_dir() and not list(server.base.rglob("*.part"))
    result = server.done(graph)
    went_on = (
        f"Went on with a run that was stopped: {done} layers were solved already, and its prompts were not sampled"
    )
    assert went_on in result.text("report") and not folder.parent.exists()
    name = result.text("file")
    written = (server.base / "output" / name).read_bytes()
    assert written == undisturbed(server, graph, name)


def test_train_lora(servers):
    server = servers()
    pictures = server.base / "input" / "mine"
    pictures.mkdir(parents=True)
    lines = (demo.PICTURES / "captions.jsonl").read_text().splitlines()[:4]
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    for line in lines:
        shutil.copy(demo.PICTURES / json.loads(line)["file_name"], pictures)
    server.process.kill()
    server = servers()  # which lists the new folder
    whole = json.loads((ROOT / "workflows" / "api" / "train-lora.json").read_text())
    graph = {id: whole[id] for id in ("1", "2")}
    graph["2"]["inputs"] |= dict(folder="mine", steps=14, batch=2, name="loras/killed")
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}}
    graph["file"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}
    folder = killed(server, graph, lambda folder: updates(folder) >= 4)
    done = updates(folder)
    server = servers()
    result = server.done(graph)
    assert f"Went on with a run that was stopped: {done} of 14 updates were done already" in result.text("report")
    assert 6 <= done < 60 and not folder.parent.exists()
    name = result.text("file")
    written = (server.base / "output" / name).read_bytes()
    assert written == undisturbed(server, graph, name)


def test_killed_in_a_save(servers):
    """What a dead process left half written under output/ goes when ComfyUI starts."""
    server = servers()
    server.process.kill()
    server.process.wait()
    left = [server.base / "output" / folder / f".big.{server.process.pid}-0.part" for folder in ("", "loras", "a/b")]
    for part in left:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"x" * 1000)
    server, end = servers(), time.monotonic() + 20
    while any(p.exists() for p in left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(p.exists() for p in left)
    assert "Nibble removed 1 files" in server.log.read_text()
