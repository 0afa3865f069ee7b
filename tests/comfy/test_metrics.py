"""The metric nodes in a real server, and scores through ComfyUI's own CLIP against transformers'."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_nibble.metrics import features, images
from PIL import Image
from safetensors.torch import save_file


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def pictures(server):
    """Two 8-bit pictures in the server's input folder; returns their pixels in [0, 1]."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 1, 96)[:, None, None] * np.ones((96, 96, 3))
    noisy = np.clip(smooth + 0.08 * rng.standard_normal(smooth.shape), 0, 1)
    out = []
    for name, pixels in (("nibble_ref.png", smooth), ("nibble_cand.png", noisy)):
        exact = (pixels * 255).round().astype(np.uint8)
        path = server.base / "input" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(exact).save(path)
        out.append(exact.astype(np.float64) / 255)
    return out


def compared(reference="nibble_ref.png", candidate="nibble_cand.png") -> dict:
    return {
        "a": node("LoadImage", image=reference), "b": node("LoadImage", image=candidate),
        "c": node("NibbleCompareImages", reference=["a", 0], candidate=["b", 0], reference_label="16-bit",
                  candidate_label="4-bit", full_scale=0.25),
        "psnr": node("PreviewAny", source=["c", 2]), "ssim": node("PreviewAny", source=["c", 3]),
        "csv": node("PreviewAny", source=["c", 1]),
        "beside": node("SaveImage", images=["c", 4], filename_prefix="beside"),
        "heat": node("SaveImage", images=["c", 5], filename_prefix="heat"),
        "pair": node("SaveImage", images=["c", 6], filename_prefix="pair"),
    }  # fmt: skip


def test_two_pictures_are_compared(server, pictures):
    result = server.done(compared())
    a, b = pictures
    assert float(result.text("psnr")) == pytest.approx(images.psnr(a, b), abs=1e-3)
    assert float(result.text("ssim")) == pytest.approx(images.ssim(a, b), abs=1e-4)
    report = result.text("c")
    assert "PSNR (dB)" in report and "LPIPS" in report  # its value, or which part of it is missing
    (row, _) = list(csv.DictReader(io.StringIO(result.text("csv"))))
    assert float(row["SSIM"]) == pytest.approx(images.ssim(a, b), abs=1e-4)
    heat = server.image(result, "heat")
    assert np.abs(heat - images.heat_map(a, b)).max() < 0.01
    assert len(result.outputs["pair"]["images"]) == 2
    assert np.abs(server.image(result, "pair", 0) - a).max() < 0.01
    assert np.abs(server.image(result, "pair", 1) - b).max() < 0.01
    beside = server.image(result, "beside")
    assert beside.shape == (96 + images.HEAD, 3 * 96 + 2 * images.GAP, 3)
    assert result.outputs["c"]["images"]  # the node shows it


def test_equal_pictures_are_equal(server, pictures):
    result = server.done(compared(candidate="nibble_ref.png"))
    assert float(result.text("psnr")) == math.inf and float(result.text("ssim")) == pytest.approx(1)
    assert "equal" in result.text("c") and server.image(result, "heat").max() == 0


def test_other_sizes_are_refused_in_one_sentence(server, pictures):
    Image.new("RGB", (64, 96)).save(server.base / "input" / "nibble_small.png")
    error = server.run(compared(candidate="nibble_small.png")).error
    assert "the reference is 96 x 96 and the candidate 64 x 96 pixels" in error


# ---- scores ----


@pytest.fixture
def sets(server):
    """Two folders of features in the server's output, and one of pictures in its input."""
    g = torch.Generator().manual_seed(0)
    made = torch.randn(40, 8, generator=g), torch.randn(40, 8, generator=g) + 0.5
    for name, values in zip(("made", "wanted"), made, strict=True):
        folder = server.base / "output" / "nibble_sets" / name
        folder.mkdir(parents=True, exist_ok=True)
        half = len(values) // 2
        save_file({"features": values[:half].contiguous()}, folder / "1.safetensors")
        save_file({"features": values[half:].contiguous()}, folder / "2.safetensors")
    return made


def scored(**inputs) -> dict:
    values = dict(folder="none", reference_folder="none", prompts="", image_reward=False)
    return {"s": node("NibbleScores", **values | inputs), "csv": node("PreviewAny", source=["s", 1])}


def test_feature_folders_are_compared(server, sets):
    result = server.done(scored(folder="output/nibble_sets/made", reference_folder="output/nibble_sets/wanted"))
    rows = list(csv.DictReader(io.StringIO(result.text("csv"))))
    assert len(rows) == 41
    overall = rows[-1]
    assert float(overall["Frechet distance"]) == pytest.approx(features.frechet(*sets), rel=1e-6)
    assert float(overall["KID"]) == pytest.approx(features.kernel_distance(*sets)[0], rel=1e-6)
    assert float(overall["CLIP-I"]) == pytest.approx(features.mean_cosine(*sets), abs=1e-6)
    each = [float(r["CLIP-I"]) for r in rows[:-1]]
    assert np.mean(each) == pytest.approx(float(overall["CLIP-I"]), abs=1e-6)
    saved = result.text("s").rsplit("Saved as ", 1)[1].rstrip(".")
    assert (server.base / "output" / saved).read_text() == result.text("csv")


def test_folders_of_strangers_are_refused(server, sets):
    for choice in ("../..", "output/../../..", "/etc", "input/../output"):
        reply = server.post("/prompt", {"prompt": scored(folder=choice), "client_id": server.client})
        assert reply["http"] == 400, choice


def test_what_cannot_be_scored_is_said(server, sets, pictures):
    assert "connect pictures or choose a folder" in server.run(scored()).error
    assert "nothing to score them against" in server.run(scored(folder="output/nibble_sets/made")).error
    folder = server.base / "output" / "nibble_sets" / "odd"
    folder.mkdir(exist_ok=True)
    (folder / "x.safetensors").write_bytes(b"nonsense")
    assert "x.safetensors: not a whole safetensors file" in server.run(scored(folder="output/nibble_sets/odd")).error
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, folder / "x.safetensors")
    error = server.run(scored(folder="output/nibble_sets/odd")).error
    assert "x.safetensors: a features file holds one float matrix (pictures, features), not 2" in error
    (folder / "x.safetensors").unlink()
    assert "neither a picture nor a features file" in server.run(scored(folder="output/nibble_sets/odd")).error
    (folder / "y.png").write_bytes(b"nonsense")
    graph = scored(folder="output/nibble_sets/odd", prompts="a fox", image_reward=True)
    assert "ImageReward is left out" in server.run(graph).error  # said before a picture is opened


def peak_of(server) -> int:
    """Bytes of the largest memory that the server has had."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def test_a_picture_that_claims_too_much_is_refused(server):
    """13,000 x 13,000 in 20 KB took 3.9 GB before it was scored."""
    folder = server.base / "output" / "nibble_sets" / "bombs"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("1", (13_000, 13_000), 1).save(folder / "a.png", optimize=True)
    demo = {"1": node("NibbleLoadDemo", precision="16-bit", rank=16)}
    graph = scored(folder="output/nibble_sets/bombs", prompts="a fox", clip=["1", 1], clip_vision=["1", 3])
    before = peak_of(server)
    error = server.run(graph | demo).error
    assert "a.png: 13000 x 13000 pixels, more than 67 megapixels, the most that is read. Make it smaller" in error
    assert peak_of(server) - before < 2**30


def test_scores_through_comfyui_are_those_of_transformers(inside, tmp_path):
    """The same tiny CLIP in both; ComfyUI keeps text encoders in 16 bits, hence the tolerance."""
    found = inside("profiling_clip", tmp_path)
    assert found["captions"] == ["café crème"] * 2
    assert found["clip_t"] == pytest.approx(found["oracle_t"], abs=1e-3)
    assert found["one_prompt"] == pytest.approx(found["oracle_one"], abs=1e-3)
    assert found["clip_i"] == pytest.approx(found["oracle_i"], abs=1e-4)
    assert "biased upwards" in found["notes"][0]
    for encoder, why in (("identity", "is the identity"), ("zeros", "is empty"), ("garbage", "is empty"),
                         ("nan", "is not finite"), ("no_projection", "visual projection"),
                         ("other_width", "64 numbers and the picture features 48")):  # fmt: skip
        assert why in found[encoder] and "Load a whole CLIP model" in found[encoder], encoder
    assert "this holds 2 CLIP text encoders" in found["two"] and "Load a whole CLIP model" in found["two"]
    assert found["missing"] == "is missing" and found["trained"] == ""
    assert "one line for all" in found["three_prompts"] and "nothing to score" in found["nothing"]
    assert "pictures" in found["both"] and "is not a folder below output" in found["outside"]
