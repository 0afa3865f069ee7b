"""Prompts from data sets that people have as files."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..prompts import sets
from . import files
from .bridge import prompts

ANY = "any"


def chosen(set_id: str, file: str) -> tuple[sets.Format, str]:
    """(the set's row, the file's name below input/)."""
    if set_id not in sets.FORMATS:
        raise ValueError(f"there is no set {set_id[:40]!r}; choose one from the list")
    row = sets.FORMATS[set_id]
    return row, file.strip() or row.usual


def located(row: sets.Format, name: str) -> Path:
    """The file, which must be an ordinary one in the input folder. Raises ValueError saying where it is published."""
    folder = folder_paths.get_input_directory()
    full = os.path.join(folder, name)
    if "\0" in name or not folder_paths.is_within_directory(folder, full) or not os.path.isfile(full):
        raise ValueError(sets.missing(row, name[:200].replace("\0", "")))
    return Path(full)


def drawn(set_id: str, file: str, domain: str, words: str, counts: tuple[int, int], seed: int):
    """(what was drawn, report). Raises ValueError in one sentence."""
    row, name = chosen(set_id, file)
    entries = sets.read(row, located(row, name))
    found = sets.drawn(entries, None if domain == ANY else prompts.find(domain), words, counts, seed)
    return found, sets.report(row, name, found)


class NibblePromptSet(io.ComfyNode):
    """Prompts of a data set, for calibration and for evaluation."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibblePromptSet",
            display_name="Prompt Set (Nibble)",
            category="Nibble/prompts",
            description="Draws prompts from a data set that you have as a file in the input folder: COCO Captions, "
            "MJHQ-30K, sDCI, or your own jsonl, csv or text. One part to calibrate with, another, without a picture in "
            "common, to evaluate with. Downloads nothing.",
            search_aliases=["dataset", "captions", "COCO", "MJHQ", "benchmark prompts", "calibration data", "csv"],
            inputs=[
                io.Combo.Input("set", options=list(sets.FORMATS), default="COCO Captions",
                               tooltip="How the file is written. Run the node without the file: it says where it is."),
                io.String.Input(
                    "file", default="", dynamic_prompts=False,
                    tooltip="Name of the file below input/. Empty: as it is published, such as meta_data.json.",
                ),
                io.Combo.Input(
                    "domain", options=[ANY, *prompts.names()], default=ANY,
                    tooltip="Only captions of this kind of picture: by MJHQ-30K's category where it has one, else by "
                    "words.",
                ),
                io.String.Input(
                    "words", default="", dynamic_prompts=False,
                    tooltip="Only captions with any of these words, with commas between them. Empty: all.",
                ),
                io.Int.Input("calibration_count", default=16, min=0, max=1024, tooltip="How many to calibrate with."),
                io.Int.Input("evaluation_count", default=64, min=0, max=4096, tooltip="How many to evaluate with."),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False,
                             tooltip="Which ones. Same seed and file, same prompts, on any machine."),
            ],
            outputs=[
                io.String.Output("calibration", display_name="calibration",
                                 tooltip="One prompt a line: connect to Calibrate to 4-bit."),
                io.String.Output("evaluation", display_name="evaluation", is_output_list=True,
                                 tooltip="The other prompts as a list: what is connected runs once for each."),
                io.String.Output("evaluation_lines", display_name="evaluation lines",
                                 tooltip="The same in one text, one a line."),
                io.String.Output("report", display_name="report", tooltip="Markdown: what the file held and gave."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, set="", file="", domain=ANY, **_):
        name = file.strip() or (sets.FORMATS[set].usual if set in sets.FORMATS else "")
        return f"{files.input_fingerprint(name)} {'' if domain == ANY else prompts.fingerprint(domain)}"

    @classmethod
    def execute(cls, set, file, domain, words, calibration_count, evaluation_count, seed) -> io.NodeOutput:
        found, told = drawn(set, file, domain, words, (calibration_count, evaluation_count), seed)
        calibration, evaluation = list(found.calibration), list(found.evaluation)
        return io.NodeOutput("\n".join(calibration), evaluation, "\n".join(evaluation), told)


NODES = [NibblePromptSet]
