"""Domains: a few words become a full prompt, with the LoRA, the preset and the size that suit it."""

from __future__ import annotations

from comfy_api.latest import io

from ..families import SIDES
from ..prompts import record
from ..prompts.spec import AUTO, PROSE, TAGS
from .bridge import domain_run, prompts, sampling

CATEGORY = "Nibble/prompts"
SEED_MAX = 0xFFFFFFFFFFFFFFFF
NO_FAMILY = "none"
STYLES = [AUTO, TAGS, PROSE]
SUBJECT_TIP = "What the picture shows, in a few words. Put in as it is; nothing in it is read as a command."
SEED_TIP = "Decides every choice that the domain leaves open. Same seed and domain, same prompt, on any machine."
STYLE_TIP = (
    "tags: for SD1.5 and SDXL. prose: for Flux, SD3, Qwen-Image. auto: by the CLIP, else as the domain is meant."
)
OVERRIDES_TIP = (
    "One a line, slot: choice, such as light: window. Any other text is used as it is; nothing leaves it out."
)
DOMAIN_TIP = "A shipped domain, or user/ and a file of yours in models/nibble_domains. The help page shows them all."
CHOSEN_TIP = (
    "What was chosen: domain, version, hash, seed, slots, prompt. JSON; connect Preview as Text or Save Domain."
)


def domain_inputs(subject: str = "a red apple") -> list:
    """Domain, subject, seed, style and overrides, as every node here has them."""
    return [
        io.Combo.Input("domain", options=prompts.names(), default="emoji@1", tooltip=DOMAIN_TIP),
        io.String.Input("subject", default=subject, dynamic_prompts=False, tooltip=SUBJECT_TIP),
        io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip=SEED_TIP),
        io.Combo.Input("style", options=STYLES, default=AUTO, tooltip=STYLE_TIP),
        io.String.Input("overrides", default="", multiline=True, dynamic_prompts=False, tooltip=OVERRIDES_TIP),
    ]


class NibbleDomainPrompt(io.ComfyNode):
    """A prompt from a domain and a few words."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleDomainPrompt",
            display_name="Domain Prompt (Nibble)",
            category=CATEGORY,
            description="Turns a few words into a full prompt of one domain (food, portrait, logo, emoji ...), with a "
            "negative prompt. Same seed, same text. The prompt is kept in the saved picture.",
            search_aliases=["prompt template", "wildcards", "dynamic prompts", "styles", "prompt generator", "domain"],
            inputs=[
                *domain_inputs(),
                io.Combo.Input(
                    "triggers", options=[NO_FAMILY, *SIDES], default=NO_FAMILY, advanced=True,
                    tooltip="Adds the trigger words of the domain's LoRAs for this model family.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Connect it so that style auto knows the text encoder."),
            ],
            outputs=[
                io.String.Output("positive", display_name="positive", tooltip="The prompt, for CLIP Text Encode."),
                io.String.Output("negative", display_name="negative", tooltip="What to keep out of the picture."),
                io.String.Output("chosen", display_name="chosen", tooltip=CHOSEN_TIP),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, domain="", **_):
        return prompts.fingerprint(domain)

    @classmethod
    def execute(cls, domain, subject, seed, style, overrides, triggers=NO_FAMILY, clip=None) -> io.NodeOutput:
        style = prompts.style_of(clip) if style == AUTO else style
        found = prompts.one(domain, subject, seed, style, overrides, triggers)
        told = prompts.note(record.of(found, choice=domain), cls.hidden)
        sampling.say("\n".join(filter(None, (found.positive, found.over))), cls.hidden.unique_id)
        return io.NodeOutput(found.positive, found.negative, told)


class NibbleDomain(io.ComfyNode):
    """A domain as everything that a sampler needs: the one-node start."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleDomain",
            display_name="Domain (Nibble)",
            category=CATEGORY,
            description="All of a domain in one node: prompt, LoRA, few-step sampling and picture size for the "
            "connected model. Connect it to SamplerCustom. What is missing is named with its link.",
            search_aliases=["easy", "all in one", "preset", "quick start", "beginner", "domain", "style"],
            inputs=[
                io.Model.Input("model", tooltip="A 4-bit model or any other."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                *domain_inputs(),
                io.Combo.Input(
                    "lora", options=[domain_run.IF_PRESENT, domain_run.REQUIRED, domain_run.NONE],
                    default=domain_run.IF_PRESENT,
                    tooltip="The domain's LoRAs for this model. if present: one that is missing is named with its "
                    "link and left out. required: it is an error.",
                ),
                io.Combo.Input(
                    "sampling", options=[domain_run.FEW, domain_run.ORDINARY], default=domain_run.FEW,
                    tooltip="few steps: the model's or the domain's preset, with its LoRA. ordinary: 20 to 28 steps.",
                ),
                io.Int.Input("steps", default=0, min=0, max=100, advanced=True, tooltip="0: as the preset says."),
                io.Int.Input("width", default=0, min=0, max=4096, step=8, advanced=True, tooltip="0: the domain's."),
                io.Int.Input("height", default=0, min=0, max=4096, step=8, advanced=True, tooltip="0: the domain's."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures of this prompt."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="With LoRAs, sampled as the preset wants."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="The encoded negative prompt."),
                io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="For SamplerCustom."),
                io.Sigmas.Output("sigmas", display_name="SIGMAS", tooltip="For SamplerCustom."),
                io.Latent.Output("latent", display_name="LATENT", tooltip="Empty, in the domain's size."),
                io.Float.Output("cfg", display_name="cfg", tooltip="Guidance scale; connect it to "
                "SamplerCustom's cfg."),
                io.String.Output("chosen", display_name="chosen", tooltip=CHOSEN_TIP),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, domain="", **_):
        return prompts.fingerprint(domain)

    @classmethod
    def execute(cls, model, clip, batch_size, width=0, height=0, steps=0, **wanted) -> io.NodeOutput:
        wish = domain_run.Wish(**wanted, steps=steps, width=width, height=height, batch=batch_size)
        graph = sampling.Graph(cls.hidden.prompt, cls.hidden.unique_id)
        return io.NodeOutput(*domain_run.run(model, clip, wish, graph, cls.hidden))


class NibblePromptList(io.ComfyNode):
    """Many different prompts of a domain."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibblePromptList",
            display_name="Prompt List (Nibble)",
            category=CATEGORY,
            description="Many different prompts of one domain: for a batch of pictures, a data set, or for calibrating "
            "a quantizer on what the model is going to draw. What is connected runs once for each.",
            search_aliases=["batch prompts", "wildcards", "combinatorial", "calibration prompts", "prompt matrix"],
            inputs=[
                io.Combo.Input("domain", options=prompts.names(), default="emoji@1", tooltip=DOMAIN_TIP),
                io.String.Input(
                    "subjects", default="", multiline=True, dynamic_prompts=False,
                    tooltip="One a line. Empty: the domain's own calibration subjects.",
                ),
                io.Int.Input(
                    "count", default=16, min=0, max=4096,
                    tooltip="How many, no two alike; fewer come when there are no more. 0: every combination.",
                ),
                io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip=SEED_TIP),
                io.Combo.Input("style", options=STYLES, default=AUTO, tooltip=STYLE_TIP),
                io.String.Input("overrides", default="", multiline=True, dynamic_prompts=False, tooltip=OVERRIDES_TIP),
                io.Clip.Input("clip", optional=True, tooltip="Connect it so that style auto knows the text encoder."),
            ],
            outputs=[
                io.String.Output("positive", display_name="positive", is_output_list=True, tooltip="The prompts."),
                io.String.Output("negative", display_name="negative", is_output_list=True, tooltip="One for each."),
                io.String.Output("lines", display_name="lines", tooltip="The prompts in one text, one a line."),
                io.Int.Output("count_out", display_name="count", tooltip="How many there are."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, domain="", **_):
        return prompts.fingerprint(domain)

    @classmethod
    def execute(cls, domain, subjects, count, seed, style, overrides, clip=None) -> io.NodeOutput:
        style = prompts.style_of(clip) if style == AUTO else style
        found = prompts.many(domain, subjects, count, seed, style, overrides)
        prompts.note(record.of_list(found, choice=domain, seed=seed), cls.hidden)
        positive, negative = [p.positive for p in found], [p.negative for p in found]
        return io.NodeOutput(positive, negative, "\n".join(positive), len(found))


class NibbleSaveDomain(io.ComfyNode):
    """What the graph does now, as a domain to share."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSaveDomain",
            display_name="Save Domain (Nibble)",
            category=CATEGORY,
            description="Saves what the graph does now as a domain of your own, under output/nibble_domains: the "
            "prompt's template with your overrides, the graph's LoRAs and picture size. It is listed at once.",
            search_aliases=["save prompt template", "export style", "share prompt", "save preset", "yaml"],
            inputs=[
                io.String.Input("chosen", force_input=True, tooltip="From Domain Prompt or Domain."),
                io.String.Input("name", default="my-domain", tooltip="Small letters, digits and -; the file's name."),
                io.String.Input("title", default="", tooltip="What people read. Empty: as the domain it was "
                "made from."),
                io.Combo.Input(
                    "keep", options=[prompts.OPEN, prompts.EXACT], default=prompts.OPEN,
                    tooltip="choices open: your overrides are fixed, the rest is still drawn. exactly this prompt: "
                    "only the subject can change.",
                ),
                io.Combo.Input(
                    "family", options=[AUTO, *SIDES], default=AUTO,
                    tooltip="Which models the LoRAs and the size of this graph are for. auto: as Domain found out.",
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The file's name under output/.")],
            hidden=[io.Hidden.prompt],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, chosen, name, title, keep, family) -> io.NodeOutput:
        file = prompts.save(chosen, name, title, keep, family, cls.hidden.prompt or {})
        return io.NodeOutput(file, ui={"text": [file]})


prompts.register()  # nodes are only imported by ComfyUI as it loads; nothing else tells a pack that it is there
NODES = [NibbleDomainPrompt, NibbleDomain, NibblePromptList, NibbleSaveDomain]
