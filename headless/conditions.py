"""What a picture is drawn from besides words: another picture, a mask, a ControlNet, an IP-Adapter. Local folders only;
diffusers' own pipelines do the work, made of the parts of the one that is there.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from .. import demo as shipped
from ..checkpoints import header
from ..checkpoints.errors import CheckpointError
from ..reading import picture
from ..reading.names import shown
from . import few_steps, pipeline

LARGEST, LEAST = 4096, 64  # pixels of a side
REPAINT, REDRAW = 1.0, 0.6  # strength by default: inside a mask, and of a whole picture
FULL = 0.02  # relative difference of two shapes that still counts as one
ENCODERS = ("image_encoder", "models/image_encoder")


@dataclass(frozen=True)
class Wish:
    """What a person gave; `check` says what does not go together. ``strength`` None: as it is usual."""

    width: int | None = None
    height: int | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    controlnet: Path | None = None
    control: Path | None = None
    control_strength: float = 1.0
    ip_adapter: Path | None = None
    ip_picture: Path | None = None
    ip_strength: float = 1.0

    def check(self) -> None:
        """Raises ValueError in one sentence, before anything is loaded."""
        problems = (
            (self.mask is not None and self.image is None, "--mask says what of a picture is painted over: give "
             "--image"),
            (self.strength is not None and self.image is None, "--strength goes with --image"),
            ((self.controlnet is None) != (self.control is None), "--controlnet FOLDER and --control PICTURE go "
             "together"),
            ((self.ip_adapter is None) != (self.ip_picture is None), "--ip-adapter FOLDER and --ip-picture PICTURE go "
             "together"),
            (not 0 < self.denoise <= 1, f"--strength {self.strength:g}: give more than 0, at most 1"
             if self.strength is not None else ""),
        )  # fmt: skip
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)

    @property
    def denoise(self) -> float:
        """How much of the noise is started from: all of it without a picture."""
        if self.image is None:
            return 1.0
        usual = REDRAW if self.mask is None else REPAINT
        return usual if self.strength is None else self.strength

    @property
    def pictures(self) -> bool:
        return any(p is not None for p in (self.image, self.control, self.ip_picture))


@dataclass(frozen=True)
class Ready:
    """A pipeline for the task, the size of what it draws, and what its call takes besides words."""

    pipe: object
    size: tuple[int, int]
    more: dict = field(default_factory=dict)


def ready(pipe, wish: Wish, usual: tuple[int, int] | None = None) -> Ready:
    """``pipe`` made fit for ``wish``. ``usual``: the size in pixels where nobody says one, by default the model's own.

    Raises ValueError in one sentence for a size, file or folder that does not fit, and for a pipeline without the task.
    """
    size, more, image = sized(pipe, wish, usual), {}, None
    if wish.image is not None:
        image, size, own = fitted(pipe, wish)
        more |= {"image": image, "strength": wish.denoise}
        if wish.mask is not None:
            more["mask_image"] = mask(wish.mask, size, own)
    if wish.controlnet is not None:
        control = read(wish.control, lambda *_: size)
        net = controlnet(pipe, wish.controlnet)
        pipe = for_task(pipe, wish, controlnet=net)
        name = "control_image" if "control_image" in takes(pipe) else "image"
        more |= {name: control, "controlnet_conditioning_scale": wish.control_strength}
    else:
        pipe = for_task(pipe, wish)
    if wish.ip_adapter is not None:
        ip_adapter(pipe, wish.ip_adapter, wish.ip_strength)
        more["ip_adapter_image"] = read(wish.ip_picture)
    return Ready(pipe, size, more)


def takes(pipe):
    """The arguments of a pipeline's call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def multiple_of(pipe) -> int:
    """What a side in pixels must be divisible by: a latent's pixel; two of them where a transformer packs them."""
    scale = pipeline.scale_of(pipe)
    return scale if getattr(pipe, "unet", None) is not None or scale > 16 else 2 * scale


def sized(pipe, wish: Wish, usual: tuple[int, int] | None = None) -> tuple[int, int]:
    """(width, height) in pixels. Raises ValueError for a side that the model cannot draw."""
    step, side = multiple_of(pipe), pipeline.own_side(pipe)
    for name, value in (("--width", wish.width), ("--height", wish.height)):
        if value is None:
            continue
        if not LEAST <= value <= LARGEST:
            raise ValueError(f"{name} {value}: give {LEAST} to {LARGEST} pixels")
        if value % step:
            below = value // step * step
            raise ValueError(f"{name} {value}: this model wants a multiple of {step}, such as {below or step}")
    width, height = usual or (side, side)
    return wish.width or width, wish.height or height


def fitted(pipe, wish: Wish):
    """(picture, its size, the file's own size): the middle of ``wish.image`` in the size wished for; without one, in
    its own shape, of about as many pixels as the model draws by default.
    """
    step, side, own = multiple_of(pipe), pipeline.own_side(pipe), []

    def size_for(width: int, height: int) -> tuple[int, int]:
        own[:] = [(width, height)]
        wide, high = wish.width, wish.height
        if wide is None and high is None:
            scale = side / (width * height) ** 0.5
            wide, high = _rounded(width * scale, step), _rounded(height * scale, step)
        wide = wide or _rounded(width * high / height, step)
        return wide, high or _rounded(height * wide / width, step)

    sized(pipe, wish)
    image = read(wish.image, size_for)
    return image, image.size, own[0]


def _rounded(value: float, step: int) -> int:
    return min(max(round(value / step) * step, step * -(-LEAST // step)), LARGEST // step * step)


def read(path: Path, size_for: Callable[[int, int], tuple[int, int]] | None = None):
    """A picture in RGB, whole or its middle in a size. Raises ValueError for what is no picture."""
    return picture.read(path) if size_for is None else picture.fitted(path, size_for)


def mask(path: Path, size: tuple[int, int], own: tuple[int, int]):
    """A mask in mode L, white where it is painted, for a picture whose file had ``own`` pixels and now has ``size``."""
    found: list[tuple[int, int]] = []

    def size_for(width: int, height: int) -> tuple[int, int]:
        found.append((width, height))
        return size

    image = read(path, size_for).convert("L")
    (w, h), (width, height) = found[0], own
    if abs(w * height / (h * width) - 1) > FULL:
        raise ValueError(f"{shown(path.name)}: it is {w} x {h} pixels and the picture {width} x {height}. Give a mask "
                         "of the picture's shape")  # fmt: skip
    if np.asarray(image).max() < 128:
        raise ValueError(f"{shown(path.name)}: nothing in it is white, so nothing would be painted. Paint white what "
                         "is to be drawn anew")  # fmt: skip
    return image


def for_task(pipe, wish: Wish, **parts):
    """The pipeline of diffusers for text, a picture or a mask, made of ``pipe``'s parts and ``parts``."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

    task, what = AutoPipelineForText2Image, "text"
    if wish.image is not None:
        task, what = AutoPipelineForImage2Image, "--image"
    if wish.mask is not None:
        task, what = AutoPipelineForInpainting, "--mask"
    if wish.image is None and not parts and "image" not in _needs(pipe):
        return pipe
    try:
        made = task.from_pipe(pipe, **parts)
    except ValueError as e:
        more = f"{what} with --controlnet" if parts and what != "text" else "--controlnet" if parts else what
        raise ValueError(f"{type(pipe).__name__}: diffusers has no form of it for {more}. Leave it out, or use "
                         "ComfyUI") from e  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def _needs(pipe) -> list[str]:
    """The arguments that a pipeline of another task than text cannot do without."""
    named = takes(pipe)
    return ["image"] if "image" in named and ("strength" in named or "mask_image" in named) else []


def controlnet(pipe, folder: Path):
    """The ControlNet in a folder of diffusers' layout, where the pipeline is."""
    import diffusers

    file = folder / "config.json"
    known = pipeline.opened(folder, lambda: json.loads(file.read_bytes())) if file.is_file() else {}
    name = str(known.get("_class_name", "")) if isinstance(known, dict) else ""
    if "ControlNet" not in name or not hasattr(diffusers, name):
        raise CheckpointError(
            folder.name, "not the folder of a ControlNet", "Give one in diffusers' layout, with config.json"
        )
    net = pipeline.opened(folder, lambda: getattr(diffusers, name).from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True))  # fmt: skip
    module = pipeline.denoiser(pipe)
    for key in ("cross_attention_dim", "block_out_channels", "joint_attention_dim"):
        one, two = net.config.get(key), module.config.get(key)
        if one is not None and two is not None and one != two:
            raise CheckpointError(folder.name, f"it is for another model ({key} {one}, this one's is {two})",
                                  "Take a ControlNet of this model's family")  # fmt: skip
    return net.to(module.device, module.dtype)


def ip_adapter(pipe, folder: Path, strength: float) -> None:
    """Puts the IP-Adapter of a folder, or a file, into ``pipe``'s UNet, with its image encoder."""
    if not hasattr(pipe, "load_ip_adapter"):
        raise ValueError(f"{type(pipe).__name__} takes no IP-Adapter in diffusers. Leave --ip-adapter out")
    file, home = adapter_file(folder)
    header.read(file)
    tensors = load_file(file)
    state = {p: {k[len(p) + 1 :]: v for k, v in tensors.items() if k.startswith(p + ".")}
             for p in ("image_proj", "ip_adapter")}  # fmt: skip
    known = state["image_proj"] and any(k.endswith("to_k_ip.weight") for k in state["ip_adapter"])
    if not known:
        raise CheckpointError(file.name, "it holds no IP-Adapter as diffusers reads them",
                              "Take one with image_proj and to_k_ip, or use Apply IP-Adapter in ComfyUI")  # fmt: skip
    if getattr(pipe, "image_encoder", None) is None:
        pipe.register_modules(image_encoder=image_encoder(pipe, home))

    def load() -> None:
        pipe.load_ip_adapter(state, subfolder="", weight_name="")
        pipe.set_ip_adapter_scale(strength)

    pipeline.opened(file, load)


def adapter_file(folder: Path) -> tuple[Path, Path]:
    """(the adapter's file, the folder it is in). Raises CheckpointError where that is not clear."""
    if folder.is_file():
        return folder, folder.parent
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(found) == 1:
        return found[0], folder
    if found:
        names = ", ".join(shown(p.name) for p in found[:4])
        raise CheckpointError(folder.name, f"{len(found)} files are in it ({names})", "Name the one that is meant")
    raise CheckpointError(folder.name, "there is no IP-Adapter in it", "Give a folder with a .safetensors file")


def image_encoder(pipe, home: Path):
    """The image encoder beside an adapter; the demo model's is shipped."""
    from transformers import CLIPVisionModelWithProjection

    places = [home / name for name in ENCODERS] + [home.parent / "image_encoder"]
    if few_steps.of_domain(pipe) == few_steps.DEMO:
        places.append(shipped.VISION)
    place = next((p for p in places if (p / "config.json").is_file()), None)
    if place is None:
        raise CheckpointError(home.name, "there is no image encoder in it", "Put the adapter's own into image_encoder/")
    made = pipeline.opened(place, lambda: CLIPVisionModelWithProjection.from_pretrained(
        str(place), local_files_only=True, use_safetensors=True))  # fmt: skip
    module = pipeline.denoiser(pipe)
    return made.to(module.device, module.dtype)
