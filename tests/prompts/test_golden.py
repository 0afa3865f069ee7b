"""Every shipped domain gives the prompts of tests/data/prompts_golden.json, on any machine and Python version."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import comfyui_nibble
import pytest
import yaml
from comfyui_nibble.prompts import domain

sys.path.insert(0, str(Path(__file__).parent))
import golden

PYTHONS = [f"python3.{minor}" for minor in range(10, 16)]


@pytest.mark.parametrize("id", domain.shipped())
def test_same_prompts_everywhere(id):
    expected = golden.read()
    assert id in expected, "run python tests/prompts/golden.py"
    assert golden.entry(id) == expected[id]


def test_no_released_domain_is_gone():
    assert set(golden.read()) == set(domain.shipped())


def find(name: str) -> str | None:
    """An interpreter that starts: on the path, or one of pyenv's, whose shims start only where they are chosen."""
    there = [shutil.which(name), *map(str, Path.home().glob(f".pyenv/versions/*/bin/{name}"))]
    return next((p for p in there if p and subprocess.run([p, "-c", ""], capture_output=True).returncode == 0), None)


@pytest.mark.parametrize("name", PYTHONS)
def test_same_prompts_in_other_pythons(name, tmp_path):
    """With nothing but PyYAML's Python files beside the pack, and another hash seed."""
    python = find(name)
    if python is None:
        pytest.skip(f"{name} is not installed here")
    (tmp_path / "comfyui_nibble").symlink_to(Path(comfyui_nibble.__file__).parent, target_is_directory=True)
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent, target_is_directory=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-S", golden.__file__, "--print"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == golden.read()
