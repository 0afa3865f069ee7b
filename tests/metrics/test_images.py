"""Image measures against closed forms, and against torchmetrics where it is installed (a test oracle only)."""

import math

import numpy as np
import pytest
import torch
from comfyui_nibble.metrics import compare, images

SIZES = [(16, 16, 3), (33, 21, 1), (64, 48, 3)]


def oracle():
    return pytest.importorskip("torchmetrics", reason="torchmetrics, a test oracle, is not installed").functional.image


def pair(shape, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.random(shape)
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1)


def tensor(a) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(a, -1, 0).copy())[None]


@pytest.mark.parametrize("c", [0.5, 0.1, 0.003])
def test_psnr_of_a_constant_difference(c):
    a = np.full((8, 8, 3), 0.25)
    assert images.psnr(a, a + c) == pytest.approx(-20 * math.log10(c), abs=1e-9)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_against_torchmetrics(shape, noise):
    a, b = pair(shape, noise)
    functional = oracle()
    expected = functional.structural_similarity_index_measure(tensor(b), tensor(a), data_range=1.0)
    assert images.ssim(a, b) == pytest.approx(float(expected), abs=1e-4)
    expected = functional.peak_signal_noise_ratio(tensor(b), tensor(a), data_range=1.0)
    assert images.psnr(a, b) == pytest.approx(float(expected), abs=1e-4)


def test_ssim_by_hand():
    """Two flat pictures a and b have no structure: (2ab + C1) / (a^2 + b^2 + C1)."""
    a, b = 0.3, 0.6
    flat = [np.full((24, 24, 1), v) for v in (a, b)]
    c1 = 0.01**2
    assert images.ssim(*flat) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-12)


@pytest.mark.parametrize("deep", [(0.2, 0.2), (0.25, 0.1), (0.02, 0.03), (0.05, -0.04)])
def test_ssim_of_stripes_by_hand(deep):
    """Stripes of one pixel, a +- b: mirrored edges go on as stripes, so every window is one of two. Its mean is a +- b
    c, c = sum g_i (-1)^i of the Gaussian window, its variance b^2 (1 - c^2), the covariance b1 b2 (1 - c^2).
    """
    g = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]
    c = sum(w * (-1) ** i for i, w in zip(range(-5, 6), g, strict=True)) / sum(g)
    (b1, b2), (a1, a2), c1, c2 = deep, (0.4, 0.5), 0.01**2, 0.03**2
    signs = np.array([1.0, -1.0] * 12)
    pictures = [np.broadcast_to((a + b * signs)[None, :, None], (24, 24, 1)) for a, b in ((a1, b1), (a2, b2))]
    expected = 0.0
    for s in (1, -1):
        m1, m2 = a1 + s * b1 * c, a2 + s * b2 * c
        v1, v2, cov = (p * (1 - c * c) for p in (b1 * b1, b2 * b2, b1 * b2))
        expected += (2 * m1 * m2 + c1) * (2 * cov + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2)) / 2
    assert images.ssim(*pictures) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", SIZES)
def test_equal_pictures_and_symmetry(shape):
    a, b = pair(shape)
    assert images.ssim(a, a) == pytest.approx(1, abs=1e-12) and images.psnr(a, a) == math.inf
    assert images.ssim(a, b) == pytest.approx(images.ssim(b, a)) and images.ssim(a, b) < 1


def test_more_noise_is_less_similar():
    values = [images.ssim(*pair((48, 48, 3), noise)) for noise in (0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True)


def test_different_shapes_and_tiny_pictures_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        images.ssim(np.zeros((16, 16, 3)), np.zeros((16, 17, 3)))
    with pytest.raises(ValueError, match="more than 5 pixels"):
        images.ssim(np.zeros((5, 16, 3)), np.zeros((5, 16, 3)))


def test_heat_map_colours():
    """Black where equal, white from the full difference on, and brighter in between the larger it is."""
    a = np.zeros((1, 5, 3))
    b = a.copy()
    b[0, :, 1] = (0, 0.05, 0.125, 0.2, 0.9)  # one channel is enough
    heat = images.heat_map(a, b, full=0.25)
    assert (heat[0, 0] == 0).all() and np.allclose(heat[0, 4], 1) and np.allclose(heat[0, 2], images.HEAT[2])
    brightness = heat[0].sum(-1)
    assert (np.diff(brightness) > 0).all()


# ---- a comparison of batches ----


def batch(n, noise=0.1):
    pairs = [pair((24, 32, 3), noise, seed) for seed in range(n)]
    return np.stack([p[0] for p in pairs]).astype(np.float32), np.stack([p[1] for p in pairs]).astype(np.float32)


def test_a_batch_is_compared_pair_by_pair():
    a, b = batch(3)
    found = compare.compare(a, b, ("16-bit", "4-bit"), perceptual=False)
    assert found.psnr == pytest.approx(np.mean([images.psnr(x, y) for x, y in zip(a, b, strict=True)]))
    assert found.ssim == pytest.approx(np.mean([images.ssim(x, y) for x, y in zip(a, b, strict=True)]))
    assert found.heat.shape == a.shape and found.pair.shape == (6, *a.shape[1:])
    assert (found.pair[0::2] == a).all() and (found.pair[1::2] == b).all()
    assert found.beside.shape == (3, 24 + images.HEAD, 3 * 32 + 2 * images.GAP, 3)
    bottom = found.beside[:, images.HEAD :]
    assert np.abs(bottom[:, :, :32] - a).max() < 0.003 and np.abs(bottom[:, :, 40:72] - b).max() < 0.003


def test_one_reference_serves_for_all():
    a, b = batch(3)
    found = compare.compare(a[:1], b, ("r", "c"), perceptual=False)
    assert found.scores.each["PSNR (dB)"][2] == pytest.approx(images.psnr(a[0], b[2]))


def test_equal_pictures_read_as_equal():
    a, _ = batch(1)
    found = compare.compare(a, a, ("r", "c"), perceptual=False)
    assert found.psnr == math.inf and "| PSNR (dB) | equal |" in found.scores.markdown() and not found.heat.any()


def test_what_does_not_fit_is_said():
    a, b = batch(3)
    with pytest.raises(ValueError, match=r"32 x 24 and the candidate 16 x 24 pixels\. Resize"):
        compare.compare(a, b[:, :, :16], ("r", "c"))
    with pytest.raises(ValueError, match="2 references and 3 candidates"):
        compare.compare(a[:2], b, ("r", "c"))
