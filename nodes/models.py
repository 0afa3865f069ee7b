"""Loading, saving and inspecting 4-bit models."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..checkpoints.inspect import inspect
from ..training.recipes import PRECISIONS
from . import files
from .bridge import demo, load, outputs, save


class NibbleLoadModel(io.ComfyNode):
    """A diffusion model from models/diffusion_models, 4-bit or not, as an ordinary MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoadModel",
            display_name="Load 4-bit Model (Nibble)",
            category="Nibble/loaders",
            description="Loads a 4-bit diffusion model as an ordinary MODEL: stock samplers, LoRA loaders and "
            "ControlNet "
            "work on it. Reads nunchaku, Nunchaku Lite, GGUF and bitsandbytes files too; 16-bit and 8-bit files "
            "load as ComfyUI's own loader would load them.",
            search_aliases=[
                "4bit",
                "int4",
                "svdquant",
                "nunchaku",
                "gguf",
                "nf4",
                "unet",
                "diffusion model",
                "load quantized",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files.model_names("diffusion_models"),
                    tooltip="A safetensors or GGUF file in models/diffusion_models; of a folder, any of its files.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="MODEL", tooltip="An ordinary MODEL; its 4-bit weights stay 4-bit."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name=""):
        return files.fingerprint("diffusion_models", model_name)

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        return io.NodeOutput(load.diffusion_model(files.path("diffusion_models", model_name)))


class NibbleLoadCheckpoint(io.ComfyNode):
    """MODEL, CLIP and VAE from a checkpoint whose diffusion model is 4-bit."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoadCheckpoint",
            display_name="Load 4-bit Checkpoint (Nibble)",
            category="Nibble/loaders",
            description="Loads MODEL, CLIP and VAE from one checkpoint whose diffusion model is 4-bit (or not).",
            search_aliases=["4bit", "int4", "svdquant", "checkpoint", "load quantized", "sdxl", "sd1.5"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name", options=files.names("checkpoints"), tooltip="A safetensors file in models/checkpoints."
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="MODEL", tooltip="The diffusion model; its 4-bit weights stay 4-bit."
                ),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The checkpoint's text encoder."),
                io.Vae.Output("vae", display_name="VAE", tooltip="The checkpoint's autoencoder."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=""):
        return files.fingerprint("checkpoints", ckpt_name)

    @classmethod
    def execute(cls, ckpt_name) -> io.NodeOutput:
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(*load.full_checkpoint(files.path("checkpoints", ckpt_name), embeddings))


class NibbleLoadDemo(io.ComfyNode):
    """The shipped demo model, which draws emoji: nothing to download."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoadDemo",
            display_name="Load Demo Model (Nibble)",
            category="Nibble/loaders",
            description="Loads the small text-to-image model that ships with this pack. It draws emoji of 128 "
            "x 128 pixels "
            "from short captions ('red apple', 'fox'), on a CPU in seconds: for first steps, examples and tests.",
            search_aliases=["example", "tiny model", "test model", "emoji", "first run", "try"],
            inputs=[
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip="4-bit: quantized while loading. 16-bit: as it was trained, to compare with.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=0,
                    max=128,
                    step=16,
                    advanced=True,
                    tooltip="4-bit only: rank of the 16-bit branch beside the 4-bit weights. Higher is "
                    "closer, and bigger.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="MODEL", tooltip="An ordinary MODEL (SD1.5 class, 10.9 million parameters)."
                ),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The demo's text encoder."),
                io.Vae.Output("vae", display_name="VAE", tooltip="The demo's autoencoder (TAESD architecture)."),
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="CLIP_VISION",
                    tooltip="The demo's picture encoder, trained against its text encoder: for picture prompts and "
                    "for CLIP-T and CLIP-I.",
                ),
            ],
        )

    @classmethod
    def execute(cls, precision, rank=16) -> io.NodeOutput:
        return io.NodeOutput(demo.model(precision == "4-bit", rank), demo.clip(), demo.vae(), demo.vision())


class NibbleSaveModel(io.ComfyNode):
    """Writes a MODEL, 4-bit layers as they are, where loaders will list it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSaveModel",
            display_name="Save Model (Nibble)",
            category="Nibble/savers",
            description="Saves a MODEL with its 4-bit layers and applied LoRAs to output/diffusion_models, "
            "where loaders "
            "list it at once. Never overwrites a file.",
            search_aliases=["export", "save quantized", "save 4bit", "bake lora"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to save, 4-bit or not. LoRAs applied to it are saved with it."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/Nibble",
                    tooltip="Name under output/; may hold a folder and %year%-like parts. A number is added.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="file", tooltip="The file's name under output/.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        path = str(outputs.new(filename_prefix))
        save.diffusion_model(model, path, cls.hidden.prompt, cls.hidden.extra_pnginfo)
        name = files.below_output(path)
        return io.NodeOutput(name, ui={"text": [name]})


class NibbleInspect(io.ComfyNode):
    """What a checkpoint is, layer by layer, from its header."""

    FOLDERS = ("diffusion_models", "checkpoints")

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleInspect",
            display_name="Inspect Model File (Nibble)",
            category="Nibble/tools",
            description="Says what a model file is: family, format, and each linear's scheme, rank, bits per "
            "weight and "
            "bytes, or why it is not quantized. Reads the header only.",
            search_aliases=["what is this file", "model info", "checkpoint info", "quantization", "metadata", "layers"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[f"{folder}/{n}" for folder in cls.FOLDERS for n in files.model_names(folder)],
                    tooltip="A safetensors or GGUF file in models/diffusion_models or models/checkpoints.",
                ),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="Markdown; connect Preview as Text to see it."),
                io.String.Output("json", display_name="JSON", tooltip="The same for programs."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file=""):
        return files.fingerprint(*file.split("/", 1)) if "/" in file else "missing"

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        found = inspect(files.listed_path(file, cls.FOLDERS))
        return io.NodeOutput(found.table(), found.to_json(), ui={"text": [found.table()]})


NODES = [NibbleLoadModel, NibbleLoadCheckpoint, NibbleLoadDemo, NibbleSaveModel, NibbleInspect]
