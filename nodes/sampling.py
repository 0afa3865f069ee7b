"""Few-step sampling: presets of distilled models, the sampler that knows them, and what they are made of."""

from __future__ import annotations

from comfy_api.latest import io

from ..families import PRESETS
from ..families.preset import PERFLOW
from ..sampling.detect import AUTO
from . import files
from .bridge import model_sampling, sampling, straightness

CATEGORY = "Nibble/sampling"
CHOICES = [AUTO, *PRESETS]
VELOCITIES = ["data - noise", "noise - data"]
SEED_MAX = 0xFFFFFFFFFFFFFFFF
PRESET_TIP = (
    "auto: by metadata, tensor names, file names, then the model's class; what matched is shown. Or a row of the "
    "table in the pack's docs; a preset for another model family is refused."
)
STEPS_TIP = "0: as many as the preset is made for (or its file name says)."
DENOISE_TIP = "Below 1: starts from the latent with that much noise, as KSampler does (image to image)."
SIZE_TIP = "The picture's size in pixels. Only FLUX-like schedules depend on it."
SEED_TIP = "Of the noise. Same seed, same picture."


class NibbleFewStepPreset(io.ComfyNode):
    """A preset as the parts that ComfyUI's custom sampler nodes take."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleFewStepPreset",
            display_name="Few-Step Preset (Nibble)",
            category=CATEGORY,
            description="Settings of every known few-step model (LCM, Turbo, Lightning, Hyper-SD, TCD, DMD2, ...) "
            "for ComfyUI's custom sampler: the model's sampling, sampler, sigmas and cfg.",
            search_aliases=["lcm", "turbo", "lightning", "hyper-sd", "tcd", "dmd2", "fast", "distilled", "4 steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs applied."),
                io.Combo.Input("preset", options=CHOICES, default=AUTO, tooltip=PRESET_TIP),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=STEPS_TIP),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=DENOISE_TIP),
                io.Int.Input("width", default=1024, min=16, max=16384, step=8, advanced=True, tooltip=SIZE_TIP),
                io.Int.Input("height", default=1024, min=16, max=16384, step=8, advanced=True, tooltip=SIZE_TIP),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The model, sampled as the preset wants."),
                io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="For SamplerCustom."),
                io.Sigmas.Output("sigmas", display_name="SIGMAS", tooltip="For SamplerCustom."),
                io.Float.Output("cfg", display_name="cfg", tooltip="Guidance scale; 1 means no negative prompt."),
                io.String.Output("matched", display_name="what matched", tooltip="The preset, why, and its source."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, preset, steps, denoise, width=1024, height=1024) -> io.NodeOutput:
        graph = sampling.Graph(cls.hidden.prompt, cls.hidden.unique_id)
        ready = sampling.prepare(model, sampling.Run(preset, steps, 0, denoise), (width, height), graph)
        sampling.say(ready.text, graph.node)
        return io.NodeOutput(ready.model, ready.sampler, ready.sigmas, ready.cfg, ready.text)


class NibbleFewStepSampler(io.ComfyNode):
    """KSampler for few-step models: the preset sets what KSampler asks for."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleFewStepSampler",
            display_name="Few-Step Sampler (Nibble)",
            category=CATEGORY,
            description="Samples a few-step model the way it was distilled. It knows every preset's sampler, "
            "schedule, cfg and shift; what is left to set is the seed.",
            search_aliases=["ksampler", "lcm", "turbo", "lightning", "hyper-sd", "fast sampling", "4 steps", "1 step"],
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs applied."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input("negative", tooltip="What to avoid; used where the preset's cfg is above 1."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise; empty for a new picture."),
                io.Combo.Input("preset", options=CHOICES, default=AUTO, tooltip=PRESET_TIP),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=STEPS_TIP),
                io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip=SEED_TIP),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=DENOISE_TIP),
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT", tooltip="The denoised latent.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, preset, steps, seed, denoise) -> io.NodeOutput:
        graph = sampling.Graph(cls.hidden.prompt, cls.hidden.unique_id)
        run = sampling.Run(preset, steps, seed, denoise)
        latent, text = sampling.sample(model, (positive, negative), latent_image, run, graph)
        return io.NodeOutput(latent, ui={"text": [text]})


class NibbleSigmasFromTimesteps(io.ComfyNode):
    """SIGMAS at the timesteps that a card or a paper names."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSigmasFromTimesteps",
            display_name="Sigmas from Timesteps (Nibble)",
            category=CATEGORY,
            description="SIGMAS of a Stable Diffusion model at given timesteps. A list that starts "
            "below the highest noise begins from pure noise, exactly as in diffusers: so the MODEL passes through.",
            search_aliases=["timesteps", "custom schedule", "manual sigmas", "dmd2", "lcm timesteps", "trailing"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.5, SD 2 or SDXL model, whose noise levels are meant."),
                io.Combo.Input(
                    "grid", options=sampling.GRIDS, default=sampling.TYPED,
                    tooltip="The list below; or `steps` of LCM's and TCD's 50 timesteps; or `steps` evenly from 999.",
                ),
                io.String.Input("timesteps", default="999, 749, 499, 249", tooltip="From high to low, 999 to 0."),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="How many, where it is not the typed list."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Below 1, image to image. List: its last part. LCM and TCD: steps of what is "
                    "left of the 50. Trailing: the last steps of a longer run.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="Starts from pure noise at the first timestep."),
                io.Sigmas.Output("sigmas", display_name="SIGMAS", tooltip="For SamplerCustom; ends in 0."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, grid, timesteps, steps, strength) -> io.NodeOutput:
        return io.NodeOutput(*sampling.from_timesteps(model, grid, timesteps, steps, strength))


class NibbleSamplerTCD(io.ComfyNode):
    """Trajectory consistency distillation's sampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSamplerTCD",
            display_name="Sampler TCD (Nibble)",
            category=CATEGORY,
            description="The sampler of TCD and of Hyper-SD's one-step LoRA: how much noise each step adds is free.",
            search_aliases=["tcd", "trajectory consistency", "hyper-sd", "gamma", "eta"],
            inputs=[
                io.Float.Input(
                    "eta", default=0.3, min=0.0, max=1.0, step=0.01,
                    tooltip="Noise added again by each step, 0 to 1. More with more steps; lower keeps more detail.",
                ),
            ],
            outputs=[io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="For SamplerCustom.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, eta) -> io.NodeOutput:
        return io.NodeOutput(model_sampling.tcd_sampler(eta))


class NibbleSamplerPeRFlow(io.ComfyNode):
    """Piecewise rectified flow's sampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSamplerPeRFlow",
            display_name="Sampler PeRFlow (Nibble)",
            category=CATEGORY,
            description="The sampler of PeRFlow models: straight steps inside four windows of time.",
            search_aliases=["perflow", "piecewise rectified flow", "reflow"],
            inputs=[
                io.Combo.Input(
                    "prediction", options=list(PERFLOW), default="ddim_eps",
                    tooltip="As the model's authors say: diff_eps for SD 1.5, ddim_eps for SDXL, velocity for SD 2.1.",
                ),
            ],
            outputs=[io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="For SamplerCustom.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, prediction) -> io.NodeOutput:
        return io.NodeOutput(model_sampling.perflow_sampler(prediction))


class NibbleModelSamplingRectifiedFlow(io.ComfyNode):
    """Rectified flow on a Stable Diffusion network: InstaFlow, 2-Rectified Flow, reflowed models."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleModelSamplingRectifiedFlow",
            display_name="Model Sampling Rectified Flow (Nibble)",
            category=CATEGORY,
            description="Samples a model as a rectified flow (InstaFlow, 2-Rectified Flow): its output is a velocity.",
            search_aliases=["instaflow", "rectified flow", "reflow", "one step", "velocity"],
            inputs=[
                io.Model.Input("model", tooltip="A rectified-flow model on a Stable Diffusion network."),
                io.Combo.Input(
                    "velocity", options=VELOCITIES, default=VELOCITIES[0],
                    tooltip="What the network predicts. InstaFlow and 2-Rectified Flow: data - noise.",
                ),
                io.Float.Input(
                    "shift", default=1.0, min=0.01, max=100.0, step=0.01, advanced=True,
                    tooltip="Shift of the time axis; InstaFlow has none (1).",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="Use scheduler simple and sampler euler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, velocity, shift=1.0) -> io.NodeOutput:
        return io.NodeOutput(model_sampling.rectified_flow(model, shift, velocity == VELOCITIES[0]))


class NibbleLCMGuidance(io.ComfyNode):
    """The guidance scale inside a full latent consistency model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLCMGuidance",
            display_name="LCM Guidance (Nibble)",
            category=CATEGORY,
            description="Sets the guidance scale that a full LCM has built in, which ComfyUI's loader leaves out.",
            search_aliases=["lcm", "dreamshaper", "omega", "w embedding", "cond_proj", "guidance scale"],
            inputs=[
                io.Model.Input("model", tooltip="The LCM, loaded from the same file."),
                io.Combo.Input(
                    "unet_name", options=files.names("diffusion_models"),
                    tooltip="The LCM's diffusers-format UNet file, which holds the embedding.",
                ),
                io.Float.Input(
                    "scale", default=8.0, min=1.0, max=30.0, step=0.1,
                    tooltip="As diffusers counts: 1 is no guidance; trained for 3 to 15. Costs no second pass.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="Sample it at cfg 1.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, unet_name="", **_):
        return files.fingerprint("diffusion_models", unet_name)

    @classmethod
    def execute(cls, model, unet_name, scale) -> io.NodeOutput:
        return io.NodeOutput(model_sampling.lcm_guidance(model, files.path("diffusion_models", unet_name), scale))


class NibbleStraightness(io.ComfyNode):
    """How far a model's trajectories are from straight lines."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleStraightness",
            display_name="Straightness of Trajectories (Nibble)",
            category=CATEGORY,
            description="Measures S(Z): how far sampling trajectories are from straight lines, so what fewer "
            "steps cost. 0 means that one step draws what many would. Compare before and after distillation.",
            search_aliases=["straightness", "rectified flow", "reflow", "trajectory", "how many steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure."),
                io.Conditioning.Input("positive", tooltip="The prompt to measure with."),
                io.Conditioning.Input("negative", tooltip="Used where cfg is not 1."),
                io.Latent.Input("latent_image", tooltip="Its size and batch count; more pictures, less chance."),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Euler steps of each trajectory."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale; 1 for none."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_MAX,
                    control_after_generate=False,
                    tooltip="Of the noise that trajectories start at.",
                ),
            ],
            outputs=[
                io.Float.Output("straightness", display_name="S(Z)", tooltip="Per latent element; 0 is straight."),
                io.Image.Output("chart", display_name="chart", tooltip="Where on the way trajectories bend."),
                io.String.Output("table", display_name="table", tooltip="The same in Markdown."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, steps, cfg, seed) -> io.NodeOutput:
        found = straightness.straightness(model, (positive, negative), latent_image, steps, cfg, seed)
        return io.NodeOutput(found.value, straightness.drawn(found), found.table())


NODES = [
    NibbleFewStepPreset,
    NibbleFewStepSampler,
    NibbleSigmasFromTimesteps,
    NibbleSamplerTCD,
    NibbleSamplerPeRFlow,
    NibbleModelSamplingRectifiedFlow,
    NibbleLCMGuidance,
    NibbleStraightness,
]
