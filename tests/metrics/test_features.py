"""Feature measures against closed forms and torchmetrics (a test oracle only)."""

import importlib.machinery
import importlib.util
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


def test_frechet_of_few_points_by_hand():
    """0, 2 and 0, 4: means 1, 2 and unbiased variances 2, 8 (biased: 1, 4): 1 + 2 + 8 - 2 sqrt 16."""
    assert features.frechet(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])) == pytest.approx(3)


def test_frechet_is_torchmetrics_fid(sets):
    """From the pictures on: the oracle makes means and covariances by itself, of features that are the pixels."""
    fid = oracle("torchmetrics.image.fid").FrechetInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).double()

    few = [s[:20].double() for s in sets]
    metric = fid(feature=Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(few[0].view(-1, 3, 2, 2), real=True)
    metric.update(few[1].view(-1, 3, 2, 2), real=False)
    assert features.frechet(*few) == pytest.approx(float(metric.compute()), rel=1e-6)


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


CHANNELS = (64, 192, 384, 256, 256)


def backbone() -> torch.nn.Sequential:
    """The features of AlexNet as torchvision numbers them, with weights of its own making."""
    nn = torch.nn
    g = torch.Generator().manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5 * 1.5
    return made.requires_grad_(False)


def lpips_by_hand(pair, lins: list[torch.Tensor]) -> float:
    """Zhang 2018, eq. 1: channels of each layer to length 1, squared difference, weighed, mean over the picture."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, net = 0.0, backbone()
    x = torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() * 2 - 1 for p in pair])  # [-1, 1]
    x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    layer = 0
    for i, module in enumerate(net[:12]):
        x = module(x)
        if i in (1, 4, 7, 9, 11):
            a, b = (v / (v.square().sum(0, keepdim=True).sqrt() + 1e-10) for v in x)
            total += float(((a - b).square() * lins[layer].view(-1, 1, 1)).sum(0).mean())
            layer += 1
    return total


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """A stand-in that has AlexNet and nothing else, and its file in torch's cache. The real one must belong to the very
    torch beside it: PyPI's, beside a torch for CPUs, breaks transformers and diffusers.
    """
    import importlib.machinery
    import types

    for name in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "lpips")]:
        monkeypatch.delitem(sys.modules, name)
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    models.alexnet = lambda pretrained=False: types.SimpleNamespace(features=backbone())
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / optional.ALEXNET).write_bytes(b"")
    yield package
    for name in [n for n in sys.modules if n.partition(".")[0] == "lpips"]:
        sys.modules.pop(name)


def drawn(n: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random((64, 64, 3)) for _ in range(n)]


def test_lpips_is_its_formula(torchvision):
    """The lpips package with the weights that it ships, on a random backbone: 0 for equal pictures, else eq. 1."""
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("the lpips package is not installed (pip install --no-deps lpips)")
    library = importlib.import_module("lpips")
    a, b = drawn()
    close = np.clip(a + 0.02, 0, 1)
    found = optional.lpips([(a, a), (a, b), (a, close)])
    lins = [lin.model[1].weight.detach().flatten() for lin in library.LPIPS(net="alex", verbose=False).lins]
    assert [len(v) for v in lins] == list(CHANNELS)
    assert found[0] == pytest.approx(0, abs=1e-7)
    assert found[1:] == pytest.approx([lpips_by_hand((a, other), lins) for other in (b, close)], rel=1e-4)
    assert found[1] > 3 * found[2] > 0


def test_lpips_is_handed_pictures_from_minus_one_to_one(torchvision, monkeypatch):
    """As the package documents it; its own normalize flag stays off."""
    import types

    seen = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, one, other):
            seen.append((one, other))
            return torch.tensor(0.5)

    library = types.ModuleType("lpips")
    library.__spec__, library.LPIPS = importlib.machinery.ModuleSpec("lpips", None), LPIPS
    monkeypatch.setitem(sys.modules, "lpips", library)
    a, b = np.zeros((8, 6, 3)), np.ones((8, 6, 3))
    b[0, 1] = (0.25, 0.5, 0.75)
    assert optional.lpips([(a, b)]) == [0.5]
    ((one, other),) = seen
    assert one.shape == (1, 3, 8, 6) and (one == -1).all() and other[0, 0, 5, 5] == 1
    assert other[0, :, 0, 1].tolist() == [-0.5, 0.0, 0.5]


def test_lpips_says_which_part_is_missing(monkeypatch, tmp_path):
    """The package, torchvision, its file: the first that is not there."""
    picture, there = np.zeros((32, 32, 3)), set()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: name if name in there else None)
    for name in ("lpips", "torchvision"):
        with pytest.raises(optional.Missing, match=rf"package {name} is not installed \(pip install {name}\)"):
            optional.lpips([(picture, picture)])
        there.add(name)
    with pytest.raises(optional.Missing, match=rf"{optional.ALEXNET} is not in torch's cache"):
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


def test_image_reward_says_which_part_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(optional.Missing, match=r"image-reward|ImageReward\.pt"):
        optional.image_reward(["a"], [np.zeros((8, 8, 3))])
