"""Pairs are a function of their making; reflow straightens, and one step learns where many lead."""

from dataclasses import replace

import pytest
import torch
from comfyui_nibble.training import loop, paths, reflow
from safetensors.torch import load_file, save_file
from toys import Gaussian, Mixture, flow_path, vp_path

PATH = vp_path()
MAKING = reflow.Making(512, (2,), steps=40, seed=1, shard=128, about="toy")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return reflow.make((Mixture(PATH).teacher, PATH), ([0, 1, 2], None), MAKING, folder)


def batches(pairs: reflow.Pairs):
    def batch(g: torch.Generator, n: int = 64) -> reflow.Batch:
        at = torch.randint(len(pairs), (n,), generator=g)
        return reflow.Batch(pairs.noise[at], pairs.x1[at], [None] * n)

    return batch


def answer(model):
    return lambda z, t: model(z, t, None)


def fresh_noise() -> torch.Tensor:
    return torch.randn(256, 2, generator=torch.Generator().manual_seed(9))


def test_reflow_straightens_a_plane(pairs):
    toy, batch = Mixture(PATH), batches(pairs)
    before = reflow.straightness(answer(toy.teacher), PATH, fresh_noise(), 25)

    def loss(_step, g):
        return reflow.reflow(toy.student, batch(g), PATH, reflow.uniform(PATH, 64, g))

    plan = loop.Plan("reflow", 400, 64, 3e-3, warmup=20, weight_decay=0.0, ema=0.98)
    loop.train(plan, list(toy.net.parameters()), loss)
    with torch.no_grad():
        after = reflow.straightness(answer(toy.student), PATH, fresh_noise(), 25)
    assert after.value < 0.75 * before.value, (before.value, after.value)


def test_one_step_beats_an_euler_step(pairs):
    toy, batch = Mixture(PATH), batches(pairs)
    whole = reflow.Batch(pairs.noise, pairs.x1, [None] * len(pairs))
    euler = float(reflow.one_step(toy.teacher, whole, PATH))
    plan = loop.Plan("one", 300, 64, 3e-3, warmup=20, weight_decay=0.0, ema=0.98)
    loop.train(plan, list(toy.net.parameters()), lambda _s, g: reflow.one_step(toy.student, batch(g), PATH))
    with torch.no_grad():
        assert float(reflow.one_step(toy.student, whole, PATH)) < 0.5 * euler


@pytest.mark.parametrize("path", [PATH, flow_path()], ids=["vp", "flow"])
def test_a_model_that_knows_the_end_is_straight_and_has_no_loss(path):
    x1 = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    t = reflow.uniform(path, 16, torch.Generator().manual_seed(2))
    batch = reflow.Batch(noise, x1, [None] * 16)
    assert float(reflow.reflow(lambda z, t, cond: x1, batch, path, t)) < 1e-6
    assert float(reflow.one_step(lambda z, t, cond: x1, batch, path)) == 0.0
    assert reflow.straightness(lambda z, t: x1, path, noise, 10).value < 1e-8
    curved = reflow.straightness(answer(Gaussian(path).denoise), path, noise, 10)
    assert curved.value > 1e-4


def test_times_are_uniform_on_the_straight_line():
    t = reflow.uniform(PATH, 4000, torch.Generator().manual_seed(0))
    tau = PATH.share(t, torch.zeros(4000, 1))[0].flatten()
    most = PATH.share(torch.tensor([999]), torch.zeros(1, 1))[0].item()
    assert tau.mean().item() == pytest.approx(most / 2, rel=0.05)
    assert ((tau / most).sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.05


def test_pairs_are_resumed_and_reproducible(tmp_path, pairs):
    """Half of them, then all: nothing is made twice, and it is what one run makes."""
    toy, asked = Mixture(PATH), []

    def teacher(z, t, cond):
        asked.append(len(z))
        return toy.teacher(z, t)

    small = replace(MAKING, count=8, shard=4)
    reflow.make((teacher, PATH), ([0, 1, 2], None), replace(small, count=4), tmp_path / "a")
    first = len(asked)
    two = reflow.make((teacher, PATH), ([0, 1, 2], None), small, tmp_path / "a")
    assert len(asked) == 2 * first
    one = reflow.make((teacher, PATH), ([0, 1, 2], None), small, tmp_path / "b")
    assert torch.equal(one.x1, two.x1) and torch.equal(one.noise, two.noise)
    assert one.row.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert torch.equal(one.noise, pairs.noise[:8])
    files = sorted((tmp_path / "a").iterdir())
    assert [f.name for f in files] == ["pairs-00000000.safetensors", "pairs-00000004.safetensors"]
    assert set(load_file(files[0])) == {"x1", "row"}


@pytest.mark.parametrize("harm", ["cut", "other", "nonsense", "other shape", "one number"])
def test_a_bad_or_foreign_shard_is_made_anew(harm, tmp_path):
    small, toy = replace(MAKING, count=4, shard=4, steps=3), Mixture(PATH)
    made = reflow.make((toy.teacher, PATH), ([0], None), small, tmp_path)
    shard = tmp_path / "pairs-00000000.safetensors"
    data = shard.read_bytes()
    if harm == "other":
        reflow.make((toy.teacher, PATH), ([0], None), replace(small, about="another model", seed=5), tmp_path)
    elif harm in ("other shape", "one number"):
        x1 = torch.zeros((4, 3) if harm == "other shape" else ())
        save_file({"x1": x1.half(), "row": torch.zeros(4, dtype=torch.int64)}, shard, {"making": reflow._record(small)})
    else:
        shard.write_bytes(data[:40] if harm == "cut" else b"x" * 100)
    again = reflow.make((toy.teacher, PATH), ([0], None), small, tmp_path)
    assert torch.equal(made.x1, again.x1) and shard.read_bytes() == data


def test_stopping_leaves_whole_shards_only(tmp_path):
    class Stop(BaseException):
        pass

    def tell(done, total):
        if done >= 4:
            raise Stop

    with pytest.raises(Stop):
        reflow.make((Mixture(PATH).teacher, PATH), ([0], None), replace(MAKING, count=8, shard=4), tmp_path, tell)
    assert [f.name for f in tmp_path.iterdir()] == ["pairs-00000000.safetensors"]


def test_guidance_and_the_negative_side(tmp_path):
    """cond + cfg (cond - empty), by hand: one step from a model that answers with its condition."""
    model = lambda z, t, cond: torch.stack([torch.full((2,), float(c)) for c in cond])  # noqa: E731
    making = reflow.Making(2, (2,), steps=1, cfg=3.0)
    made = reflow.make((model, PATH), ([5.0, 7.0], 1.0), making, tmp_path)
    assert made.x1.tolist() == [[13.0, 13.0], [19.0, 19.0]]
    assert paths.even(1000, 4) == [999, 749, 499, 249]
