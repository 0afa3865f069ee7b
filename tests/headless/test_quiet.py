"""What libraries say does not reach the terminal: a command in a process of its own, as people start it."""

import os
import re
import subprocess
import sys

import pytest

OURS = re.compile(r"(loading|steps): +\d+%\|.*|nibble: preset lcm_lora_sd15, chosen by --lcm: .*")
LOUD = ("VERBOSITY", "PROGRESS", "WARNINGS", "ADVISORY", "TORCH_CPP")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """stderr of a run that loads a text encoder, a UNet and a VAE."""
    env = {k: v for k, v in os.environ.items() if not any(word in k for word in LOUD)}
    command = [sys.executable, "-m", "comfyui_nibble.headless.cli", "generate", "red apple", "--lcm", "--steps", "1"]
    command += ["--precision", "16-bit", "--out", str(tmp_path_factory.mktemp("quiet"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1 and done.stdout.strip().endswith(".png")
    return done.stderr


def test_there_is_one_bar_and_what_we_say(said):
    lines = [line.strip() for line in re.split(r"[\r\n]", said) if line.strip()]
    strangers = [line for line in lines if not OURS.fullmatch(line)]
    assert lines and not strangers, strangers


@pytest.mark.parametrize("word", ["torch_dtype", "torchvision", "Loading weights", "Loading pipeline", "Warning"])
def test_known_noise(word, said):
    assert word not in said
