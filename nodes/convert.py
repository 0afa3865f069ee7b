"""Rewriting 4-bit files of other packs in ComfyUI's own contract."""

from __future__ import annotations

from comfy_api.latest import io

from . import files
from .bridge import convert, outputs


class NibbleConvert(io.ComfyNode):
    """Any 4-bit file as a file in ComfyUI's per-layer contract, codes unchanged."""

    FOLDERS = ("diffusion_models", "checkpoints")

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleConvert",
            display_name="Convert 4-bit File (Nibble)",
            category="Nibble/tools",
            description="Rewrites a 4-bit file of another pack (nunchaku, Nunchaku Lite, GGUF, bitsandbytes) under "
            "ComfyUI's names and in its per-layer format. The 4-bit codes stay the same, only their order changes.",
            search_aliases=[
                "convert nunchaku",
                "repack",
                "svdq to safetensors",
                "gguf to safetensors",
                "nf4",
                "export",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[f"{folder}/{n}" for folder in cls.FOLDERS for n in files.model_names(folder)],
                    tooltip="A 4-bit safetensors or GGUF file in models/diffusion_models or models/checkpoints.",
                ),
                io.Boolean.Input(
                    "requantize",
                    default=False,
                    tooltip="Make int4 of GGUF, NF4 and nvfp4 layers, data-free: runs faster on Ampere and Ada, and "
                    "loses a little. Off: every layer keeps its codes.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=0,
                    max=256,
                    step=16,
                    advanced=True,
                    tooltip="With requantize: rank of the 16-bit branch beside the 4-bit weights.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/Nibble",
                    tooltip="Name under output/; may hold a folder and %year%-like parts. A number is added.",
                ),
            ],
            outputs=[
                io.String.Output("path", display_name="file", tooltip="The new file's name under output/."),
                io.String.Output("report", display_name="report", tooltip="What became of the layers, and the sizes."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file="", **_):
        return files.fingerprint(*file.split("/", 1)) if "/" in file else "missing"

    @classmethod
    def execute(cls, file, requantize, filename_prefix, rank=32) -> io.NodeOutput:
        source, target = files.listed_path(file, cls.FOLDERS), str(outputs.new(filename_prefix))
        report = convert.run(source, target, requantize, rank, cls.hidden.unique_id)
        name = files.below_output(target)
        return io.NodeOutput(name, report, ui={"text": [f"{name}\n{report}"]})


NODES = [NibbleConvert]
