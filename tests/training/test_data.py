"""Pictures and captions: where captions come from, which bucket a picture goes to, and what is refused."""

import json

import pytest
import torch
from comfyui_nibble.training import data
from PIL import Image


def put(folder, name: str, size=(64, 64), caption: str | None = None, colour="red") -> None:
    Image.new("RGB", size, colour).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def test_captions_beside_in_jsonl_and_in_csv(tmp_path):
    put(tmp_path, "a.png", caption="  a red\nsquare ")
    put(tmp_path, "b.jpg")
    put(tmp_path, "c.webp")
    put(tmp_path, "d.bmp")
    rows = [{"file_name": "b.jpg", "text": "from jsonl"}, {"file_name": "a.png", "text": "the .txt wins"},
            {"file_name": "../../secret.png", "text": "not in the folder"}]  # fmt: skip
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    (tmp_path / "more.csv").write_text('file_name,caption\nc.webp,"with, a comma"\nd.bmp,plain\n')
    found = {e.path.name: e.caption for e in data.examples(tmp_path)}
    assert found == {"a.png": "a red square", "b.jpg": "from jsonl", "c.webp": "with, a comma", "d.bmp": "plain"}


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="away: there is no such folder"):
        data.examples(tmp_path / "away")
    with pytest.raises(ValueError, match="no pictures in it"):
        data.examples(tmp_path)
    put(tmp_path, "a.png")
    put(tmp_path, "b.png", caption="b")
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no caption, a.png first. Write it into a.txt"):
        data.examples(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"file_name": "a.png"\n')
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: it is not JSON"):
        data.examples(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match=r"broken.png: it cannot be read as a picture"):
        data.fitted(tmp_path / "broken.png", 64)
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    with pytest.raises(ValueError, match=r"page.png: it cannot be read"):
        data.fitted(tmp_path / "page.png", 64)


@pytest.mark.parametrize("side", [64, 128, 512, 768, 1024])
def test_buckets_hold_about_as_many_pixels(side):
    found = data.buckets(side)
    step = 64 if side >= 512 else 32
    assert (side, side) in found and len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0 and max(width / height, height / width) <= 2
        assert 0.6 < width * height / side**2 < 1.5


@pytest.mark.parametrize("size, want", [((100, 100), (128, 128)), ((300, 190), (160, 96)), ((190, 300), (96, 160)),
                                        ((1000, 10), (192, 96))])  # fmt: skip
def test_a_picture_goes_to_the_bucket_of_its_shape(tmp_path, size, want):
    put(tmp_path, "a.png", size)
    picture = data.fitted(tmp_path / "a.png", 128)
    assert tuple(picture.shape) == (3, want[1], want[0])
    assert torch.allclose(picture.mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]), atol=1e-2)


def test_transparent_is_white_and_the_middle_is_kept(tmp_path):
    image = Image.new("RGBA", (256, 128), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (64, 0, 192, 128))
    image.save(tmp_path / "a.png")
    picture = data.fitted(tmp_path / "a.png", 128)
    assert tuple(picture.shape) == (3, 96, 192)
    assert picture[:, :, 0].min() > 0.9 and picture[1, 48, 96] < -0.9


def test_split_and_batches_are_functions_of_the_seed():
    assert data.split(10, 0.0, 1) == (list(range(10)), [])
    learn, held = data.split(10, 0.2, 1)
    assert sorted(learn + held) == list(range(10)) and len(held) == 2 and data.split(10, 0.2, 1) == (learn, held)
    assert data.split(1, 0.5, 0) == ([0], [])
    samples = [data.Sample(torch.full((1, 2 + i % 2, 2), float(i)), i, None) for i in range(9)]
    draw = data.Batches(samples)
    seen = set()
    for step in range(40):
        rows = draw(3, torch.Generator().manual_seed(step))
        assert len({tuple(r.latent.shape) for r in rows}) == 1 and len({r.cond for r in rows}) == len(rows) == 3
        assert [r.cond for r in rows] == [r.cond for r in draw(3, torch.Generator().manual_seed(step))]
        seen |= {r.cond for r in rows}
    assert seen == set(range(9))
    assert len(draw(100, torch.Generator().manual_seed(0))) in (4, 5)
