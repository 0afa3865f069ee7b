"""Consistency in phases: each phase ends on the teacher's trajectory, so few deterministic steps follow it."""

import pytest
import torch
from comfyui_nibble.training import consistency as c
from comfyui_nibble.training import loop, paths, phased
from toys import MEAN, Gaussian, flow_path, tunable, vp_path

PATHS = {"vp": vp_path(), "flow": flow_path()}


def along(toy: Gaussian, count: int):
    """The student whose every phase ends where the probability-flow ODE goes through its edge."""

    def student(z, t, cond):
        e = phased.edge(toy.path, t, count)
        alpha, sigma = toy.path.at(t, z)
        here = ((alpha * toy.spread) ** 2 + sigma**2).sqrt()
        to_alpha, to_sigma = toy.path.at(e.clamp(min=0), z)
        clean = (e == phased.CLEAN).view(-1, 1, 1, 1)
        to_alpha, to_sigma = torch.where(clean, 1.0, to_alpha), torch.where(clean, 0.0, to_sigma)
        there = ((to_alpha * toy.spread) ** 2 + to_sigma**2).sqrt()
        end = to_alpha * MEAN + there * (z - alpha * MEAN) / here
        return (end - to_sigma / sigma * z) / (to_alpha - to_sigma / sigma * alpha)  # whose step lands on ``end``

    return student


def loss(student, toy: Gaussian, settings: phased.Phases) -> float:
    x = toy.sample(64)
    drawn = c.draw(x, toy.path, settings, torch.Generator().manual_seed(1))
    both = c.Student(student, student)
    with torch.no_grad():
        return float(phased.distance(both, toy.denoise, c.Batch(x, [None] * 64), drawn, toy.path, settings))


def test_edges_by_hand():
    t = torch.tensor([999, 750, 749, 500, 499, 250, 249, 0])
    assert phased.edge(PATHS["vp"], t, 4).tolist() == [749, 749, 499, 499, 249, 249, phased.CLEAN, phased.CLEAN]
    assert phased.edge(PATHS["vp"], t, 1).tolist() == [phased.CLEAN] * 8


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("count", [1, 4])
def test_the_exact_student_has_no_loss(path, count):
    """A point as data, where one DDIM step is exact; and a Gaussian, where what is left is that step's error."""
    settings, short = (phased.Phases(skip=skip, omega=(0.0, 0.0), count=count) for skip in (20, 5))
    point = Gaussian(path, spread=0.0)
    assert loss(point.denoise, point, settings) < 1e-8
    assert loss(lambda z, t, cond: point.denoise(z, t, cond) + 0.1, point, settings) > 1e-6
    toy = Gaussian(path)
    exact, plain = (loss(s, toy, short) for s in (along(toy, count), toy.denoise))
    assert exact < 0.01 * plain, (exact, plain)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_exact_students_steps_are_the_whole_trajectory(path):
    """Four steps from the teacher's noise end where its trajectory ends; a consistency model's do not."""
    toy = Gaussian(path)
    noise = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    start = torch.full((16,), len(path) - 1)
    truth = toy.end(path.start(noise, len(path) - 1), start)
    stops = paths.even(len(path), 4)
    got = paths.follow(lambda z, t: along(toy, 4)(z, t, None), path, noise, stops)[1][-1]
    plain = paths.follow(lambda z, t: toy.denoise(z, t, None), path, noise, stops)[1][-1]
    assert (got - truth).square().mean() < 1e-6 < 0.01 * (plain - truth).square().mean()


def test_training_follows_the_trajectory():
    """A scale and a shift by time beside the Gaussian's denoiser learn to do in 2 steps what many do."""
    toy = Gaussian(PATHS["vp"])
    knobs, student = tunable(toy)

    noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    truth = toy.end(toy.path.start(noise, 999), torch.full((64,), 999))

    def error() -> float:
        answer = lambda z, t: student(z, t, None)  # noqa: E731
        got = paths.follow(answer, toy.path, noise, paths.even(1000, 2))[1][-1]
        return float((got - truth).square().mean())

    before, settings = error(), phased.Phases(skip=100, omega=(0.0, 0.0), count=2)
    source = lambda _step, g: c.Batch(MEAN + toy.spread * torch.randn(32, 1, 4, 4, generator=g), [None] * 32)  # noqa: E731
    plan = loop.Plan("toy", 600, 32, 3e-2, warmup=10, weight_decay=0.0, ema=0.9)
    both = c.Student(student, student)
    distance = lambda b, d: phased.distance(both, toy.denoise, b, d, toy.path, settings)  # noqa: E731
    loop.train(plan, [knobs], c.objective(distance, source, toy.path, settings))
    assert error() < 0.7 * before, (before, error())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("t, omega", [(999, 2.0), (519, 7.5), (759, 4.0)])
def test_the_loss_is_its_formula(path, t, omega):
    """Written out for a teacher that answers .3 for the prompt and -.2 for none, as for latent consistency."""
    settings, x, n = phased.Phases(skip=20, count=4), 0.4, -1.3
    alpha, sigma = path.alpha.double().tolist(), path.sigma.double().tolist()
    e = max(edge for edge in (749, 499, 249) if edge < t)
    step = lambda z, x0, a, b: alpha[b] * x0 + sigma[b] * (z - alpha[a] * x0) / sigma[a]  # noqa: E731
    z, earlier = alpha[t] * x + sigma[t] * n, max(t - 20, e)
    moved = step(z, -0.2 + (1 + omega) * 0.5, t, earlier)
    target = moved if earlier == e else step(moved, 0.4 * moved - 0.3, earlier, e)
    expected = (step(z, 0.5 * z + 0.1, t, e) - target) ** 2
    at = lambda v: torch.tensor([[[[v]]]])  # noqa: E731
    student = c.Student(lambda z, t, cond: 0.5 * z + 0.1, lambda z, t, cond: 0.4 * z - 0.3)
    teacher = lambda z, t, cond: torch.full_like(z, 0.3 if cond == ["cat"] else -0.2)  # noqa: E731
    batch, drawn = c.Batch(at(x), ["cat"], [""]), c.Draw(torch.tensor([t]), at(n), torch.tensor([omega]))
    assert float(phased.distance(student, teacher, batch, drawn, path, settings)) == pytest.approx(expected, rel=1e-3)


def test_refuses():
    with pytest.raises(ValueError, match="at least one phase"):
        phased.Phases(count=0)
    with pytest.raises(ValueError, match="Consistency needs"):
        phased.Phases(skip=0)
