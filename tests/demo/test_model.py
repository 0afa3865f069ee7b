"""The shipped files: small, 16-bit, complete, licensed, and what the README says of them."""

import json
import re

import numpy as np
import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import evaluate, recognise
from comfyui_nibble.headless import pipeline
from comfyui_nibble.training import loop
from safetensors.torch import load_file

FILES = list(demo.ROOT.rglob("*.safetensors"))
FIGURES = json.loads((demo.ROOT / "training.json").read_text(encoding="utf-8"))


def test_size_and_types():
    everything = [p for p in demo.ROOT.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert sum(p.stat().st_size for p in everything) <= 36e6
    assert len(FILES) == 8, FILES
    for path in FILES:
        assert {t.dtype for t in load_file(path).values()} <= {torch.float16}, path.name


def test_widths_are_what_4_bits_need():
    unet = load_file(demo.MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    linears = [t for n, t in unet.items() if t.ndim == 2 and re.search(r"\.(attn\d|ff)\.", n)]
    assert len(linears) >= 60 and all(t.shape[1] % 64 == 0 for t in linears)
    assert 7e6 <= sum(t.numel() for t in unet.values()) <= 11e6


def test_the_recorded_figures_hold_the_line():
    found = FIGURES["evaluation"]
    assert min(found["autoencoder_psnr_db_noto"], found["autoencoder_psnr_db_twemoji"]) >= 26
    assert found["recognised_25_steps"] >= 0.95 and found["recognised_lcm_4_steps"] >= 0.85
    assert all(FIGURES[s]["seconds"] > 0 for s in ("autoencoder", "denoiser", "style", "few_steps"))


def test_the_page_prints_the_recorded_figures():
    page = (demo.ROOT / "README.md").read_text(encoding="utf-8")
    found = FIGURES["evaluation"]
    for key in (
        "recognised_25_steps",
        "recognised_lcm_4_steps",
        "recognised_held_out_captions",
        "recognised_flat_style",
    ):
        assert f"{found[key]:.1%}" in page, key
    assert f"{found['autoencoder_psnr_db_noto']} dB" in page


def test_references_recognise_themselves():
    for style in ("noto", "twemoji"):
        references = recognise.load(style)
        assert len(references.names) == evaluate.REFERENCES
        assert [references.nearest(t) for t in references.thumbnails[:20]] == list(range(20))
    assert not recognise.load().recognised(np.zeros((32, 32, 3), np.float32), "red apple")


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_few_are_drawn_and_recognised(four_bit):
    pipe, references = pipeline.load_pipeline(demo.MODEL), recognise.load()
    if four_bit:
        pipeline.quantize(pipe, 16)
    names = evaluate.NAMED[:4]
    pictures = evaluate.draw(pipe, list(names), 12, evaluate.GUIDANCE)
    assert all(references.recognised(p, n) for p, n in zip(pictures, names, strict=True))


class TestTraining:
    """The loop that made it: a run that was stopped equals one that was not."""

    PLAN = loop.Plan("toy", steps=12, batch=4, lr=1e-2, warmup=2)

    def run(self, work, stop_at=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)

        def loss(step, g):
            if step == stop_at:
                raise KeyboardInterrupt
            return layer(torch.randn(8, 4, generator=g)).square().mean()

        loop.train(self.PLAN, list(layer.parameters()), loss, work, save_every=0.0)
        return layer.weight.detach().clone()

    def test_stopped_and_resumed_is_the_same(self, tmp_path):
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        whole.mkdir(), stopped.mkdir()
        expected = self.run(whole)
        with pytest.raises(KeyboardInterrupt):
            self.run(stopped, stop_at=7)
        assert torch.equal(self.run(stopped), expected)

    def test_an_ended_run_is_not_run_again(self, tmp_path):
        assert torch.equal(self.run(tmp_path), self.run(tmp_path, stop_at=11))
