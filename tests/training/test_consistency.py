"""Latent consistency: exact answers on a Gaussian, the losses fall on toys, steps land on LCM's grid."""

from dataclasses import replace

import pytest
import torch
from comfyui_nibble.training import consistency as c
from comfyui_nibble.training import loop, paths
from toys import MEAN, Gaussian, flow_path, tunable, vp_path

PATHS = {"vp": vp_path(), "flow": flow_path()}


def exact(toy: Gaussian):
    """The model whose f is the ODE's end, whatever the boundary functions are."""

    def student(z, t, cond):
        skip, out = c.boundary(t, z)
        return torch.where(out > 0, (toy.end(z, t) - skip * z) / out.clamp(min=1e-12), z)

    return student


def loss(student, toy: Gaussian, skip: int, omega=(0.0, 0.0)) -> float:
    settings = c.Consistency(skip=skip, omega=omega)
    x = toy.sample(64)
    batch = c.Batch(x, [None] * 64, [None] * 64)
    drawn = c.draw(x, toy.path, settings, torch.Generator().manual_seed(1))
    # Not the last step, into t = 0: there f is z by definition, and the table's first noise level is not 0.
    drawn = replace(drawn, t=drawn.t.clamp(min=2 * skip - 1))
    with torch.no_grad():
        return float(c.lcd(c.Student(student, student), toy.denoise, batch, drawn, toy.path, settings))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_exact_student_has_no_loss(path):
    """A point as data: one DDIM step is exact at every length, so the loss is zero, guidance or not."""
    toy = Gaussian(path, spread=0.0)
    assert loss(exact(toy), toy, 20, (2.0, 14.0)) < 1e-9
    assert loss(lambda z, t, cond: toy.denoise(z, t, cond) + 0.1, toy, 20) < loss(lambda z, t, cond: z, toy, 20)


def test_the_exact_students_loss_vanishes_with_the_step():
    """A Gaussian: what is left is DDIM's error, quadratic in the step; a model without distillation stays far off."""
    toy = Gaussian(PATHS["vp"])
    exact_losses = {skip: loss(exact(toy), toy, skip) for skip in (1, 5, 20)}
    assert exact_losses[1] < 0.05 * exact_losses[5] < 0.05 * exact_losses[20]
    for skip, value in exact_losses.items():
        assert value < 0.03 * loss(toy.denoise, toy, skip), (skip, value)


def written_out(path, x, n, t, skip) -> dict:
    """The numbers of one LCD or LCF step of single values x and n: z at t and at the step before, c_skip, c_out."""
    alpha, sigma = path.alpha.double(), path.sigma.double()
    earlier = max(0, t - skip)
    rows = {}
    for name, at in (("z", t), ("before", earlier)):
        s = 10.0 * at
        rows[name] = dict(at=at, z=float(alpha[at] * x + sigma[at] * n), alpha=float(alpha[at]), sigma=float(sigma[at]),
                          skip=0.25 / (s * s + 0.25), out=s / (s * s + 0.25) ** 0.5)  # fmt: skip
    return rows


def one(x, n, t, omega):
    """A batch of one single value with the words "cat" and "", and its draw."""
    at = lambda v: torch.tensor([[[[v]]]])  # noqa: E731
    return c.Batch(at(x), ["cat"], [""]), c.Draw(torch.tensor([t]), at(n), torch.tensor([omega]))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("t, omega", [(999, 2.0), (499, 7.5), (59, 13.0), (19, 2.5)])
def test_lcd_is_its_formula(path, t, omega):
    """Written out for a teacher that answers .3 for the prompt and -.2 for none, and affine students: the guided
    answer is x0 = -.2 + (1 + omega) (.3 + .2), z' one DDIM step along it, and the loss pseudo-Huber of f - f-.
    """
    settings, x, n = c.Consistency(skip=20, huber=0.7), 0.4, -1.3
    teacher = lambda z, t, cond: torch.full_like(z, 0.3 if cond == ["cat"] else -0.2)  # noqa: E731
    student = c.Student(lambda z, t, cond: 0.5 * z + 0.1, lambda z, t, cond: 0.4 * z - 0.3)
    batch, drawn = one(x, n, t, omega)
    rows = written_out(path, x, n, t, 20)
    z, before = rows["z"], rows["before"]
    x0 = -0.2 + (1 + omega) * (0.3 + 0.2)
    moved = before["alpha"] * x0 + before["sigma"] * (z["z"] - z["alpha"] * x0) / z["sigma"]
    target = before["skip"] * moved + before["out"] * (0.4 * moved - 0.3)
    answer = z["skip"] * z["z"] + z["out"] * (0.5 * z["z"] + 0.1)
    expected = ((answer - target) ** 2 + 0.7**2) ** 0.5 - 0.7
    got = float(c.lcd(student, teacher, batch, drawn, path, settings))
    assert got == pytest.approx(expected, rel=2e-4, abs=1e-6) and expected > 1e-3


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("skip, t", [(20, 999), (20, 499), (50, 99), (20, 19)])
def test_lcf_is_its_formula(path, skip, t):
    """One picture, one noise, at t and one skip before."""
    settings, x, n = c.Consistency(skip=skip, huber=0.7), 0.4, -1.3
    student = c.Student(lambda z, t, cond: 0.5 * z + 0.1, lambda z, t, cond: 0.4 * z - 0.3)
    rows = written_out(path, x, n, t, skip)
    z, before = rows["z"], rows["before"]
    target = before["skip"] * before["z"] + before["out"] * (0.4 * before["z"] - 0.3)
    answer = z["skip"] * z["z"] + z["out"] * (0.5 * z["z"] + 0.1)
    expected = ((answer - target) ** 2 + 0.7**2) ** 0.5 - 0.7
    batch, drawn = one(x, n, t, 0.0)
    assert float(c.lcf(student, batch, drawn, path, settings)) == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_boundary_by_hand():
    """t = 0 hands z through; t = 1: s = 10, c_skip = .25 / 100.25, c_out = 10 / sqrt(100.25)."""
    skip, out = c.boundary(torch.tensor([0, 1]), torch.zeros(2, 1))
    assert skip.flatten().tolist() == pytest.approx([1.0, 0.25 / 100.25])
    assert out.flatten().tolist() == pytest.approx([0.0, 10 / 100.25**0.5])


def lcf(model, *rest) -> torch.Tensor:
    return c.lcf(c.Student(model, model), *rest)


def test_lcf_asks_for_one_answer_along_a_pictures_noise():
    """f that always answers the picture has no loss; one that hands z through has."""
    path, x = PATHS["vp"], Gaussian(PATHS["vp"]).sample(8)
    batch, settings = c.Batch(x, [None] * 8), c.Consistency()
    drawn = c.draw(x, path, settings, torch.Generator().manual_seed(0))
    constant = lcf(lambda z, t, cond: (x - c.boundary(t, z)[0] * z) / c.boundary(t, z)[1].clamp(min=1e-12), batch,
                     drawn, path, settings)  # fmt: skip
    at_start = drawn.t == settings.skip - 1  # its other side is t = 0, where f is z itself
    assert float(constant) < 0.01 or bool(at_start.any())
    assert float(lcf(lambda z, t, cond: z, batch, drawn, path, settings)) > 0.01


def test_training_lowers_the_few_step_error():
    """A scale and a shift beside the Gaussian's denoiser learn its consistency function."""
    toy = Gaussian(PATHS["vp"])
    knobs, student = tunable(toy)

    def error() -> float:
        g = torch.Generator().manual_seed(3)
        noise = torch.randn(256, 1, 4, 4, generator=g)
        with torch.no_grad():
            got = c.sample(student, toy.path, noise, [None] * 256, paths.times(1000, 5, 10), g)
        return abs(float(got.mean()) - MEAN) + abs(float(got.std()) - toy.spread)

    before = error()
    source = lambda _step, g: c.Batch(MEAN + toy.spread * torch.randn(32, 1, 4, 4, generator=g), [None] * 32)  # noqa: E731
    plan = loop.Plan("toy", 600, 32, 1e-2, warmup=10, weight_decay=0.0, ema=0.9)
    settings = c.Consistency(skip=100, omega=(0.0, 0.0))
    both = c.Student(student, student)
    distance = lambda b, d: c.lcd(both, toy.denoise, b, d, toy.path, settings)  # noqa: E731
    result = loop.train(plan, [knobs], c.objective(distance, source, toy.path, settings))
    assert len(result.losses) == 600
    assert error() < 0.6 * before, (before, error())


def test_fine_tuning_learns_pictures_that_the_base_does_not_know():
    """One picture, all 2: the base answers around 0.7. Loss and the distance of few-step samples both fall."""
    toy, picture = Gaussian(PATHS["vp"]), torch.full((32, 1, 4, 4), 2.0)
    knobs = torch.nn.Parameter(torch.zeros(2, 1000))

    def student(z, t, cond):
        scale, move = knobs[:, t].view(2, -1, 1, 1, 1)
        return toy.denoise(z, t, cond) * (1 + scale) + move

    def far() -> float:
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            got = c.sample(student, toy.path, torch.randn(64, 1, 4, 4, generator=g), [None] * 64,
                           paths.times(1000, 2, 10), g)  # fmt: skip
        return float((got - 2).square().mean())

    before, settings = far(), c.Consistency(skip=100)
    distance = lambda b, d: c.lcf(c.Student(student, student), b, d, toy.path, settings)  # noqa: E731
    loss = c.objective(distance, lambda _s, _g: c.Batch(picture, [None] * 32), toy.path, settings)
    result = loop.train(loop.Plan("lcf", 600, 32, 1e-2, warmup=10, weight_decay=0.0, ema=0.9), [knobs], loss)
    assert sum(result.losses[-30:]) < 0.5 * sum(result.losses[:30])
    assert far() < 0.3 * before


def test_times_are_diffusers_lcm_steps():
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    for steps in (1, 2, 3, 4, 6, 8, 50):
        scheduler.set_timesteps(steps)
        assert paths.times(1000, steps, 50) == scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match="do not fit"):
        paths.times(1000, 51, 50)


@pytest.mark.parametrize("change", [dict(skip=0), dict(huber=0.0), dict(omega=(3.0, 2.0)), dict(omega=(-1.0, 2.0))])
def test_refuses(change):
    with pytest.raises(ValueError, match="Consistency needs"):
        c.Consistency(**change)
