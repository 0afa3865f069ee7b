"""Images as prompts: IP-Adapter in its variants, and Uni-ControlNet's global tokens."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from .. import demo
from ..image_prompt import describe
from ..image_prompt.attention import BLOCKS
from . import files
from .bridge import image_prompt

Adapter = io.Custom("NIBBLE_IPADAPTER")
FOLDER = "ipadapter"
GLOBAL_FOLDER = "controlnet"
PART = dict(min=0.0, max=1.0, step=0.001)
IMAGES = "One or more pictures. Each is scaled so that its short side fits CLIP, and cut to its middle square."


class NibbleLoadIPAdapter(io.ComfyNode):
    """An IP-Adapter file of any variant, and what it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoadIPAdapter",
            display_name="Load IP-Adapter (Nibble)",
            category="Nibble/loaders",
            description="Loads an IP-Adapter and says which model, which CLIP_VISION and how many tokens go with it. "
            "Plain, plus, plus-face, full-face, MLP and LoRA variants for SD1.5 and SDXL are recognised from the file.",
            search_aliases=[
                "ip adapter",
                "ipadapter",
                "image prompt",
                "style reference",
                "plus face",
                "load ipadapter",
            ],
            inputs=[
                io.Combo.Input(
                    "ipadapter_name",
                    options=files.names(FOLDER),
                    tooltip="A safetensors file in models/ipadapter, or one of the demo model's. A .bin file may run "
                    "code and is not read: take the .safetensors of the same name.",
                ),
            ],
            outputs=[
                Adapter.Output("ipadapter", display_name="IPADAPTER", tooltip="Connect it to Apply IP-Adapter."),
                io.String.Output(
                    "report", display_name="report", tooltip="Variant, model class, CLIP_VISION, tokens, parameters."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ipadapter_name=""):
        return files.fingerprint(FOLDER, ipadapter_name)

    @classmethod
    def execute(cls, ipadapter_name) -> io.NodeOutput:
        found = image_prompt.adapter(files.path(FOLDER, ipadapter_name))
        return io.NodeOutput(found, describe(found))


class NibbleApplyIPAdapter(io.ComfyNode):
    """A picture beside the text prompt."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleApplyIPAdapter",
            display_name="Apply IP-Adapter (Nibble)",
            category="Nibble/conditioning",
            description="Draws what a picture shows, beside the text prompt. Works on 4-bit and other models with "
            "cross-attention, in every block, the middle one included. Use it twice for two adapters: they add up.",
            search_aliases=[
                "ip adapter",
                "ipadapter",
                "image prompt",
                "style transfer",
                "reference image",
                "composition",
                "variation",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to change: SD1.5, SDXL and such."),
                Adapter.Input("ipadapter", tooltip="From Load IP-Adapter, made for this model class."),
                io.ClipVision.Input("clip_vision", tooltip="The CLIP vision tower that the adapter's report names."),
                io.Image.Input("image", tooltip=IMAGES),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.01,
                    tooltip="How strongly the picture counts. 1 for a picture alone, about 0.5 beside a text prompt; 0 "
                    "leaves the model as it is.",
                ),
                io.Float.Input("start_percent", default=0.0, **PART, tooltip="Where in sampling it begins."),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    **PART,
                    tooltip="Where in sampling it ends. Below 1: text does the details.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=list(BLOCKS),
                    default=BLOCKS[0],
                    tooltip="style: only the blocks that carry style. composition: only those that carry layout. Clear "
                    "on SDXL, weaker elsewhere.",
                ),
                io.Combo.Input(
                    "combine",
                    options=image_prompt.COMBINE,
                    default=image_prompt.COMBINE[0],
                    tooltip="Several pictures: concatenate shows the model all of them, average shows it one mixture.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the image counts: white there, black not."),
            ],
            outputs=[io.Model.Output("model_out", display_name="MODEL", tooltip="The model with the image prompt.")],
        )

    @classmethod
    def execute(cls, model, ipadapter, clip_vision, image, mask=None, **how) -> io.NodeOutput:
        how["start"], how["end"] = how.pop("start_percent"), how.pop("end_percent")
        return io.NodeOutput(image_prompt.apply(model, ipadapter, clip_vision, image, image_prompt.How(**how), mask))


class NibbleUniControlGlobal(io.ComfyNode):
    """A picture as four more words."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleUniControlGlobal",
            display_name="Uni-ControlNet Global (Nibble)",
            category="Nibble/conditioning",
            description="Uni-ControlNet's global condition: a picture becomes four tokens after the text of both "
            "prompts. Changes no weights, so it works on every model of the text encoder it was trained with (SD1.5).",
            search_aliases=[
                "uni-controlnet",
                "unicontrol",
                "global adapter",
                "image prompt",
                "content",
                "reference image",
            ],
            inputs=[
                io.Conditioning.Input("positive", tooltip="Gets the tokens of the picture."),
                io.Conditioning.Input("negative", tooltip="Gets the tokens of no picture, so that both stay as long."),
                io.ClipVision.Input("clip_vision", tooltip="CLIP ViT-L/14 for the published file."),
                io.Image.Input("image", tooltip=IMAGES + " Several pictures give four tokens each."),
                io.Combo.Input(
                    "adapter_name",
                    options=files.names(GLOBAL_FOLDER),
                    tooltip="A safetensors file in models/controlnet with Uni-ControlNet's global_adapter. The "
                    "published .ckpt may run code and is not read; the help page says how to convert it.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="The paper's lambda, a factor on the tokens. At 0 they are empty but still draw some "
                    "attention from the text: bypass the node to do without.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive_out", display_name="positive", tooltip="Text and the picture's tokens."
                ),
                io.Conditioning.Output(
                    "negative_out", display_name="negative", tooltip="Text and the tokens of no picture."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name="", **_):
        return files.fingerprint(GLOBAL_FOLDER, adapter_name)

    @classmethod
    def execute(cls, positive, negative, clip_vision, image, adapter_name, strength) -> io.NodeOutput:
        path = files.path(GLOBAL_FOLDER, adapter_name)
        return io.NodeOutput(*image_prompt.append_tokens(positive, negative, clip_vision, image, path, strength))


# Packs agree on this folder key; whoever comes first makes it. The demo model's files come after the user's own.
folder_paths.folder_names_and_paths.setdefault(FOLDER, ([], set(folder_paths.supported_pt_extensions)))
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
folder_paths.add_model_folder_path(FOLDER, str(demo.IP_ADAPTERS["plain"].parent))

NODES = [NibbleLoadIPAdapter, NibbleApplyIPAdapter, NibbleUniControlGlobal]
