"""Fewer steps and better 4-bit weights, trained inside a workflow: LoftQ, distillation, refinement."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.recipes import DISTILL, LOFTQ, REFINE, WAYS, Distill, LoftQ, Refine
from .bridge import distill, outputs, refine
from .calibrate import as_image

PROMPTS = dict(multiline=True, default="", dynamic_prompts=False)
FILE_OUT = "The saved LoRA, below output/. Every LoRA loader lists it after a refresh."


def _conditions() -> list:
    """The inputs that say what is drawn, the same on every node here."""
    return [
        io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts below."),
        io.String.Input("prompts", optional=True, **PROMPTS, tooltip="One prompt a line, of the kind you draw. With "
                        "pictures in latent: the caption of each, in their order."),
        io.String.Input("negative", optional=True, default="", dynamic_prompts=False, tooltip="Negative prompt of the "
                        "teacher's guidance. Usually empty."),
        io.Conditioning.Input("positive", optional=True, tooltip="Instead of CLIP and prompts: each entry is a prompt "
                              "(Conditioning (Combine), or Calibration Prompts through CLIP)."),
        io.Conditioning.Input("negative_cond", optional=True, tooltip="Goes with positive."),
    ]  # fmt: skip


class NibbleLoftQ(io.ComfyNode):
    """A 16-bit MODEL in; a 4-bit MODEL and a LoRA beside it, whose sum is closest, out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoftQ",
            display_name="4-bit Base with LoRA, LoftQ (Nibble)",
            category="Nibble/quantize",
            description="Makes a 4-bit model and a LoRA together, so that their sum is as close to the original as it "
            "gets (LoftQ). Better than 4 bits alone, and a good first value for training. Needs no data and takes "
            "seconds to minutes. The LoRA is saved under output/loras.",
            search_aliases=["loftq", "lora init", "quantize", "4bit", "low rank", "start for training"],
            inputs=[
                io.Model.Input("model", tooltip="The model in 16 bits (or fp8). LoRAs applied to it are baked in. It "
                               "is not changed."),
                io.Int.Input("rank", default=LOFTQ.rank, min=1, max=256,
                             tooltip="Rank of the LoRA. Higher is closer and "
                             "bigger."),
                io.Int.Input("base_rank", default=LOFTQ.base_rank, min=0, max=256, step=16,
                             tooltip="Rank of the 16-bit branch that "
                             "the 4-bit model has by itself."),
                io.Int.Input("rounds", default=LOFTQ.rounds, min=1, max=50,
                             tooltip="Rounds of quantizing what the LoRA "
                             "leaves and fitting the LoRA to what quantizing missed. The error never rises; 5 are "
                             "enough."),
                io.String.Input("name", default="loras/loftq", tooltip="LoRA file under output/, numbered. Keep it in "
                                "loras/, where the LoRA loaders look."),
            ],
            outputs=[
                io.Model.Output("model_4bit", display_name="4-bit MODEL", tooltip="The base without the LoRA: save it, "
                                "or train on it."),
                io.Model.Output("with_lora", display_name="MODEL with LoRA", tooltip="Base and LoRA together: draw "
                                "with it."),
                io.String.Output("lora_name", display_name="LoRA file", tooltip=FILE_OUT),
                io.String.Output("report", display_name="report", tooltip="Markdown: every layer's weight error in 4 "
                                 "bits, with the SVD of the residual, and by LoftQ."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, rank, base_rank, rounds, name) -> io.NodeOutput:
        out = outputs.new(name)
        found = refine.loftq(model, LoftQ(rank, base_rank, rounds), out, cls.hidden.unique_id)
        base, both, report = found
        return io.NodeOutput(base, both, outputs.name_of(out), report)


class NibbleDistill(io.ComfyNode):
    """A MODEL in, the MODEL with a LoRA that needs few steps out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleDistill",
            display_name="Distill to Few Steps (Nibble)",
            category="Nibble/train",
            description="Trains a LoRA with which a model draws in 1 to 8 steps, on a 4-bit model or any other. Six "
            "ways: lcm (LCM-LoRA), lcf (from your pictures, no teacher), phased (Euler, without new noise), reflow, "
            "one_step and progressive. Learns from the model itself, or from a 16-bit teacher. Queue again after an "
            "interrupt and it goes on.",
            search_aliases=["lcm", "turbo", "lightning", "fewer steps", "few steps", "speed up", "consistency",
                            "reflow", "instaflow", "rectified flow", "progressive distillation", "one step"],
            inputs=[
                io.Model.Input("model", tooltip="The model to make faster: 4-bit, 8-bit or 16-bit. It is not changed."),
                io.Model.Input("teacher", optional=True, tooltip="Who it learns from, the same model in 16 bits. "
                               "Nothing connected: the model itself, which takes no memory of its own."),
                io.Latent.Input("latent", tooltip="Empty Latent Image: the size, and the teacher draws what is learned "
                                "from. VAE Encode: your own pictures (needed for lcf)."),
                io.Combo.Input("way", options=list(WAYS), default=DISTILL.way, tooltip=" ".join(
                    f"{way}: {summary}." for way, summary in WAYS.items())),
                io.Int.Input("updates", default=DISTILL.updates, min=1, max=1_000_000,
                             tooltip="Updates of the LoRA. A few hundred "
                             "show an effect, thousands are usual for big models."),
                io.Int.Input("batch", default=DISTILL.batch, min=1, max=256,
                             tooltip="Pictures looked at in one update."),
                io.Int.Input("rank", default=DISTILL.rank, min=1, max=256,
                             tooltip="Rank of the LoRA; 64 is usual for LCM on big "
                             "models."),
                io.Float.Input("learning_rate", default=DISTILL.rate, min=1e-7, max=1.0, step=1e-6, round=False,
                               tooltip="1e-4 suits most models; the demo model wants 1e-3, and 3e-3 for lcf."),
                io.Float.Input("cfg", default=DISTILL.cfg, min=1.0, max=30.0, step=0.1,
                               tooltip="Guidance of the teacher, as "
                               "you sample it. The result is sampled at cfg 1: guidance is built in."),
                io.Int.Input("steps", default=DISTILL.steps, min=1, max=64,
                             tooltip="Steps that are aimed at: the phases of "
                             "phased, what progressive halves down to, and what the report measures."),
                io.Int.Input("seed", default=DISTILL.seed, min=0, max=2**32 - 1, control_after_generate=False,
                             tooltip="Noise, order and first values. Same seed, same LoRA."),
                io.String.Input("name", default="loras/few-steps", tooltip="File under output/, numbered. Keep it in "
                                "loras/, where the LoRA loaders look."),
                io.Int.Input("start", default=DISTILL.start, min=2, max=1024, advanced=True,
                             tooltip="progressive only: steps of "
                             "the first teacher. Halving must lead to steps: 16, 8, 4."),
                io.Int.Input("pairs", default=DISTILL.pairs, min=1, max=1_000_000, advanced=True,
                             tooltip="How many pictures the "
                             "teacher draws to learn from. With your own pictures lcm, phased and progressive "
                             "have it draw four, to measure on; lcf none."),
                io.Int.Input("teacher_steps", default=DISTILL.teacher_steps, min=1, max=1000, advanced=True,
                             tooltip="Steps of each of "
                             "those."),
                *_conditions(),
            ],
            outputs=[
                io.Model.Output("distilled", display_name="MODEL", tooltip="The model with the LoRA at strength 1."),
                io.String.Output("lora_name", display_name="LoRA file", tooltip=FILE_OUT),
                io.String.Output("report", display_name="report", tooltip="Markdown: how to sample it, and how far its "
                                 "few steps are from the teacher's before and after."),
                io.Image.Output("chart", display_name="chart", tooltip="The loss of every update as a picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, latent, way, updates, batch, rank, learning_rate, cfg, steps, seed, name, start, pairs,
                teacher_steps, teacher=None, clip=None, prompts="", negative="", positive=None,
                negative_cond=None) -> io.NodeOutput:  # fmt: skip
        row = Distill(way, updates, batch, rank, learning_rate, cfg, steps, start, pairs, teacher_steps, seed)
        inputs = distill.given(latent["samples"], clip, prompts, negative, positive, negative_cond)
        out = outputs.new(name)
        trained, report, chart = distill.distill((model, teacher), inputs, row, out, cls.hidden.unique_id)
        return io.NodeOutput(trained, outputs.name_of(out), report, as_image(chart))


class NibbleRefine(io.ComfyNode):
    """A 4-bit MODEL and its 16-bit teacher in, a better 4-bit MODEL out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleRefine",
            display_name="Refine 4-bit Model (Nibble)",
            category="Nibble/quantize",
            description="Brings a 4-bit model closer to its 16-bit original: its scales and low-rank factors are tuned "
            "against it on the original's own trajectories, without data. The 4-bit codes stay as they are, and so "
            "does the size. Save the result with Save Model (Nibble).",
            search_aliases=["refine", "finetune quantization", "efficientdm", "qat", "improve 4bit", "better quality",
                            "tune scales"],
            inputs=[
                io.Model.Input("model", tooltip="The 4-bit model, without LoRAs. It is not changed."),
                io.Model.Input("teacher", tooltip="The same model in 16 bits. It is asked first, and not needed "
                               "afterwards: the two are never needed on the GPU at once."),
                io.Latent.Input("latent", tooltip="Gives the size to sample at: an Empty Latent Image of your usual "
                                "size."),
                io.Int.Input("updates", default=REFINE.updates, min=1, max=100_000,
                             tooltip="Updates; a few hundred are "
                             "enough, more where the prompts are many."),
                io.Int.Input("batch", default=REFINE.batch, min=1, max=256, tooltip="States looked at in one update."),
                io.Float.Input("learning_rate", default=REFINE.rate, min=1e-7, max=1.0, step=1e-5, round=False,
                               tooltip="As a share of each value's usual size. 1e-3 is faster, more makes the "
                               "error rise."),
                io.Int.Input("stops", default=REFINE.stops, min=1, max=100,
                             tooltip="Noise levels of each prompt that the two "
                             "are compared at."),
                io.Float.Input("cfg", default=REFINE.cfg, min=1.0, max=30.0, step=0.1,
                               tooltip="As you sample the model: 1 "
                               "for distilled ones."),
                io.Int.Input("seed", default=REFINE.seed, min=0, max=2**32 - 1, control_after_generate=False,
                             tooltip="Noise and order. Same seed, same file."),
                *_conditions(),
            ],
            outputs=[
                io.Model.Output("refined", display_name="4-bit MODEL", tooltip="The better 4-bit model: an ordinary "
                                "MODEL."),
                io.String.Output("report", display_name="report", tooltip="Markdown: error of its output on prompts "
                                 "that were held out, before and after."),
                io.Image.Output("chart", display_name="chart", tooltip="The error of every update as a picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, teacher, latent, updates, batch, learning_rate, stops, cfg, seed, clip=None, prompts="",
                negative="", positive=None, negative_cond=None) -> io.NodeOutput:  # fmt: skip
        row = Refine(updates, batch, learning_rate, stops, cfg, seed)
        inputs = distill.given(latent["samples"], clip, prompts, negative, positive, negative_cond)
        refined, report, chart = refine.refine((model, teacher), inputs, row, cls.hidden.unique_id)
        return io.NodeOutput(refined, report, as_image(chart))


NODES = [NibbleLoftQ, NibbleDistill, NibbleRefine]
