"""Pictures as people have them: every mode and orientation to the right colours, and one sentence for the others."""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_nibble.reading import picture
from comfyui_nibble.training import data
from PIL import Image, ImageOps
from project_files import project_files

ROOT = Path(__file__).resolve().parents[2]
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
TRAINING = "from comfyui_nibble.training import data"
PEAK = """
import resource, sys
from pathlib import Path
import PIL.PngImagePlugin, PIL.WebPImagePlugin, numpy
from comfyui_nibble.reading import picture
{more}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print({call})
except ValueError as e:
    print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def peak(call: str, path: Path, more: str = "") -> tuple[str, int]:
    """(what it printed, MiB by which the peak of a process of its own rose)."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK.format(call=call, more=more), str(path)],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, rise = done.stdout.strip().splitlines()
    return "\n".join(said), int(rise)


@pytest.mark.parametrize("size, shape", [((60_000, 1), (3, 384, 704)), ((1, 60_000), (3, 704, 384))])
def test_a_thin_picture_takes_no_more_than_its_result(tmp_path, size, shape):
    """196 bytes, of which scaling before cropping made 9 GB."""
    Image.new("L", size, 200).save(tmp_path / "line.png", optimize=True)
    assert (tmp_path / "line.png").stat().st_size < 1000
    said, rise = peak("tuple(data.fitted(Path(sys.argv[1]), 512).shape)", tmp_path / "line.png", TRAINING)
    assert said == str(shape) and rise < 200
    found = data.fitted(tmp_path / "line.png", 512)
    assert found.min() == found.max() == pytest.approx(200 / 127.5 - 1)


def bomb(path: Path, width: int, height: int) -> None:
    """A valid file that claims much more than it holds."""
    if path.suffix == ".webp":
        Image.new("RGB", (8, 8)).save(path, lossless=True)
        frame, wide = path.read_bytes()[12:], lambda n: n.to_bytes(3, "little")
        chunk = lambda name, body: name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)  # noqa: E731
        body = b"WEBP" + chunk(b"VP8X", b"\2\0\0\0" + wide(width - 1) + wide(height - 1))
        body += chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", bytes(6) + wide(7) + wide(7) + wide(100) + b"\0" + frame)
        path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    elif path.suffix == ".gif":
        Image.new("P", (8, 8)).save(path)
        written = path.read_bytes()
        path.write_bytes(written[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + written[10:])
    else:
        Image.new("1", (width, height), 1).save(path, **({"optimize": True} if path.suffix == ".png" else {}))


CALLS = ("picture.read(Path(sys.argv[1]))", "picture.fitted(Path(sys.argv[1]), lambda w, h: (512, 512))")


@pytest.mark.parametrize("name, size, said", [
    ("a.png", (13_000, 13_000), "a.png: 13000 x 13000 pixels, more than 67 megapixels, the most that is read. Make it"),
    ("a.png", (9_000, 8_000), "a.png: 9000 x 8000 pixels, more than 67 megapixels"),
    ("a.webp", (16_384, 16_384), "a.webp: more than 67 megapixels"),
    ("a.gif", (60_000, 60_000), "a.gif: more than 67 megapixels"),
    ("a.bmp", (10_000, 10_000), "a.bmp: 10000 x 10000 pixels"),
])  # fmt: skip
@pytest.mark.parametrize("call", CALLS)
def test_bombs_are_refused_by_their_header(tmp_path, name, size, said, call):
    bomb(tmp_path / name, *size)
    got, rise = peak(call, tmp_path / name)
    assert got.startswith(said) and rise < 100


def test_what_is_made_is_bounded_too(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: scaled to \d+ x \d+ pixels, more than 67 mega.* smaller resolution"):
        data.fitted(tmp_path / "a.png", 20_000)


def test_the_limit_of_the_library_stays_as_it_is(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    bomb(tmp_path / "a.png", 9_000, 8_000)
    with pytest.raises(ValueError):
        picture.read(tmp_path / "a.png")
    assert before == Image.MAX_IMAGE_PIXELS


# ---- colours ----


def halves(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, (16, 8), right)
    image.paste(left, (0, 0, 8, 8))
    return image


def palette(**options) -> Image.Image:
    image = Image.new("P", (16, 8), 1)
    image.putpalette([*RED, *BLUE])
    image.paste(0, (0, 0, 8, 8))
    image.info |= options
    return image


def grey16(low: int, high: int) -> Image.Image:
    values = np.full((8, 16), high, np.uint16)
    values[:, :8] = low
    return Image.fromarray(values)


COLOURS = {
    "rgb": ("png", halves("RGB", RED, BLUE), {}, RED, BLUE),
    "rgba": ("png", halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), {}, WHITE, BLUE),
    "half transparent": ("png", halves("RGBA", (0, 0, 0, 128), (0, 0, 255, 255)), {}, (127,) * 3, BLUE),
    "palette": ("png", palette(), {}, RED, BLUE),
    "palette, one transparent": ("png", palette(), {"transparency": 0}, WHITE, BLUE),
    "palette, alpha": ("png", palette(), {"transparency": bytes([0, 255])}, WHITE, BLUE),
    "rgb, key": ("png", halves("RGB", RED, BLUE), {"transparency": RED}, WHITE, BLUE),
    "grey": ("png", halves("L", 60, 200), {}, (60,) * 3, (200,) * 3),
    "grey, key": ("png", halves("L", 60, 200), {"transparency": 60}, WHITE, (200,) * 3),
    "grey and alpha": ("png", halves("LA", (60, 0), (200, 255)), {}, WHITE, (200,) * 3),
    "bits": ("png", halves("1", 0, 1), {}, (0, 0, 0), WHITE),
    "16-bit grey": ("png", grey16(128 * 257, 65535), {}, (128,) * 3, WHITE),
    "16-bit grey, dark": ("png", grey16(0, 257), {}, (0, 0, 0), (1,) * 3),
    "16-bit grey, key": ("png", grey16(300, 40_000), {"transparency": 300}, WHITE, (156,) * 3),
    "cmyk": ("jpg", halves("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), {}, WHITE, RED),
    "grey jpeg": ("jpg", halves("L", 60, 200), {}, (60,) * 3, (200,) * 3),
    "jpeg": ("jpg", halves("RGB", RED, BLUE), {}, RED, BLUE),
    "webp": ("webp", halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), {"lossless": True}, WHITE, BLUE),
    "bmp": ("bmp", halves("RGB", RED, BLUE), {}, RED, BLUE),
    "gif": ("gif", palette(), {}, RED, BLUE),
    "gif, transparent": ("gif", palette(), {"transparency": 0}, WHITE, BLUE),
    "gif, moving": ("gif", palette(), {"save_all": True, "append_images": [halves("RGB", WHITE, WHITE)]}, RED, BLUE),
    "png, moving": ("png", palette(), {"save_all": True, "append_images": [halves("RGB", WHITE, WHITE)]}, RED, BLUE),
}


@pytest.mark.parametrize("case", COLOURS)
def test_every_mode_has_its_colours(tmp_path, case):
    ending, image, options, left, right = COLOURS[case]
    path = tmp_path / f"a.{ending}"
    image.save(path, **options)
    found = picture.read(path)
    assert (found.mode, found.size) == ("RGB", (16, 8))
    for x, want in ((2, left), (13, right)):
        assert np.abs(np.subtract(found.getpixel((x, 4)), want)).max() <= (8 if ending == "jpg" else 0), case
    trained = data.fitted(path, 128).add(1).mul(127.5)  # the reader of training is the same
    for x, want in ((4, left), (187, right)):
        got = trained[:, 48, x].tolist()
        assert np.abs(np.subtract(got, want)).max() <= (8 if ending == "jpg" else 0.5), case


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, ending, orientation):
    image, exif = Image.new("RGB", (96, 32), BLUE), Image.Exif()
    image.paste(RED, (0, 0, 32, 16))
    exif[picture.ORIENTATION] = orientation
    image.save(tmp_path / f"a.{ending}", exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(tmp_path / f"a.{ending}") as stored:
        want = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(np.asarray(picture.read(tmp_path / f"a.{ending}")), want)
    height, width = want.shape[:2]
    assert (width, height) == ((96, 32) if orientation < 5 else (32, 96))
    trained = data.fitted(tmp_path / f"a.{ending}", 128)
    assert tuple(trained.shape) == (3, *((96, 192) if width > height else (160, 96)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_beside_a_good_picture(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01")
    assert picture.read(tmp_path / "a.jpg").getpixel((4, 4))[0] > 250


def test_the_middle_is_what_scaling_and_cropping_gives(tmp_path):
    """Smooth pictures of many shapes, within the two of 255 that the order of passes makes."""
    rng = np.random.default_rng(0)
    for _ in range(25):
        w, h = (int(n) for n in rng.integers(2, 500, 2))
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        image = small.resize((w, h), Image.Resampling.BICUBIC)
        image.save(tmp_path / "a.png")
        width, height = (int(n) for n in rng.integers(8, 300, 2))
        scale = max(width / w, height / h)
        size = max(width, round(w * scale)), max(height, round(h * scale))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        whole = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
        found = picture.fitted(tmp_path / "a.png", lambda *_, size=(width, height): size)
        assert np.abs(np.subtract(whole, found, dtype=np.int32)).max() <= 2, (w, h, width, height)


# ---- what is refused ----


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "TGA", "PCX", "EPS", "JPEG2000", "DDS"])
def test_other_formats_are_not_opened_whatever_their_name(tmp_path, format):
    """EPS starts Ghostscript; each of the others is another decoder for strangers' files."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", format)
    want = "a.png: it cannot be read as a picture (neither PNG, JPEG, WebP, BMP nor GIF is in it). Save it again as PNG"
    for read in (picture.read, picture.info, lambda p: data.fitted(p, 64)):
        with pytest.raises(ValueError) as e:
            read(tmp_path / "a.png")
        assert str(e.value).startswith(want)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif"])
def test_cut_short_and_damaged_files(tmp_path, ending):
    """Whatever is wrong with a file: its picture, or one sentence with its name."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    path, rng = tmp_path / f"whole.{ending}", random.Random(0)
    Image.fromarray(noise).save(path)
    whole, bad = path.read_bytes(), tmp_path / f"bad.{ending}"
    bad.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(
        ValueError, match=rf"^bad.{ending}: it cannot be read as a picture \(the file is damaged or cut"
    ):
        picture.read(bad)
    for _ in range(150):
        written = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            written[int(len(written) * rng.random() ** 3)] = rng.randrange(256)  # headers more often
        bad.write_bytes(bytes(written[: rng.choice([len(whole), rng.randrange(len(whole))])]))
        try:
            assert picture.read(bad).mode == "RGB" and data.fitted(bad, 64).shape[0] == 3
        except ValueError as e:
            assert str(e).startswith(f"bad.{ending}: ") and "\n" not in str(e)


def test_no_file_a_pipe_and_one_that_may_not_be_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^away.png: there is no such file$"):
        picture.read(tmp_path / "away.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"^pipe.png: there is no such file$"):
        picture.read(tmp_path / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a\nb\udcff.png")
    assert picture.read(tmp_path / "a\nb\udcff.png").size == (8, 8)

    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", "/home/someone/a.png")

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(ValueError) as e:
        picture.read(tmp_path / "a\nb\udcff.png")
    want = r"a\nb\udcff.png: it cannot be read as a picture (Permission denied). Save it again as PNG or JPEG"
    assert str(e.value) == want
    monkeypatch.setattr(picture, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="it is larger than 0 MiB"):
        picture.read(tmp_path / "a\nb\udcff.png")


def test_there_is_one_reader():
    """Nothing else in the pack opens a picture, and nothing changes what the library refuses."""
    for home in project_files():
        if home.suffix != ".py" or home.parts[0] == "tests" or home == Path("reading/picture.py"):
            continue
        for found in ast.walk(ast.parse((ROOT / home).read_text(encoding="utf-8"))):
            if isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name):
                assert (found.value.id, found.attr) != ("Image", "open"), home
                assert found.attr not in ("MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"), home


def test_values_are_exact(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    found = torch.from_numpy(np.array(picture.read(tmp_path / "a.png")))[..., 0].flatten()
    assert found.tolist() == list(range(256))
