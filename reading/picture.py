"""Pictures that people have: upright, 8-bit RGB on white, or ValueError in one sentence with the file's name.

Every picture file is read by these rules. What is refused is refused before it is decoded, as far as its header tells.

formats   PNG, JPEG, WebP, BMP and GIF, by what is in the file, whatever its name ends with; of a moving picture the
          first one. No other decoder is started: some of them start other programs.
size      At most 2^26 pixels (8192 x 8192), of the file and of what is made of it, and 512 MiB.
upright   Turned as its EXIF orientation says.
colours   Transparent parts are white. 16 bits are rounded to 8. CMYK becomes RGB as Pillow does it; no colour profile
          is looked at.
scaled    First cut out, then scaled, so that a thin picture takes no more memory than its result.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .names import place

if TYPE_CHECKING:  # Pillow and numpy are loaded with the first picture
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS, MAX_BYTES = 2**26, 2**29
LIMIT = f"{MAX_PIXELS / 1e6:.0f} megapixels"
ORIENTATION = 0x0112  # the EXIF tag
REMEDY = "Save it again as PNG or JPEG"
LANCZOS_SUPPORT = 3  # pixels of the result that it looks at on each side


class PictureError(ValueError):
    """A picture is refused; the text names the file and says why."""


def read(path: Path) -> Image.Image:
    """The picture in a file, in mode RGB."""
    return _decoded(_file(path), path.name, _flat)


def decoded(data: bytes, name: str) -> Image.Image:
    """The picture in ``data``, the content of the file ``name``, in mode RGB."""
    return _decoded(io.BytesIO(data), name, _flat)


def fitted(path: Path, size_for: Callable[[int, int], tuple[int, int]]) -> Image.Image:
    """The middle of a picture in mode RGB, scaled to the (width, height) that ``size_for`` gives for its own."""

    def fit(image: Image.Image) -> Image.Image:
        from PIL import Image

        size = size_for(*image.size)
        _check_size(*size, f"{place(path.name)}: scaled to", "Choose a smaller resolution")
        region, box = _middle(image.size, size)
        return _flat(image.crop(region)).resize(size, Image.Resampling.LANCZOS, box)

    return _decoded(_file(path), path.name, fit)


def info(path: Path) -> dict:
    """The texts that are stored beside a picture, by their keys."""
    return _opened(_file(path), path.name, lambda image: dict(image.info))


def _file(path: Path) -> Path:
    if not path.is_file():  # a pipe would be waited for
        raise PictureError(f"{place(path.name)}: there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise PictureError(f"{place(path.name)}: it is larger than {MAX_BYTES // 2**20} MiB. {REMEDY}")
    return path


def _decoded(source: Path | io.BytesIO, name: str, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    def load(image: Image.Image) -> Image.Image:
        _check_size(*image.size, f"{place(name)}:", "Make it smaller")
        image.load()
        return use(_upright(image))

    return _opened(source, name, load)


def _opened(source: Path | io.BytesIO, name: str, use: Callable):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source, formats=FORMATS) as image:
            return use(image)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise PictureError(f"{place(name)}: more than {LIMIT}, the most that is read. Make it smaller") from e
    except UnidentifiedImageError as e:
        why = "neither PNG, JPEG, WebP, BMP nor GIF is in it"
        raise PictureError(f"{place(name)}: it cannot be read as a picture ({why}). {REMEDY}") from e
    except MemoryError as e:
        raise PictureError(f"{place(name)}: there is not enough memory to read it. Make it smaller") from e
    except Exception as e:  # a damaged file ends a decoder in any error that there is
        why = getattr(e, "strerror", None) or "the file is damaged or cut short"
        raise PictureError(f"{place(name)}: it cannot be read as a picture ({why}). {REMEDY}") from e


def _check_size(width: int, height: int, what: str, remedy: str) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError(f"{what} {width} x {height} pixels, more than {LIMIT}, the most that is read. {remedy}")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import Image

    turns = Image.Transpose
    methods = (turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE, turns.ROTATE_270,
               turns.TRANSVERSE, turns.ROTATE_90)  # fmt: skip
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF beside a good picture says nothing
        turned = 1
    return image.transpose(methods[turned - 2]) if turned in range(2, 9) else image


def _flat(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB, transparent parts white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = _eight_bit(image)
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # 16 bits in the file, and 8 in `image`
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if key is None and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba)
    return flat


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits; Pillow would cut off everything above 255."""
    import numpy as np
    from PIL import Image

    values, key = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(((values.clip(0, 65535).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _middle(have: tuple[int, int], want: tuple[int, int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(whole pixels to cut out, the box in these that fills ``want``): what scaling the whole picture, rounded to whole
    pixels, and cropping its middle gives.
    """
    scale = max(w / h for w, h in zip(want, have, strict=True))
    edges = []
    for size, goal in zip(have, want, strict=True):
        scaled = max(goal, round(size * scale))
        pixel, first = size / scaled, (scaled - goal) // 2  # of the result, in those of the file
        start, end = first * pixel, min(size, (first + goal) * pixel)
        margin = LANCZOS_SUPPORT * max(1.0, pixel) + 1
        low, high = max(0, math.floor(start - margin)), min(size, math.ceil(end + margin))
        edges.append((low, high, start - low, min(end - low, high - low)))
    (left, right, x0, x1), (top, bottom, y0, y1) = edges
    return (left, top, right, bottom), (x0, y0, x1, y1)
