"""How close pictures are: to a reference, to their prompt, to a set of others."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..metrics.compare import compare
from ..metrics.pairing import AUTO, FORMS
from ..reading.names import shown
from . import files
from .bridge import pictures, scores


class NibbleCompareImages(io.ComfyNode):
    """A picture against the one it should be."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleCompareImages",
            display_name="Compare Pictures (Nibble)",
            category="Nibble/metrics",
            description="Measures how far a picture is from its reference (PSNR, SSIM, LPIPS where it is "
            "installed) and "
            "shows where: heat map, both side by side, and the pair for a slider. For 4-bit against 16-bit of "
            "one seed.",
            search_aliases=["psnr", "ssim", "lpips", "difference", "diff", "quality", "before after", "similarity"],
            inputs=[
                io.Image.Input("reference", tooltip="What it should look like, for example the 16-bit picture."),
                io.Image.Input("candidate", tooltip="The picture to judge, of the same size; a batch is judged one by "
                               "one."),
                io.String.Input("reference_label", default="16-bit", tooltip="Stands above the reference."),
                io.String.Input("candidate_label", default="4-bit", tooltip="Stands above the candidate."),
                io.Float.Input("full_scale", default=0.25, min=0.001, max=1.0, step=0.01, advanced=True,
                               tooltip="The difference (0 to 1) that the heat map draws white."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="A table in markdown, for Preview as Text."),
                io.String.Output("csv", display_name="CSV", tooltip="The same for a spreadsheet."),
                io.Float.Output("psnr", display_name="PSNR", tooltip="Mean peak signal-to-noise ratio in dB; infinite "
                                "for equal pictures."),
                io.Float.Output("ssim", display_name="SSIM", tooltip="Mean structural similarity; 1 for equal "
                "pictures."),
                io.Image.Output("side_by_side", display_name="side by side", tooltip="Reference, candidate, heat map."),
                io.Image.Output("heat_map", display_name="heat map", tooltip="Where they differ: black is equal, white "
                                "is full_scale or more."),
                io.Image.Output("pair", display_name="pair", tooltip="Reference and candidate in turn, for a slider."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, reference, candidate, reference_label, candidate_label, full_scale) -> io.NodeOutput:
        r, c = (t[..., :3].cpu().numpy() for t in (reference, candidate))
        found = compare(r, c, (shown(reference_label), shown(candidate_label)), full_scale)
        beside, heat, pair = (torch.from_numpy(a) for a in (found.beside, found.heat, found.pair))
        report, csv = found.scores.markdown(), found.scores.to_csv()
        seen = {**ui.PreviewImage(beside, cls=cls).as_dict(), "text": [report]}
        return io.NodeOutput(report, csv, found.psnr, found.ssim, beside, heat, pair, ui=seen)


class NibbleScores(io.ComfyNode):
    """Similarity to prompts and references, and distances between sets."""

    @classmethod
    def define_schema(cls):
        folders = files.encodable(pictures.choices())
        return io.Schema(
            node_id="NibbleScores",
            display_name="Score Pictures (Nibble)",
            category="Nibble/metrics",
            description="Scores a batch or folder of pictures: CLIP-T against prompts, CLIP-I, Frechet "
            "distance and KID "
            "against references, ImageReward where it is installed. Refuses encoders whose numbers would mean nothing.",
            search_aliases=["clip score", "fid", "kid", "frechet", "imagereward", "evaluate", "metrics", "aesthetic"],
            inputs=[
                io.Combo.Input("folder", options=folders, tooltip="A folder of pictures, or of features (safetensors), "
                               "below input or output. 'none' to connect pictures instead."),
                io.Combo.Input("reference_folder", options=folders, tooltip="Pictures or features to compare with; "
                               "'none' for none, or to connect them."),
                io.String.Input("prompts", default="", multiline=True, dynamic_prompts=False, tooltip="What the "
                                "pictures should show: one line for all, or a line each. Empty: the folder's "
                                ".txt captions."),
                io.Boolean.Input("image_reward", default=False, advanced=True, tooltip="Also ImageReward, if its "
                                 "package and weights are on this machine; nothing is downloaded."),
                io.Image.Input("images", optional=True, tooltip="Pictures to score, instead of a folder."),
                io.Image.Input("references", optional=True, tooltip="Pictures to compare with, instead of a folder."),
                io.Clip.Input("clip", optional=True, tooltip="A whole CLIP model's text half, for CLIP-T."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="The same CLIP model's picture half."),
                io.Combo.Input("clip_i", options=list(FORMS), default=AUTO, optional=True, advanced=True,
                               tooltip="CLIP-I. paired: each picture with its own reference, in the order of their "
                               "names; as many pictures to each. all pairs: with every reference. auto: paired "
                               "where the counts fit."),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="Markdown, for Preview as Text."),
                io.String.Output("csv", display_name="CSV", tooltip="A row a picture; also saved under output/nibble."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder=pictures.NONE, reference_folder=pictures.NONE, **_):
        return pictures.fingerprint(folder), pictures.fingerprint(reference_folder)

    @classmethod
    def execute(
        cls,
        folder,
        reference_folder,
        prompts,
        image_reward,
        images=None,
        references=None,
        clip=None,
        clip_vision=None,
        clip_i=AUTO,
    ) -> io.NodeOutput:
        sides = (images, folder, references, reference_folder)
        given = scores.Given(*sides, prompts, clip, clip_vision, image_reward, cls.hidden.unique_id, clip_i)
        table, csv, said = scores.run(given)
        return io.NodeOutput(table, csv, ui={"text": [f"{table}\n\n{said}"]})


NODES = [NibbleCompareImages, NibbleScores]
