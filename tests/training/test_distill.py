"""The table of ways on a mixture in the plane: each comes closer to the teacher, resumes, and refuses nonsense."""

import pytest
import torch
from comfyui_nibble.training import consistency, distill, loop, recipes
from toys import Mixture, vp_path

PATH = vp_path()
PICTURES = 1.5 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


def run(way: str, work, updates: int = 200, pictures=None, watch=None, rate: float = 3e-3, **settings) -> tuple:
    """(outcome, trained values)."""
    toy = Mixture(PATH)
    plan = loop.Plan(way, updates, 64, rate, warmup=10, weight_decay=0.0, ema=0.95)
    task = distill.Task(toy.student, toy.teacher, list(toy.net.parameters()), PATH, [0, 1, 2], None, (2,), pictures)
    chosen = dict(cfg=1.0, steps=2, start=8, pairs=256, teacher_steps=20)
    near = consistency.Consistency(skip=100, omega=(0.0, 0.0))
    made = distill.Settings(recipes.Distill(way, **{**chosen, **settings}), plan, consistency=near)
    out = distill.train_task(task, made, work, watch or loop.Watch())
    return out, torch.cat([p.detach().flatten() for p in toy.net.parameters()])


@pytest.mark.parametrize("way", ["phased", "reflow", "one_step", "progressive"])
def test_few_steps_come_closer_to_the_teacher(way, tmp_path):
    out, _ = run(way, tmp_path)
    assert out.after < {"reflow": 1.0}.get(way, 0.95) * out.before, (out.before, out.after)
    assert len(out.losses) == (200 if way != "progressive" else 2 * 100)


@pytest.mark.parametrize("way", ["lcm", "phased", "progressive"])
def test_runs_on_the_teachers_pictures_and_on_ones_own(way, tmp_path):
    """With one's own the teacher still draws a few, so that before and after are distances to it."""
    drawn, one = run(way, tmp_path / "a", 5)
    own, two = run(way, tmp_path / "b", 5, PICTURES)
    assert drawn.before > 0 and own.before > 0 and own.after != own.before
    assert not torch.equal(one, two)


def test_lcf_asks_no_teacher(tmp_path):
    out, _ = run("lcf", tmp_path, 5, PICTURES)
    assert out.before > 0 and not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("way", ["lcm", "lcf", "phased", "one_step", "progressive"])
def test_stopped_and_resumed_it_is_the_same(way, tmp_path):
    class Stop(BaseException):
        pass

    def step(done, total, loss):
        if done == 15:
            raise Stop

    given = dict(pictures=PICTURES if way == "lcf" else None, rate=1e-3)
    _, whole = run(way, tmp_path / "a", 20, **given)
    with pytest.raises(Stop):
        run(way, tmp_path / "b", 20, watch=loop.Watch(step), **given)
    out, resumed = run(way, tmp_path / "b", 20, **given)
    assert torch.equal(whole, resumed) and len(out.losses) == 20


@pytest.mark.parametrize(
    ("way", "settings", "words"),
    [
        ("lcf", {}, "lcf learns from pictures"),
        ("faster", {}, "unknown way to distil 'faster'; there are lcm, lcf"),
        ("progressive", dict(start=6, steps=4), "cannot be halved"),
    ],
)
def test_refuses_in_one_sentence(way, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(way, tmp_path, 1, **settings)


def test_the_ways_that_are_offered_are_there():
    assert tuple(distill.MODES) == tuple(recipes.WAYS)


def test_conditions_are_the_pairs_prompts(tmp_path):
    """The student is asked with the prompt that its pair was drawn from."""
    asked, toy = set(), Mixture(PATH)

    def student(z, t, cond):
        asked.update(cond)
        return toy.student(z, t)

    task = distill.Task(student, toy.teacher, list(toy.net.parameters()), PATH, ["a", "b"], None, (2,))
    plan = loop.Plan("one_step", 3, 8, 1e-3, warmup=1)
    settings = distill.Settings(recipes.Distill("one_step", cfg=1.0, pairs=8, teacher_steps=2), plan)
    distill.train_task(task, settings, tmp_path, loop.Watch())
    assert asked == {"a", "b"}
