"""A smaller UNet: cheaper self-attentions and convolutions, with the price of each."""

from __future__ import annotations

from comfy_api.latest import io

from ..slim.choose import AS_IT_IS, Wish
from ..slim.operations import ATTENTIONS, CONVOLUTIONS
from .bridge import slim

STEPS = 3


class NibbleSlimUNet(io.ComfyNode):
    """Slims a UNet and says what it saves and costs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSlimUNet",
            display_name="Slim UNet (Nibble)",
            category="Nibble/quantize",
            description="Makes a UNet (SD 1.5, SD 2, SDXL) compute less: self-attention with fewer keys or none where "
            "resolution is high, 3x3 convolutions in cheaper parts. Works on 4-bit models. The report shows what each "
            "block saves and how far its answer moves.",
            search_aliases=["faster", "prune", "MobileDiffusion", "low rank convolution", "skip attention", "ToMe",
                            "lightweight", "phone"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet, 4-bit or not. It is not changed; put LoRAs before this node."),
                io.Conditioning.Input(
                    "positive", tooltip="What the price is measured with: prompts of the kind you draw. Several: "
                    "Conditioning (Combine).",
                ),
                io.Latent.Input("latent", tooltip="The size you draw in: FLOPs and the price depend on it."),
                io.Float.Input(
                    "strength", default=0.5, min=0.0, max=0.95, step=0.05,
                    tooltip="Share of the FLOPs to save in each chosen layer (keys, for pool). 0: nothing is changed. "
                    "skip and relu have no degrees.",
                ),
                io.Combo.Input(
                    "attention", options=[AS_IT_IS, *ATTENTIONS], default="pool",
                    tooltip="Self-attention: pool averages keys and values over neighbours; skip leaves it out; relu "
                    "replaces softmax, which only trained models bear.",
                ),
                io.Int.Input(
                    "attention_levels", default=1, min=0, max=8,
                    tooltip="At how many of the highest resolutions that have self-attention.",
                ),
                io.Combo.Input(
                    "convolutions", options=[AS_IT_IS, *CONVOLUTIONS], default=AS_IT_IS,
                    tooltip="3x3 convolutions: low rank makes a 3x1 and a 1x3 through fewer channels; separable a few "
                    "filters of each channel, then a 1x1.",
                ),
                io.Int.Input(
                    "conv_levels", default=1, min=0, max=8,
                    tooltip="At how many of the lowest resolutions, where most weights are.",
                ),
                io.String.Input(
                    "blocks", default="", multiline=True, dynamic_prompts=False,
                    tooltip="For single blocks, one a line, instead of the above: input 1: skip, low rank. "
                    "output 3: as it is. The report names the blocks.",
                ),
                io.Int.Input(
                    "noise_levels", default=STEPS, min=1, max=20, advanced=True,
                    tooltip="At how many noise levels the price is measured. More: slower, and closer.",
                ),
            ],
            outputs=[
                io.Model.Output("model_slim", display_name="MODEL", tooltip="The slimmed model: an ordinary MODEL."),
                io.String.Output(
                    "report", display_name="report",
                    tooltip="Markdown: each block, FLOPs and weights saved, and the error it brings.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, latent, noise_levels=STEPS, **wanted) -> io.NodeOutput:
        inputs = slim.Inputs(tuple([entry] for entry in positive), latent["samples"], noise_levels)
        return io.NodeOutput(*slim.slim(model, Wish(**wanted), inputs, cls.hidden.unique_id))


NODES = [NibbleSlimUNet]
