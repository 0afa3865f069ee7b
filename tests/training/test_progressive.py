"""Progressive distillation: the target is what two steps reach, halving is checked, old students can be asked."""

import pytest
import torch
from comfyui_nibble.training import paths, progressive
from toys import Gaussian, flow_path, vp_path


@pytest.mark.parametrize("path", [vp_path(), flow_path()], ids=["vp", "flow"])
@pytest.mark.parametrize("last", [False, True])
def test_one_step_to_the_target_lands_where_two_steps_do(path, last):
    toy, steps = Gaussian(path), 4
    stops = [*paths.even(1000, 2 * steps), None]
    i = 2 * steps - 2 if last else 2
    t, middle, end = (None if s is None else torch.full((3,), s) for s in stops[i : i + 3])
    z = path.noised(toy.sample(3), toy.sample(3, seed=1), t)
    answer = lambda z, t: toy.denoise(z, t, None)  # noqa: E731
    first = path.step(z, answer(z, t), t, middle)
    twice = answer(first, middle) if end is None else path.step(first, answer(first, middle), middle, end)
    x = progressive.target(answer, path, z, (t, middle, end))
    once = x if end is None else path.step(z, x, t, end)
    assert torch.allclose(once, twice, atol=1e-5)
    assert float(progressive.loss(lambda *_: x, answer, path, z, (t, middle, end))) == 0.0


def test_the_exact_student_has_no_loss():
    """A point as data: two steps and one are the same."""
    toy = Gaussian(vp_path(), spread=0.0)
    at = progressive.interval(toy.path, 2, torch.Generator().manual_seed(0), 4)
    z = toy.path.noised(toy.sample(4), torch.randn(4, 1, 4, 4), at[0])
    answer = lambda z, t: toy.denoise(z, t, None)  # noqa: E731
    assert float(progressive.loss(answer, answer, toy.path, z, at)) < 1e-8
    assert float(progressive.loss(lambda z, t: answer(z, t) + 0.1, answer, toy.path, z, at)) > 1e-3


def test_intervals_cover_the_way_and_nothing_else():
    g, seen = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        at = progressive.interval(vp_path(), 2, g, 1)
        seen.add(tuple(None if t is None else int(t) for t in at))
    assert seen == {(999, 749, 499), (499, 249, None)}


def test_rounds():
    assert progressive.rounds(16, 2) == [8, 4, 2]
    assert progressive.rounds(12, 3) == [6, 3]
    for start, steps in ((16, 3), (4, 4), (2, 4)):
        with pytest.raises(ValueError, match="cannot be halved"):
            progressive.rounds(start, steps)


def test_an_old_student_is_asked_with_its_own_weights():
    p = torch.nn.Parameter(torch.ones(1))
    old = progressive.held(lambda x: x * p, [p], [p.detach().clone()])
    with torch.no_grad():
        p.mul_(3)
        assert float(old(torch.tensor(2.0))) == 2.0 and p.item() == 3.0
    failing = progressive.held(lambda x: 1 / 0, [p], [torch.zeros(1)])
    with pytest.raises(ZeroDivisionError):
        failing(torch.tensor(1.0))
    assert p.item() == 3.0
