"""Feature measures against closed forms and torchmetrics (a test oracle only)."""

import math
import sys

import numpy as np
import pytest
import torch
from comfyui_nibble.metrics import features, optional, pairing
from comfyui_nibble.metrics.table import Scores


@pytest.fixture
def sets():
    g = torch.Generator().manual_seed(0)
    return torch.randn(60, 12, generator=g), torch.randn(60, 12, generator=g) * 1.4 + 0.3


def oracle(name: str):
    return pytest.importorskip(name, reason="torchmetrics, a test oracle, is not installed")


def test_cosine_double_sum_by_hand():
    """1/(NK) sum_i sum_k cos(x_k, y_i), written out."""
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0, 2.0], [3.0, 0.0], [-1.0, 0.0]])
    half = math.sqrt(0.5)
    expected = (0 + 1 - 1 + half + half - half) / 6
    assert features.mean_cosine(x, y) == pytest.approx(expected, abs=1e-12)
    assert features.mean_cosine(y, x) == pytest.approx(expected, abs=1e-12)
    assert features.mean_cosine(x[:1], x[:1] * 7) == pytest.approx(1)


def test_cosine_against_torchmetrics(sets):
    pairwise = oracle("torchmetrics.functional").pairwise_cosine_similarity(*sets)
    assert features.mean_cosine(*sets) == pytest.approx(float(pairwise.mean()), abs=1e-4)
    assert torch.allclose(features.paired_cosine(*sets).float(), pairwise.diagonal(), atol=1e-4)


def made_of(n: int, k: int, noise: float = 0.9, d: int = 64):
    """(N K, d) features of K pictures of each of N references, and (N, d) of those."""
    g = torch.Generator().manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    return wanted.repeat_interleave(k, 0) + noise * torch.randn(n * k, d, generator=g) / d**0.5, wanted


def numbered(count: int) -> list[str]:
    return [f"picture {i + 1}" for i in range(count)]


@pytest.mark.parametrize("n, k", [(50, 4), (7, 1), (1, 5), (3, 2)])
def test_clip_i_is_paired(n, k):
    """mean over n, k of cos(gen_nk, ref_n), written out; over all pairs it was .015 instead of .743 for 50 x 4."""
    seen, wanted = made_of(n, k)
    cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    by_hand = [cosine(seen[i * k + j], wanted[i]) for i in range(n) for j in range(k)]
    got, said = pairing.clip_i(seen, wanted, (numbered(n * k), numbered(n)))
    assert got.tolist() == pytest.approx(by_hand, abs=1e-6) and "CLIP-I is paired" in said
    assert float(got.mean()) > 0.6
    every, said = pairing.clip_i(seen, wanted, (numbered(n * k), numbered(n)), pairing.ALL)
    assert float(every.mean()) == pytest.approx(features.mean_cosine(seen, wanted)) and "all pairs" in said
    assert n == 1 or float(every.mean()) < 0.6


def test_clip_i_pairs_by_name_and_numbers_in_it():
    """Folders list 10 before 2; a row of the answer stays with its picture."""
    seen, wanted = made_of(12, 2)
    expected = pairing.clip_i(seen, wanted, (numbered(24), numbered(12)))[0]
    order, other = (torch.tensor(sorted(range(n), key=str)) for n in (24, 12))
    names = [f"{i}.png" for i in order.tolist()], [f"{i}.png" for i in other.tolist()]
    assert names[0][:3] == ["0.png", "1.png", "10.png"]
    got = pairing.clip_i(seen[order], wanted[other], names)[0]
    assert torch.allclose(got, expected[order])


def test_clip_i_of_counts_that_do_not_fit():
    seen, wanted = made_of(5, 1)
    names = numbered(5), numbered(3)
    got, said = pairing.clip_i(seen, wanted[:3], names)
    assert float(got.mean()) == pytest.approx(features.mean_cosine(seen, wanted[:3]))
    assert said.endswith("all pairs of a picture and a reference: 5 pictures are no multiple of 3 references.")
    with pytest.raises(ValueError, match="5 pictures and 3 references cannot be paired"):
        pairing.clip_i(seen, wanted[:3], names, pairing.PAIRED)
    with pytest.raises(ValueError, match="'each' is none of them"):
        pairing.clip_i(seen, wanted[:3], names, "each")
    with pytest.raises(ValueError, match="64 and 32 numbers"):
        pairing.clip_i(seen, wanted[:3, :32], names)


@pytest.mark.parametrize("m, s", [(0.0, 1.0), (2.0, 1.0), (0.0, 3.0), (-1.5, 0.25)])
def test_frechet_of_two_gaussians(m, s):
    """N(0, 1) and N(m, s^2): m^2 + (1 - s)^2, in each of three dimensions."""
    eye = torch.eye(3)
    got = features.frechet_gaussians(torch.zeros(3), eye, torch.full((3,), m), eye * s * s)
    assert got == pytest.approx(3 * (m * m + (1 - s) ** 2), abs=1e-9)


def test_frechet_of_correlated_gaussians():
    """Covariances that do not commute, by the eigenvalues of their product."""
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    b = torch.tensor([[0.5, -0.2], [-0.2, 1.5]]).double()
    roots = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * roots)
    assert features.frechet_gaussians(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(expected, abs=1e-9)


def test_frechet_against_torchmetrics(sets):
    fid = oracle("torchmetrics.image.fid")._compute_fid
    moments = [part for s in sets for part in (s.double().mean(0), torch.cov(s.double().t()))]
    assert features.frechet(*sets) == pytest.approx(float(fid(*moments)), abs=1e-4)
    assert features.frechet(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_against_torchmetrics(sets):
    mmd = oracle("torchmetrics.image.kid").poly_mmd
    mean, deviation = features.kernel_distance(*sets)
    assert mean == pytest.approx(float(mmd(*(s.double() for s in sets))), abs=1e-4) and deviation == 0


def test_kernel_distance_by_hand():
    """Two points a side in one dimension: k(a, b) = (ab + 1)^3, a pair with itself left out."""
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [-1.0]])
    cross = [(a * b + 1) ** 3 for a in (1, 2) for b in (0, -1)]
    assert features.mmd(x.double(), y.double()) == pytest.approx(27 + 1 - 2 * sum(cross) / 4)


def test_kernel_distance_in_subsets_is_seeded(monkeypatch, sets):
    monkeypatch.setattr(features, "KID_SUBSET", 20)
    one, two = features.kernel_distance(*sets, seed=3), features.kernel_distance(*sets, seed=3)
    assert one == two != features.kernel_distance(*sets, seed=4) and one[1] > 0
    assert one[0] == pytest.approx(features.mmd(*(s.double() for s in sets)), rel=0.5)


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(3, 4), "all zeros"), (torch.ones(4), "must be a matrix"), (torch.ones(0, 4), "must be a matrix"),
    (torch.full((2, 4), float("nan")), "NaN"), (torch.ones(2, 5), "4 and 5 numbers|5 and 4 numbers"),
])  # fmt: skip
def test_bad_features_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        features.mean_cosine(bad, torch.ones(2, 4))


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="two pictures"):
        features.frechet(torch.ones(1, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match="two pictures"):
        features.kernel_distance(torch.ones(5, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="cannot be paired"):
        features.paired_cosine(torch.ones(3, 4), torch.ones(2, 4))


# ---- tables ----


def test_scores_as_table_and_csv():
    scores = Scores(("a|b.png", "=c"), {"CLIP-T": (0.25, 0.75), "PSNR": (math.inf, 20.0)}, {"CLIP-T": 0.5, "KID": 0.01},
                    ("a note",))  # fmt: skip
    text = scores.markdown()
    assert "| CLIP-T | 0.5 |" in text and "| a\\|b.png | 0.25 | equal |" in text and text.endswith("a note")
    lines = scores.to_csv().splitlines()
    assert lines == ["picture,CLIP-T,PSNR,KID", "a|b.png,0.25,inf,", "'=c,0.75,20.0,", "all,0.5,inf,0.01"]
    assert "98 more pictures" in Scores(tuple(map(str, range(298))), {"x": [0.0] * 298}, {}).markdown()
    with pytest.raises(ValueError, match="1 values for 2 pictures"):
        Scores(("a", "b"), {"x": (1.0,)}, {})


# ---- libraries of others ----


def test_lpips_says_which_part_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    picture = np.zeros((32, 32, 3))
    installed = all(__import__("importlib").util.find_spec(n) for n in ("lpips", "torchvision"))
    expected = optional.ALEXNET if installed else "pip install"
    with pytest.raises(optional.Missing, match=expected):
        optional.lpips([(picture, picture)])


def test_a_library_that_does_not_load_is_left_out(monkeypatch, tmp_path):
    """As torchvision made for another torch: the other measures must go on without it."""
    for name in ("lpips", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / optional.ALEXNET).write_bytes(b"")
    picture = np.zeros((32, 32, 3))
    with pytest.raises(
        optional.Missing, match=r"lpips does not load here \(operator torchvision::nms does not exist\)"
    ):
        optional.lpips([(picture, picture)])


def test_lpips_with_its_library_and_weights(monkeypatch, tmp_path):
    """AlexNet with random weights stands in for the 233 MB download: the number means nothing, the path does."""
    pytest.importorskip("lpips", reason="the lpips package is not installed")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(models.alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / optional.ALEXNET)
    rng = np.random.default_rng(0)
    a, b = rng.random((64, 64, 3)), rng.random((64, 64, 3))
    same, other = optional.lpips([(a, a), (a, b)])
    assert same == pytest.approx(0, abs=1e-6) and other > 0


def test_image_reward_says_which_part_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(optional.Missing, match=r"image-reward|ImageReward\.pt"):
        optional.image_reward(["a"], [np.zeros((8, 8, 3))])
