"""``nibble generate``: pictures from prompts, on the demo model or a diffusers folder, in 4 or 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import demo as shipped
from ..lora.apply import apply
from ..lora.read import read_file
from ..prompts import domain, expand
from ..writing import whole
from ..writing.room import check_room
from . import pipeline, sheet


def generate(args, steps: int, on_step: Callable[[], None], say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Writes one PNG per prompt with the seed in its name; returns their paths. ``args``: the command line's. ``say``
    hears about LoRAs of which a part is not applied.
    """
    check_room(args.out / "nibble.png", 0)
    is_demo = args.model is None
    pipe = pipeline.load_pipeline(shipped.MODEL if is_demo else args.model)
    if args.quantized is not None:
        pipeline.install_file(pipe, args.quantized)
    elif args.precision == "4-bit":
        pipeline.quantize(pipe, args.rank)
    loras = [split_strength(text) for text in args.lora]
    if args.lcm:
        pipeline.use_few_steps(pipe)
        if is_demo:
            loras.append((shipped.LORAS["lcm"], 1.0))
    for path, strength in loras:
        report = apply(pipeline.denoiser(pipe), read_file(path), strength)
        if not report.applied:
            raise ValueError(f"{path.name}: no layer of this model is in it ({report.summary()})")
        if not report.whole:
            say(f"{path.name}: {report.summary()}")
    prompts = args.prompt
    if args.domain:
        template = domain.load(args.domain)
        prompts = [expand.expand(template, p, args.seed + i) for i, p in enumerate(prompts)]
    cfg = args.cfg if args.cfg is not None else (1.0 if args.lcm else 3.0)
    pictures = pipeline.sample(pipe, prompts, steps, cfg, args.seed, on_step=on_step)
    return [_save(picture, args.out, args.seed + i) for i, picture in enumerate(pictures)]


def split_strength(text: str) -> tuple[Path, float]:
    """'file.safetensors:0.8' -> (file, 0.8); the strength may be left out. A PEFT adapter's folder is a file, too.
    Raises ValueError for a missing file.
    """
    name, colon, number = text.rpartition(":")
    if colon and _is_number(number):
        path, strength = Path(name), float(number)
    else:
        path, strength = Path(text), 1.0
    if not path.exists():
        raise ValueError(f"{path.name}: there is no such LoRA file")
    return path, strength


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _save(picture, folder: Path, seed: int) -> Path:
    number = 0
    while (path := folder / f"nibble_{seed}_{number:03}.png").exists():
        number += 1
    whole.picture(path, sheet.to_image(picture))
    return path
