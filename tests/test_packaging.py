"""The pack can be found, imported and installed by everyone who has to: ComfyUI, pip, pytest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from project_files import project_files

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMFYUI = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server", "nodes")
CORE = ("checkpoints.convert", "checkpoints.inspect", "demo.recognise", "headless.cli", "headless.showcase",
        "lora.apply", "metrics.images", "profiling.chart", "prompts.expand", "quant.modules")  # fmt: skip


def python(code: str, cwd: Path) -> dict:
    """Runs ``code`` in a fresh interpreter; it prints one JSON object."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def folders() -> set[str]:
    """Every package folder of the repository, as dotted names below the root package."""
    out = {""}
    for path in project_files():
        if path.name == "__init__.py" and path.parent.parts and path.parts[0] != "tests":
            out.add("." + ".".join(path.parent.parts))
    return out


def test_packages_are_the_folders_on_disk():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == listed
    assert set(listed) == {"comfyui_nibble" + f for f in folders()}


def test_loads_as_comfyui_loads_it_and_brings_no_torch(tmp_path):
    """ComfyUI imports the folder by path, under the path as name; here a folder with a dot and a hyphen in it."""
    home = tmp_path / "my-pack.v1"
    home.symlink_to(ROOT, target_is_directory=True)
    code = f"""
import importlib.util, inspect, json, sys
name = {str(home)!r}.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, {str(home / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
print(json.dumps(dict(entry=inspect.iscoroutinefunction(module.comfy_entrypoint), web=module.WEB_DIRECTORY,
    v1=hasattr(module, "NODE_CLASS_MAPPINGS"), torch="torch" in sys.modules)))
"""
    found = python(code, tmp_path)
    assert found == {"entry": True, "web": "./web", "v1": False, "torch": False}


def test_core_needs_no_comfyui(tmp_path):
    """Every part of the core imports where each of ComfyUI's modules raises."""
    code = f"""
import importlib, json, sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {COMFYUI!r}:
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Forbidden())
for name in {CORE!r}:
    importlib.import_module("comfyui_nibble." + name)
print(json.dumps(sorted(m for m in sys.modules if m.startswith("comfyui_nibble."))))
"""
    assert len(python(code, tmp_path)) > len(CORE)


def test_cold_start_of_the_command_line_is_light(tmp_path):
    """``nibble --help`` must not pay for torch."""
    code = """
import json, sys
from comfyui_nibble.headless.cli import parser
parser()
print(json.dumps("torch" in sys.modules))
"""
    assert python(code, tmp_path) is False


def test_requirements_never_break_an_environment():
    """ComfyUI-Manager installs requirements.txt line by line into the user's ComfyUI."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    for line in filter(None, wanted):
        name = line.split(">=")[0].strip()
        assert name not in ("torch", "nunchaku", "numpy", "comfy-kitchen"), line
        assert "==" not in line and "<" not in line, line
    for line in PROJECT["project"]["dependencies"]:
        assert ">=" in line and "==" not in line and not line.startswith("nunchaku"), line


def test_ci_also_runs_on_the_newest_of_what_moves():
    """One job is bound to a torch, one takes what pip offers that day; both run every test, oracles among them."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    commands = {name: [s["run"].strip() for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    (pinned,) = [word for run in commands["core"] for word in run.split() if word.startswith("torch==")]
    assert f"pip install -q {pinned}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    upgraded = {word for run in commands["newest"] if "--upgrade " in run for word in run.split()}
    assert {"torch", "comfy-kitchen", "diffusers", "transformers", '".[test]"'} <= upgraded
    assert not [run for run in commands["newest"] if "==" in run or "<" in run]
    for name in ("core", "newest"):
        assert "pytest" in commands[name] and "pip install --no-deps lpips" in commands[name]
    assert any(line.startswith("torchmetrics>=") for line in PROJECT["project"]["optional-dependencies"]["test"])


@pytest.mark.parametrize("key", ["PublisherId", "DisplayName", "requires-comfyui"])
def test_registry_fields(key):
    assert PROJECT["tool"]["comfy"][key]
    assert "comfyui" not in PROJECT["project"]["name"].lower()
    assert PROJECT["project"]["license"] == {"file": "LICENSE"}
