"""A real ComfyUI for the tests of this folder: one server for the whole suite, and scripts inside its own Python.

Found by COMFYUI_PATH, else ~/comfy/ComfyUI, else the folder above custom_nodes. Without it every test here is skipped.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACK = "ComfyUI-Nibble"
GET_IT = (
    "needs a real ComfyUI 0.33 or newer: git clone https://github.com/Comfy-Org/ComfyUI ~/comfy/ComfyUI, install its "
    "requirements.txt into ~/comfy/ComfyUI/.venv, or set COMFYUI_PATH"
)
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def find_comfyui() -> Path | None:
    above = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    named = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    for folder in [*named, Path.home() / "comfy" / "ComfyUI", *above]:
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder
    return None


def python_of(comfyui: Path) -> str:
    for name in (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe"):
        if (comfyui / name).exists():
            return str(comfyui / name)
    return sys.executable


COMFYUI = find_comfyui()


def pytest_collection_modifyitems(items):
    if COMFYUI is None:
        for item in items:
            if HERE in Path(item.path).parents:
                item.add_marker(pytest.mark.skip(reason=GET_IT))


@dataclass
class Result:
    """What became of one posted workflow."""

    status: str
    messages: list
    outputs: dict

    @property
    def error(self) -> str:
        """The exception's text, where the run failed."""
        for kind, data in self.messages:
            if kind == "execution_error":
                return data["exception_message"]
        return ""

    def text(self, node: str) -> str:
        return self.outputs[node]["text"][0]

    @property
    def moments(self) -> tuple[float, float]:
        """When it started and ended, in seconds of time.time(), as ComfyUI's history has them."""
        times = [data["timestamp"] / 1000 for kind, data in self.messages if kind.startswith("execution_")]
        return min(times), max(times)

    @property
    def wall(self) -> float:
        """Seconds from start to end."""
        start, end = self.moments
        return end - start


@dataclass
class Server:
    """A running ComfyUI; ``base`` is its base directory (models, output, custom_nodes)."""

    base: Path
    port: int
    process: subprocess.Popen
    log: Path
    client: str = field(default_factory=lambda: str(uuid.uuid4()))

    def get(self, path: str, raw: bool = False):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
            body = reply.read()
        return body if raw else json.loads(body)

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                body = reply.read()
        except urllib.error.HTTPError as e:
            return {"http": e.code, **json.loads(e.read() or b"{}")}
        return json.loads(body) if body else {}

    def queue(self, workflow: dict) -> str:
        """Queues an API-format workflow. Fails the test when ComfyUI refuses it."""
        reply = self.post("/prompt", {"prompt": workflow, "client_id": self.client})
        assert "prompt_id" in reply, reply
        return reply["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 600) -> Result:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                entry = history[prompt_id]
                status = entry["status"]
                return Result(status["status_str"], status["messages"], entry["outputs"])
            assert self.process.poll() is None, f"the server died:\n{self.tail()}"
            time.sleep(0.1)
        raise AssertionError(f"workflow {prompt_id} did not end in {seconds} s:\n{self.tail()}")

    def run(self, workflow: dict) -> Result:
        """Runs a workflow to its end, whatever that is."""
        return self.wait(self.queue(workflow))

    def done(self, workflow: dict) -> Result:
        """Runs a workflow that must succeed."""
        result = self.run(workflow)
        assert result.status == "success", f"{result.error}\n{self.tail()}"
        return result

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def image(self, result: Result, node: str, index: int = 0):
        """An output image as (H, W, 3) float in [0, 1]."""
        import numpy as np
        from PIL import Image

        entry = result.outputs[node]["images"][index]
        path = self.base / entry["type"] / entry["subfolder"] / entry["filename"]
        return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255

    def latent(self, result: Result, node: str):
        """What a stock SaveLatent node wrote."""
        from safetensors.torch import load_file

        entry = result.outputs[node]["latents"][0]
        return load_file(self.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]

    def models(self, folder: str) -> Path:
        path = self.base / "models" / folder
        path.mkdir(parents=True, exist_ok=True)
        return path


def free_port() -> int:
    with closing(socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(base: Path, *flags: str) -> Server:
    """Starts ComfyUI on ``base`` with this pack and the test kit; waits until it answers."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    for name, target in ((PACK, ROOT), ("nibble_testkit", HERE / "testkit")):
        if not (nodes / name).exists():
            (nodes / name).symlink_to(target, target_is_directory=True)
    port, log = free_port(), base / "server.log"
    command = [
        python_of(COMFYUI), str(COMFYUI / "main.py"), "--cpu", "--port", str(port), "--base-directory", str(base),
        "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes",
        "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, "nibble_testkit", *flags,
    ]  # fmt: skip
    with log.open("w") as f:
        process = subprocess.Popen(command, cwd=base, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **QUIET})
    server = Server(base, port, process, log)
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, f"ComfyUI did not start:\n{server.tail()}"
        try:
            server.get("/system_stats")
            return server
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"ComfyUI did not answer in 180 s:\n{server.tail()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The suite's one ComfyUI."""
    running = start(tmp_path_factory.mktemp("comfy"))
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """A ComfyUI for one module alone, which may delete its folders."""
    running = start(tmp_path_factory.mktemp("own"))
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="session")
def inside(tmp_path_factory):
    """inside(script, *args): runs tests/comfy/inside/<script>.py in ComfyUI's Python; returns the JSON it prints.
    ``pack``: the root of another copy of the pack.
    """

    def run(script: str, *args, pack: Path = ROOT) -> dict:
        cwd = tmp_path_factory.mktemp("in")
        command = [python_of(COMFYUI), str(HERE / "inside" / f"{script}.py"), str(COMFYUI), str(pack), *map(str, args)]
        env = {**os.environ, **QUIET}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=cwd)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name): a float model file that ComfyUI recognises: sd15, sdxl, flux or sd3."""
    folder = tmp_path_factory.mktemp("tiny")

    def get(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            command = [python_of(COMFYUI), str(HERE / "tiny_models.py"), str(COMFYUI), str(folder), name]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, **QUIET}, timeout=300)
        return path

    return get


@pytest.fixture(scope="session")
def tiny_4bit(tiny, tmp_path_factory):
    """tiny_4bit(name): the same model as ``nibble quantize`` writes it, rank 16."""
    from comfyui_nibble.headless.cli import main

    folder = tmp_path_factory.mktemp("tiny4")

    def get(name: str) -> Path:
        path = folder / f"{name}-4bit.safetensors"
        if not path.exists():
            assert main(["quantize", str(tiny(name)), "--out", str(path), "--rank", "16"]) == 0
        return path

    return get
