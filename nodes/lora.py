"""LoRAs on 4-bit (and any other) models: apply one, apply many, and see what every key of a file does."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from .. import demo
from . import files
from .bridge import lora

Chosen = io.Custom("NIBBLE_LORA")
STRENGTH = dict(default=1.0, min=-100.0, max=100.0, step=0.01)
MOST = 20  # LoRAs of one stack
WHICH = "A safetensors file in models/loras (a PEFT folder by its adapter_model file), or one of the demo model's."
MODEL_STRENGTH = "How strongly the diffusion model changes. 0 leaves it as it is, negative turns the effect round."
CLIP_STRENGTH = "How strongly the text encoder changes. Used only where a CLIP is connected."
MODEL_OUT = "The model with the LoRA; its 4-bit weights are the same ones, not rounded again."
CLIP_OUT = "The CLIP with the LoRA's text encoder part; empty when none is connected."
REPORT_OUT = "What became of every key of the file. Connect Preview as Text to see it."


def _choice(name: str, strength_model: float, strength_clip: float) -> lora.Choice:
    return lora.Choice(name, files.path("loras", name), strength_model, strength_clip)


class NibbleApplyLora(io.ComfyNode):
    """One LoRA on a MODEL and, if connected, a CLIP."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleApplyLora",
            display_name="Apply LoRA (Nibble)",
            category="Nibble/lora",
            description="Applies a LoRA to a 4-bit or any other MODEL and says what became of every key of the file. "
            "Reads kohya, diffusers, PEFT, OneTrainer, LyCORIS and BFL names. ComfyUI's own LoRA loaders work on "
            "4-bit models too; this one reads more files and never does nothing silently.",
            search_aliases=["lora", "load lora", "lora loader", "style", "lycoris", "dora", "peft", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="The model to change; the original stays as it is."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder to change, for LoRAs that have such a part."
                ),
                io.Combo.Input("lora_name", options=files.names("loras"), tooltip=WHICH),
                io.Float.Input("strength_model", **STRENGTH, tooltip=MODEL_STRENGTH),
                io.Float.Input("strength_clip", **STRENGTH, tooltip=CLIP_STRENGTH),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip=MODEL_OUT),
                io.Clip.Output("clip_out", display_name="CLIP", tooltip=CLIP_OUT),
                io.String.Output("report", display_name="report", tooltip=REPORT_OUT),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name="", **_):
        return files.fingerprint("loras", lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, clip=None) -> io.NodeOutput:
        return io.NodeOutput(*lora.apply([_choice(lora_name, strength_model, strength_clip)], model, clip))


class NibbleChooseLora(io.ComfyNode):
    """A LoRA and its strengths, for the stack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleChooseLora",
            display_name="Choose LoRA (Nibble)",
            category="Nibble/lora",
            description="A LoRA and how strongly it is wanted, to connect to a LoRA Stack. Bypass this node to switch "
            "that LoRA off.",
            search_aliases=["lora", "pick lora", "lora for stack"],
            inputs=[
                io.Combo.Input("lora_name", options=files.names("loras"), tooltip=WHICH),
                io.Float.Input("strength_model", **STRENGTH, tooltip=MODEL_STRENGTH),
                io.Float.Input("strength_clip", **STRENGTH, tooltip=CLIP_STRENGTH),
            ],
            outputs=[Chosen.Output("lora", display_name="LoRA", tooltip="Connect it to a LoRA Stack.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name="", **_):
        return files.fingerprint("loras", lora_name)

    @classmethod
    def execute(cls, lora_name, strength_model, strength_clip) -> io.NodeOutput:
        return io.NodeOutput(_choice(lora_name, strength_model, strength_clip))


class NibbleLoraStack(io.ComfyNode):
    """Many LoRAs in one node; the order of the inputs changes nothing."""

    @classmethod
    def define_schema(cls):
        one = Chosen.Input("lora", tooltip="From Choose LoRA. The order of the inputs does not change the result.")
        return io.Schema(
            node_id="NibbleLoraStack",
            display_name="LoRA Stack (Nibble)",
            category="Nibble/lora",
            description="Applies many LoRAs at once. A new input appears when the last one is connected; the order "
            "changes nothing, not even rounding.",
            search_aliases=["lora stack", "multi lora", "several loras", "lora loader", "power lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model to change; the original stays as it is."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder to change, for LoRAs that have such a part."
                ),
                io.Autogrow.Input(
                    "loras",
                    template=io.Autogrow.TemplatePrefix(one, prefix="lora", min=1, max=MOST),
                    tooltip=f"Up to {MOST} LoRAs, each from a Choose LoRA node.",
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip=MODEL_OUT),
                io.Clip.Output("clip_out", display_name="CLIP", tooltip=CLIP_OUT),
                io.String.Output("report", display_name="report", tooltip=REPORT_OUT),
            ],
        )

    @classmethod
    def execute(cls, model, loras: io.Autogrow.Type, clip=None) -> io.NodeOutput:
        chosen = [choice for choice in loras.values() if choice is not None]
        return io.NodeOutput(*lora.apply(chosen, model, clip))


class NibbleLoraReport(io.ComfyNode):
    """What a LoRA file is, and what each of its keys would do here."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoraReport",
            display_name="Inspect LoRA (Nibble)",
            category="Nibble/lora",
            description="Says what a LoRA file is for and what each of its keys would do on the connected "
            "model: applied, "
            "for another part, unknown, of another shape, or broken. Changes nothing.",
            search_aliases=[
                "lora info",
                "lora keys",
                "lora does nothing",
                "lora not working",
                "which model",
                "inspect",
            ],
            inputs=[
                io.Combo.Input("lora_name", options=files.names("loras"), tooltip=WHICH),
                io.Model.Input("model", optional=True, tooltip="The model to match the keys with."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to match the keys with."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip=REPORT_OUT),
                io.String.Output(
                    "json", display_name="JSON", tooltip="Every key with what became of it, for programs."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name="", **_):
        return files.fingerprint("loras", lora_name)

    @classmethod
    def execute(cls, lora_name, model=None, clip=None) -> io.NodeOutput:
        text, values = lora.inspect(lora_name, files.path("loras", lora_name), model, clip)
        return io.NodeOutput(text, values, ui={"text": [text]})


# Stock loaders list the demo model's LoRAs too, after models/loras, so its workflows run with nothing to copy. Nodes
# are only imported by ComfyUI as it loads; nothing else tells a pack that it is there.
folder_paths.add_model_folder_path("loras", str(demo.LORAS["lcm"].parent))

NODES = [NibbleApplyLora, NibbleChooseLora, NibbleLoraStack, NibbleLoraReport]
