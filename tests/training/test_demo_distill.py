"""Few steps on the demo model's 4-bit base, small: phased comes closer to the 16-bit teacher, lcf learns pictures."""

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import recognise
from comfyui_nibble.headless import base, pipeline
from comfyui_nibble.training import consistency, distill, job, paths, recipes
from comfyui_nibble.training.loop import Plan, Watch

SHAPE, NAMES = (4, 16, 16), ("red apple", "rocket")


@pytest.fixture(scope="module")
def both():
    """(4-bit pipeline, 16-bit teacher)."""
    found = [pipeline.load_pipeline(demo.MODEL) for _ in range(2)]
    pipeline.quantize(found[0], 16)
    for one in found:
        one.unet.requires_grad_(False)
    return found


def run(both, way: str, plan: Plan, work, pictures=None) -> distill.Outcome:
    pipe, other = both
    student = base.base_of(pipe)
    loras = job.adapters_of(student, 16, 0)
    model, path = paths.view(student.denoiser)
    teacher, _ = paths.view(base.base_of(other).denoiser)
    cond = [base.encode(pipe, name, torch.zeros(SHAPE)) for name in NAMES]
    empty = base.encode(pipe, "", torch.zeros(SHAPE))
    task = distill.Task(model, teacher, loras.parameters(), path, cond, empty, SHAPE, pictures)
    guided = consistency.Consistency(omega=(2.0, 2.0))
    with loras.attached():
        settings = distill.Settings(recipes.Distill(way, pairs=4, teacher_steps=20), plan, consistency=guided)
        return distill.train_task(task, settings, work, Watch())


def test_phased_comes_closer_to_the_teacher(both, tmp_path):
    plan = Plan("phased", 25, 2, 2e-3, warmup=5, weight_decay=0.0, ema=0.8)
    out = run(both, "phased", plan, tmp_path)
    print(f"4 Euler steps to the teacher's 20, new noise: {out.before:.4f} -> {out.after:.4f}")
    assert out.after < 0.8 * out.before


def test_lcf_learns_pictures_that_the_base_does_not_know(both, tmp_path):
    index = [recognise.load("twemoji").names.index(n) for n in recognise.load("twemoji").names if n[0] in NAMES]
    small = torch.as_tensor(recognise.load("twemoji").thumbnails[index]).permute(0, 3, 1, 2).float() * 2 - 1
    shown = torch.nn.functional.interpolate(small, (128, 128), mode="bilinear")
    pictures = torch.stack([base.latent_of(both[0], p) for p in shown])
    plan = Plan("lcf", 60, 2, 3e-3, warmup=5, weight_decay=0.0, ema=0.8)
    out = run(both, "lcf", plan, tmp_path, pictures)
    print(f"loss on fixed noise at every time: {out.before:.4f} -> {out.after:.4f}")
    assert out.after < 0.8 * out.before
