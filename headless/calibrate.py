"""``nibble quantize --preset fast``: the pipeline draws prompts while its layers are watched, and the 4-bit file is
written in native names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import prod
from pathlib import Path

from torch import Tensor

from ..calibration import run as runs
from ..calibration.resume import Folder
from ..calibration.run import Outcome, Settings, Subject
from ..checkpoints.convert import Options, check_names, model_layers, quantize, side_dtype
from ..checkpoints.errors import CheckpointError
from ..checkpoints.header import BYTES
from ..checkpoints.save import require_free
from ..checkpoints.source import Source
from ..prompts import batch, calibration
from ..prompts import domain as domains
from ..quant.calib.engine import Layer, Watch
from ..writing.room import check_room
from . import pipeline

log = logging.getLogger(__name__)
TOGETHER = 4  # pictures that are drawn at once


def texts(file: Path | None, domain: str | None, count: int, seed: int) -> tuple[str, ...]:
    """``count`` prompts of a text file, of a domain, or of the pack's own list."""
    if domain is not None:
        return tuple(p.positive for p in batch.unique(domains.load(domain), count, seed))
    return tuple(calibration.sample(count, seed, None if file is None else calibration.read(file)))


def pipeline_folder(given: Path, source: Source) -> Path:
    """The diffusers pipeline that ``given`` is or lies in. Raises CheckpointError for a file without one."""
    for folder in (given, given.parent):
        if (folder / "model_index.json").is_file():
            return folder
    remedy = (
        "Give the diffusers pipeline folder, calibrate in ComfyUI (the node Calibrate to 4-bit), or use "
        "--preset data_free"
    )
    raise CheckpointError(source.name, "calibration must run the model, and this is a file without a pipeline", remedy)


def subject_of(source: Source, pipe, prompts: tuple[str, ...], settings: Settings) -> Subject:
    """The pipeline's denoiser with the source's weights."""
    module, (dtype, shrink) = pipeline.denoiser(pipe), side_dtype(source)
    sizes = {**BYTES, **({"F32": 2, "F64": 2} if shrink else {})}

    def sample() -> None:
        for i in range(0, len(prompts), TOGETHER):
            some = list(prompts[i : i + TOGETHER])
            pipeline.sample(pipe, some, settings.levels, settings.cfg, settings.seed + i)

    def weight(layer: str) -> tuple[Tensor, Tensor | None]:
        full = f"{source.prefix}{layer}"
        return source.get(f"{full}.weight"), source.get(f"{full}.bias") if f"{full}.bias" in source.shapes else None

    def place(layer: str) -> str:
        """The diffusers layer whose input a native layer has: fused q, k and v all see what q sees."""
        rule = source.rules.get(f"{layer}.weight")
        return layer if rule is None else rule.sources[0].removesuffix(".weight")

    return Subject(
        family=source.family,
        module=module,
        shapes=model_layers(source.shapes, source.prefix),
        nbytes={n.removeprefix(source.prefix): prod(s) * sizes.get(source.dtypes[n], 8)
                for n, s in source.shapes.items()},
        dtype=dtype,
        weight=weight,
        sample=sample,
        prompts=len(prompts),
        drawn=list(prompts),
        device=str(module.device),
        place=place,
    )  # fmt: skip


def run(
    source: Source,
    subject: Subject,
    settings: Settings,
    out: Path,
    tiled: bool = False,
    say: Callable[[Layer, int, int], None] = lambda *_: None,
) -> Outcome:
    """Calibrates and writes ``out``; the outcome's ``made`` is the conversion. Solved layers are kept beside it until
    then, so a stopped run goes on.
    """
    require_free(out)
    plans = runs.plans_of(subject.shapes, subject.family, settings)
    check_names(source, plans)
    check_room(out, runs.file_bytes(subject, plans))

    def write(layers: dict[str, Layer], about: dict[str, str], store: Folder | None):
        options = Options(rank=settings.rank, seed=settings.seed, tiled=tiled, device=subject.device, plans=plans,
                          solved=layers, kept=_reader(store, out), about=about)  # fmt: skip
        return quantize(source, out, options)

    root = out.with_name(f".{out.name}.solved")
    done = runs.calibrate(subject, settings, root, write, Watch(layer=say), hold=False)
    for note in done.notes:
        log.warning(note)
    return done


def _reader(store: Folder | None, out: Path) -> Callable[[str], Layer]:
    """Reads back solved layers, which are not held in memory."""

    def read(name: str) -> Layer:
        layer = store.read(name)
        if layer is None:
            remedy = "Run it again: it goes on with the layers that can be read"
            raise CheckpointError(out.name, "what was solved of it cannot be read any more", remedy, name)
        return layer

    return read
