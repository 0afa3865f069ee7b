"""Training inside a workflow, on models of any precision."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from .. import demo
from ..training.recipes import LORA, OPTIMIZERS, SCHEDULES, Lora
from . import files
from .bridge import outputs, pictures
from .bridge import training as bridge
from .calibrate import as_image

INPUT = "input/"
SHIPPED = "demo: 48 emoji in a flat style"


def folders() -> list[str]:
    """The folders below input/, without it, and the shipped one."""
    found = files.encodable(pictures.choices())
    return [*(c.removeprefix(INPUT) for c in found if c.startswith(INPUT)), SHIPPED]


def folder_of(choice: str) -> Path:
    """The folder of a choice. Raises ValueError for one that is not listed."""
    return demo.PICTURES if choice == SHIPPED else pictures.resolve(INPUT + choice)


class NibbleTrainLora(io.ComfyNode):
    """A MODEL and a folder of captioned pictures in, the MODEL with a LoRA trained on them out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleTrainLora",
            display_name="Train LoRA (Nibble)",
            category="Nibble/train",
            description="Trains a LoRA on your own pictures, on a 4-bit model or any other: its weights stay as "
            "they are, so a small GPU is enough. The LoRA is saved under output/loras in names that every loader "
            "reads. Queue again after an interrupt and it goes on where it stopped.",
            search_aliases=["train", "lora training", "finetune", "fine-tune", "dreambooth", "style", "own pictures",
                            "qlora", "teach"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on: 4-bit, 8-bit or 16-bit. It is not changed."),
                io.Clip.Input("clip", tooltip="Encodes the captions. It is not trained."),
                io.Vae.Input("vae", tooltip="Encodes the pictures."),
                io.Combo.Input("folder", options=folders(), tooltip="A folder in input/ with pictures. Each has a "
                               "caption: a .txt of the same name, or a line in a .jsonl or .csv (file_name, "
                               "text). The last entry is a small set for the demo model."),
                io.String.Input("name", default="loras/my-lora", tooltip="File name under output/, numbered. Keep it "
                                "in loras/, where the LoRA loaders look."),
                io.Int.Input("steps", default=LORA.updates, min=1, max=100_000,
                             tooltip="Updates of the LoRA. More pictures "
                             "need more: about 10 to 30 for each picture of a batch of 1."),
                io.Int.Input("batch", default=LORA.batch, min=1, max=256,
                             tooltip="Pictures looked at in one step. More are "
                             "steadier and need more memory."),
                io.Int.Input("rank", default=LORA.rank, min=0, max=256,
                             tooltip="How much the LoRA can hold: 8 for a few dozen "
                             "pictures, 16 to 32 for more. 0: whole matrices instead, a partial fine-tune in a "
                             "large file; galore is made for it."),
                io.Float.Input("learning_rate", default=LORA.rate, min=1e-7, max=1.0, step=1e-6, round=False,
                               tooltip="1e-4 suits most models; the demo model wants 1e-3. Lower it when the loss "
                               "jumps."),
                io.Int.Input("resolution", default=LORA.side, min=64, max=4096, step=32,
                             tooltip="Pictures are scaled to "
                             "about this width times this height, in their own shape: 512 for SD 1.5, 1024 for SDXL "
                             "and newer, 128 for the demo model."),
                io.Int.Input("seed", default=LORA.seed, min=0, max=2**32 - 1, control_after_generate=False,
                             tooltip="Order, noise and first values. Same seed, same LoRA."),
                io.Combo.Input("optimizer", options=list(OPTIMIZERS), default=LORA.optimizer, advanced=True,
                               tooltip="adamw: the usual. adafactor: less memory, wants a rate near 1e-2. galore needs "
                               "pip install pytorch-optimizer."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=LORA.schedule, advanced=True,
                               tooltip="How the rate goes on after its warm-up: falling to nothing, or constant."),
                io.Int.Input("accumulate", default=LORA.accumulate, min=1, max=256, advanced=True,
                             tooltip="Batches to one step: "
                             "like a larger batch, in the memory of a small one."),
                io.Float.Input("caption_dropout", default=LORA.dropout, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="Share of captions left empty, so that the LoRA works with guidance too."),
                io.Float.Input("average", default=LORA.ema, min=0.0, max=0.99999, step=0.001, round=False,
                               advanced=True, tooltip="Keep the moving average of the weights (its decay) instead of "
                               "the last ones. 0: off."),
                io.Float.Input("hold_out", default=LORA.hold_out, min=0.0, max=0.5, step=0.01, advanced=True,
                               tooltip="Share of the pictures that is not trained on, but measured before and after."),
                io.Boolean.Input("checkpointing", default=LORA.checkpointing, advanced=True,
                                 tooltip="Much less memory, about a "
                                 "third slower: blocks are computed again for the backward pass."),
                io.Boolean.Input("compress_frozen", default=LORA.compress, advanced=True,
                                 tooltip="On a quantized model, what "
                                 "it keeps in 16 bits (a UNet's convolutions) is held in 8 bits while training: "
                                 "less memory. No effect on a 16-bit model."),
            ],
            outputs=[
                io.Model.Output("trained", display_name="MODEL", tooltip="The model with the new LoRA at strength 1."),
                io.String.Output("lora_name", display_name="LoRA file", tooltip="The saved file, below output/."),
                io.String.Output("report", display_name="report", tooltip="Markdown: what was trained, and the loss on "
                                 "held-out pictures before and after."),
                io.Image.Output("chart", display_name="chart", tooltip="The loss of every step as a picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder="", **_):
        return pictures.fingerprint(INPUT + folder) if folder and folder != SHIPPED else folder

    @classmethod
    def execute(cls, model, clip, vae, folder, name, steps, batch, rank, learning_rate, resolution, seed, optimizer,
                schedule, accumulate, caption_dropout, average, hold_out, checkpointing,
                compress_frozen) -> io.NodeOutput:  # fmt: skip
        row = Lora(
            steps, batch, rank, learning_rate, resolution, seed, optimizer, schedule, accumulate, caption_dropout,
            average, hold_out, checkpointing, compress_frozen,
        )  # fmt: skip
        out = outputs.new(name)
        trained, report, chart = bridge.train((model, clip, vae), folder_of(folder), row, out, cls.hidden.unique_id)
        return io.NodeOutput(trained, outputs.name_of(out), report, as_image(chart))


NODES = [NibbleTrainLora]
