"""Quantizing one's own model inside a workflow."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..prompts import calibration
from ..quant.calib import presets
from ..quant.schemes import TARGETS
from . import files
from .bridge import calibrate as bridge
from .bridge import outputs
from .bridge import prompts as domain_prompts

SHIPPED, DOMAIN = "shipped list", "domain: "


def as_image(picture) -> torch.Tensor:
    """PIL -> IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).unsqueeze(0)


class NibbleCalibrate(io.ComfyNode):
    """A 16-bit MODEL in, a 4-bit one out, measured layer by layer."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleCalibrate",
            display_name="Calibrate to 4-bit (Nibble)",
            category="Nibble/quantize",
            description="Quantizes a model to 4 bits while you watch: it samples a few prompts, looks at what "
            "each layer "
            "is fed, and solves every layer for that. The result is an ordinary MODEL, usable at once; save "
            "it with Save "
            "Model (Nibble). LoRAs applied before are baked in. Queue again after an interrupt and it goes on.",
            search_aliases=["quantize", "4bit", "int4", "svdquant", "compress", "smaller model", "less vram", "gptq"],
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, in 16 bits (or fp8). It is not changed."),
                io.Latent.Input(
                    "latent", tooltip="Gives the size to sample at: an Empty Latent Image of your usual size."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(presets.OFFERED),
                    default=presets.DEFAULT,
                    tooltip="data_free: from the weights alone, seconds. fast: calibrated. best: solving takes about "
                    "three times as long, a little closer.",
                ),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default=TARGETS[0],
                    tooltip="svdquant_w4a4 keeps the most quality (this pack loads it). The others are ComfyUI's own "
                    "formats, which load without any pack, and are not calibrated.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=0,
                    max=256,
                    step=16,
                    tooltip="Rank of the 16-bit branch. Higher is closer and bigger.",
                ),
                io.Int.Input(
                    "budget_mib",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Make the diffusion model fit in so many MiB: ranks and 8-bit layers are then "
                    "spent where they "
                    "lower the error most, and rank is ignored. 0: off.",
                ),
                io.Int.Input(
                    "noise_levels",
                    default=8,
                    min=2,
                    max=50,
                    tooltip="Sampling steps per prompt: 8 cover both ends of the noise.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="As you sample the model: 1 for distilled ones.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Noise of the samples and of the solver. Same seed, same file.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts below."),
                io.String.Input(
                    "prompts",
                    optional=True,
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="One prompt a line, 4 to 16 of the kind you draw. Empty: eight from the shipped list.",
                ),
                io.String.Input(
                    "negative",
                    optional=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="Negative prompt of the samples.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Instead of CLIP and prompts: each entry is a prompt (Conditioning (Combine)).",
                ),
                io.Conditioning.Input("negative_cond", optional=True, tooltip="Goes with positive."),
            ],
            outputs=[
                io.Model.Output("model_4bit", display_name="MODEL", tooltip="The 4-bit model: an ordinary MODEL."),
                io.String.Output(
                    "report", display_name="report", tooltip="Markdown: every layer, how it is stored, its error."
                ),
                io.Image.Output("chart", display_name="chart", tooltip="The errors as a picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latent, preset, target, rank, budget_mib, noise_levels, cfg, seed, clip=None, prompts="",
                negative="", positive=None, negative_cond=None) -> io.NodeOutput:  # fmt: skip
        settings = bridge.Settings(preset, target, rank, budget_mib * 2**20, noise_levels, cfg, seed)
        pairs = ()
        if positive is not None:
            pairs = bridge.split(positive, negative_cond)
        elif clip is not None:
            pairs = bridge.encode(clip, calibration.lines(prompts) or calibration.sample(8, seed), negative)
        inputs = bridge.Inputs(pairs, latent["samples"])
        root = outputs.unfinished_root()
        out, _, report, chart = bridge.calibrate(model, inputs, settings, root, cls.hidden.unique_id)
        return io.NodeOutput(out, report, as_image(chart))


class NibbleCalibrationPrompts(io.ComfyNode):
    """Prompts for calibration: a shipped list, a domain's, or lines of a text file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleCalibrationPrompts",
            display_name="Calibration Prompts (Nibble)",
            category="Nibble/quantize",
            description="Prompts to calibrate with, one a line: drawn by seed from a list that ships with this pack, "
            "from a domain, or from a text file in the input folder.",
            search_aliases=["prompt list", "dataset", "captions", "calibration data", "prompts from file"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[SHIPPED, *(DOMAIN + n for n in domain_prompts.names()), *files.input_names((".txt",))],
                    tooltip="The shipped list covers people, places, things and styles; a domain has what one kind "
                    "of picture asks for; or a .txt file in input/, one prompt a line.",
                ),
                io.Int.Input(
                    "count", default=8, min=1, max=1024, tooltip="How many prompts. 8 are enough for most models."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Which ones are drawn.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompts", display_name="prompts", tooltip="One prompt a line: connect to Calibrate to 4-bit."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, source="", **_):
        if source.startswith(DOMAIN):
            return domain_prompts.fingerprint(source.removeprefix(DOMAIN))
        return files.input_fingerprint(source)

    @classmethod
    def execute(cls, source, count, seed) -> io.NodeOutput:
        if source.startswith(DOMAIN):
            found = domain_prompts.many(source.removeprefix(DOMAIN), "", count, seed, "auto", "")
            return io.NodeOutput("\n".join(p.positive for p in found))
        given = None if source == SHIPPED else calibration.read(files.input_file(source))
        return io.NodeOutput("\n".join(calibration.sample(count, seed, given)))


NODES = [NibbleCalibrate, NibbleCalibrationPrompts]
