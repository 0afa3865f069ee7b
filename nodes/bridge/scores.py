"""Scores of a batch or folder of pictures: text and picture similarity, and distances of whole sets."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from server import PromptServer

from ...metrics import features, optional, pairing
from ...metrics.table import Scores, mean
from ...reading import textfile
from ...writing import whole
from . import clip as encoders
from . import outputs, pictures
from .pictures import Pictures

ENOUGH = 2048  # pictures for an Inception FID that others would compare; below, KID is the steadier number
NOTHING = (
    "Score Pictures: there is nothing to score them against. Give prompts with CLIP and CLIP_VISION, or "
    "references with "
    "CLIP_VISION, or folders of features"
)


@dataclass(frozen=True)
class Given:
    """The node's inputs. ``images``, ``references``: IMAGE or None; the folders: choices or 'none'; ``clip_i``: one
    of `pairing.FORMS`.
    """

    images: torch.Tensor | None
    folder: str
    references: torch.Tensor | None
    reference_folder: str
    prompts: str
    clip: object
    vision: object
    image_reward: bool
    node_id: str = ""
    clip_i: str = pairing.AUTO


def run(given: Given) -> tuple[str, str, str]:
    """(markdown, CSV, where the CSV is saved or why not). Raises ValueError when there is nothing to score."""
    result = score(given)
    csv = result.to_csv()
    try:
        path = outputs.new("nibble/scores", ".csv")
        whole.text(path, csv)
    except whole.WriteError as e:
        return result.markdown(), csv, f"The scores are not saved. {e}."
    return result.markdown(), csv, f"Saved as {outputs.name_of(path)}."


def score(given: Given) -> Scores:
    subject = _pictures(given.images, given.folder, "picture", "Score Pictures: connect pictures or choose a folder")
    against = None
    if given.references is not None or given.reference_folder != pictures.NONE:
        against = _pictures(given.references, given.reference_folder, "reference", "")
    prompts = _prompts(given, subject)
    if prompts and given.clip is not None:
        encoders.projecting(given.clip)  # refused now, not after an hour of encoding pictures
    total = sum(len(p) for p in (subject, against) if p is not None and p.features is None and given.vision is not None)
    progress = _Progress(total, given.node_id)
    seen = _features(subject, given.vision, progress)
    wanted = None if against is None else _features(against, given.vision, progress)
    each: dict[str, list[float]] = {}
    overall: dict[str, float] = {}
    notes: list[str] = []
    if prompts and given.clip is not None and given.vision is not None:
        text = encoders.text_features(given.clip, prompts)
        encoders.same_space(given.vision, text)
        each["CLIP-T"] = features.paired_cosine(seen, text).tolist()
    if wanted is not None and seen is not None:
        likeness, said = pairing.clip_i(seen, wanted, (subject.names, against.names), given.clip_i)
        each["CLIP-I"] = likeness.tolist()
        notes.append(said)
        _distances(seen, wanted, overall, notes)
    if given.image_reward:
        _reward(prompts, subject, each, notes)
    if not each and not overall:
        raise ValueError(NOTHING if not notes else notes[0])
    overall = {**{name: mean(v) for name, v in each.items()}, **overall}
    return Scores(subject.names, each, overall, tuple(notes))


def _pictures(batch, folder: str, name: str, missing: str) -> Pictures:
    if (batch is None) == (folder == pictures.NONE):
        raise ValueError(missing or f"Score Pictures: give {name}s as a batch or as a folder, not both")
    return pictures.of_batch(batch, name) if batch is not None else pictures.of_folder(folder)


def _prompts(given: Given, subject: Pictures) -> list[str]:
    """One prompt a picture: from the text, a line each or one for all; else the folder's captions."""
    lines = textfile.lines(given.prompts) or list(subject.captions)
    if lines and len(lines) not in (1, len(subject)):
        raise ValueError(f"{len(lines)} prompts for {len(subject)} pictures: write one line for all, or one for each")
    return lines * len(subject) if len(lines) == 1 else lines


def _features(source: Pictures, vision, progress: _Progress) -> torch.Tensor | None:
    """(n, d), or None when there is no encoder to make them."""
    if source.features is not None:
        return source.features
    if vision is None:
        return None
    out = []
    for picture in source:
        out.append(encoders.picture_features(vision, picture))
        progress.step()
    return torch.cat(out)


def _distances(seen: torch.Tensor, wanted: torch.Tensor, overall: dict, notes: list[str]) -> None:
    """Of the two sets."""
    n, width = min(len(seen), len(wanted)), seen.shape[1]
    if n < 2:
        notes.append("Frechet distance and KID need two pictures or more on each side.")
        return
    overall["Frechet distance"] = features.frechet(seen, wanted)
    overall["KID"], overall["KID deviation"] = features.kernel_distance(seen, wanted)
    if n <= width:
        notes.append(f"The Frechet distance of {n} pictures in {width} dimensions is biased upwards (FID as published "
                     f"takes {ENOUGH} and more): compare only equal numbers of pictures, and trust KID "
                     "first.")  # fmt: skip


def _reward(prompts: list[str], subject: Pictures, each: dict, notes: list[str]) -> None:
    if not prompts or subject.features is not None:
        notes.append("ImageReward is left out: it needs pictures and their prompts.")
        return
    try:
        each["ImageReward"] = optional.image_reward(prompts, (p[0].cpu().numpy() for p in subject))
    except optional.Missing as e:
        notes.append(str(e))


class _Progress:
    """The node's bar and line of text; stops within a picture of Interrupt."""

    def __init__(self, total: int, node_id: str):
        self._done, self._total, self._node = 0, total, node_id
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id or None) if total else None

    def step(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += 1
        self._bar.update(1)
        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node:
            server.send_progress_text(f"{self._done} of {self._total} pictures", self._node)
