"""What the UNet families share: names of SD1.x, SD2.x and SDXL UNets, in both spellings, and presets, of which each is
there for several of them. Not a family itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .preset import HF, HYPER, NEVER, WORD, Preset
from .spec import KEEP, MAX_TOKENS, SVDQUANT, TAGS, KeyRule, Place, Rule, layer_rules

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TRANSFORMER = ("norm", "proj_in", "proj_out")
BLOCK = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def rules(text_projections: str, why: str) -> tuple[Rule, ...]:
    """The policy of a UNet: 4 bits inside the transformer blocks; ``text_projections`` is the scheme of
    attn2.to_k/to_v.
    """
    block = r"transformer_blocks\.\d+\."
    return (
        Rule(r"transformer_blocks\.0\.attn2\.to_k$", text_projections, why, keeps_columns=True),
        Rule(block + r"attn2\.to_[kv]$", text_projections, why),
        Rule(block + r"attn[12]\.to_(q|k|v|out\.0)$", SVDQUANT, "attention"),
        Rule(block + r"ff\.net\.(0\.proj|2)$", SVDQUANT, "feed-forward (GEGLU)"),
        Rule(r"(time_embed|label_emb|time_embedding|add_embedding|class_embedding)", KEEP, "time and label embedding"),
        Rule(r"(emb_layers|time_emb_proj)", KEEP, "resnet time projection"),
        Rule(r"proj_(in|out)$", KEEP, "enters or leaves a transformer"),
        Rule(r"", KEEP, "convolution or output layer"),
    )


def key_rules(config: Mapping) -> list[KeyRule]:
    """Native <- diffusers for a UNet2DConditionModel ``config`` (its config.json).

    The two spellings number blocks differently: natively every resnet, downsampler and upsampler is one input or
    output block in a row; diffusers nests them. Source: the original ldm UNetModel's construction order.
    """
    down, up = config["down_block_types"], config["up_block_types"]
    per_block = config.get("layers_per_block", 2)
    per_block = [per_block] * len(down) if isinstance(per_block, int) else list(per_block)
    depth = config.get("transformer_layers_per_block", 1)
    depth = [depth] * len(down) if isinstance(depth, int) else list(depth)
    pairs = list(TOP.items())
    n = 1
    for i, kind in enumerate(down):
        for j in range(per_block[i]):
            pairs += _resnet(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}")
            if "CrossAttn" in kind:
                pairs += _transformer(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", depth[i])
            n += 1
        if i < len(down) - 1:
            pairs.append((f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
            n += 1
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        pairs += _resnet("middle_block.0", "mid_block.resnets.0")
        pairs += _transformer("middle_block.1", "mid_block.attentions.0", depth[-1])
        pairs += _resnet("middle_block.2", "mid_block.resnets.1")
    n = 0
    for i, kind in enumerate(up):
        level = len(up) - 1 - i
        for j in range(per_block[level] + 1):
            pairs += _resnet(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}")
            attends = "CrossAttn" in kind
            if attends:
                pairs += _transformer(f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}", depth[level])
            if j == per_block[level] and i < len(up) - 1:
                slot = 2 if attends else 1
                pairs.append((f"output_blocks.{n}.{slot}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
            n += 1
    return layer_rules(pairs)


def _resnet(native: str, diffusers: str) -> list[tuple[str, str]]:
    return [(f"{native}.{a}", f"{diffusers}.{b}") for a, b in RESNET.items()]


def _transformer(native: str, diffusers: str, depth: int) -> list[tuple[str, str]]:
    names = [*TRANSFORMER, *(f"transformer_blocks.{d}.{b}" for d in range(depth) for b in BLOCK)]
    return [(f"{native}.{x}", f"{diffusers}.{x}") for x in names]


QKV = ("to_q", "to_k", "to_v")


def places(names: Iterable[str], config: Mapping) -> list[Place]:
    """Native <- diffusers for a file that fuses attn1's q, k and v. ``config``: as `key_rules`."""
    rules = [r for r in key_rules(config) if r.native.endswith(".weight")]
    strip = len(".weight")
    out = [Place((r.sources[0][:-strip],), (r.native[:-strip],)) for r in rules]
    block = ".attn1.to_q"
    fused = [p for p in out if p.sources[0].endswith(block)]
    for p in fused:
        source, native = p.sources[0][: -len("to_q")], p.natives[0][: -len("to_q")]
        out.append(Place((f"{source}to_qkv",), tuple(native + q for q in QKV)))
    return out


def lora_mark(width: int, title: str) -> tuple[str, tuple[str, int, int], str]:
    """By the ``width`` of the text."""
    return r"(input|output|down|up|mid|middle)_block\w*_attn2_to_[kv]$", ("down", 1, width), title


def inputs(config: Mapping) -> dict[str, tuple[int, ...]]:
    y = {"y": (config["adm_in_channels"],)} if config.get("adm_in_channels") else {}
    return {"context": (MAX_TOKENS[TAGS], config["context_dim"]), **y}


# The presets. ``shown`` are timesteps; sources are the authors' cards and code.
LCM_CARD = f"{HF}latent-consistency/lcm-lora-sdv1-5"
TCD_README = "https://github.com/jabir-zheng/TCD"
PERFLOW_README = "https://github.com/magic-research/piecewise-rectified-flow"
TURBO_DEMO = "https://github.com/Stability-AI/generative-models/blob/main/scripts/demo/turbo.py"
GRID_4, TRAILING_4 = (999, 759, 499, 259), (999, 749, 499, 249)
TRAILING_8 = (999, 874, 749, 624, 499, 374, 249, 124)
ONE_TO_EIGHT, TWO_TO_EIGHT = tuple(range(1, 9)), tuple(range(2, 9))
LCM = WORD + r"lcm(?=[^a-z]|$|lora|sd)"

# A full LCM is known by its guidance embedding, which only its diffusers file holds; without that it is an LCM-LoRA.
LCM_FULL = Preset(
    id="lcm_full_sd15", title="LCM (full model)", family="sd15", prediction="lcm", schedule="lcm", steps=4,
    made_for=ONE_TO_EIGHT, sampler="lcm", shown=GRID_4, names=NEVER, omega=8.0,
    source=f"{HF}SimianLuo/LCM_Dreamshaper_v7",
)  # fmt: skip
LCM_LORA = Preset(
    id="lcm_lora_sd15", title="LCM-LoRA", family="sd15", prediction="lcm", schedule="lcm", steps=4,
    made_for=TWO_TO_EIGHT, sampler="lcm", shown=GRID_4, names=LCM + r"(?!.*sd[-_]?xl)",
    lora="lcm-lora-sdv1-5", source=LCM_CARD,
)  # fmt: skip
SD_TURBO = Preset(
    id="sd_turbo", title="SD-Turbo", family="sd2", prediction="epsilon", schedule="tenths", steps=1,
    made_for=(1, 2, 3, 4), sampler="euler_ancestral", shown=(999,), names=r"sd[-_ ]?turbo", source=TURBO_DEMO,
)  # fmt: skip
SDXL_TURBO = replace(
    SD_TURBO, id="sdxl_turbo", title="SDXL-Turbo", family="sdxl", names=r"sd[-_ ]?xl[-_ ]?turbo"
)  # fmt: skip
LIGHTNING = Preset(
    id="lightning_sdxl", title="SDXL-Lightning", family="sdxl", prediction="epsilon", schedule="trailing", steps=4,
    made_for=(2, 4, 8), sampler="euler", shown=TRAILING_4, names=r"lightning(?:.*?(?P<steps>\d+)[-_ ]?step)?",
    lora="sdxl_lightning_4step_lora", source=f"{HF}ByteDance/SDXL-Lightning",
)  # fmt: skip
HYPER_SD15 = Preset(
    id="hyper_sd15", title="Hyper-SD", family="sd15", prediction="epsilon", schedule="trailing", steps=8,
    made_for=(2, 4, 8), sampler="euler", shown=TRAILING_8,
    names=r"hyper[-_ ]?sd[-_ ]?15.*?(?P<steps>\d+)[-_ ]?step", lora="Hyper-SD15-8steps-lora", source=HYPER,
)  # fmt: skip
HYPER_CFG = replace(
    HYPER_SD15, id="hyper_sd15_cfg", title="Hyper-SD, CFG-preserved", made_for=(8, 12), cfg=5.0,
    names=r"hyper[-_ ]?sd[-_ ]?15.*?(?P<steps>\d+)[-_ ]?steps?[-_ ]?cfg", lora="Hyper-SD15-8steps-CFG-lora",
)  # fmt: skip
HYPER_ONE = replace(
    HYPER_SD15, id="hyper_sd15_1step", title="Hyper-SD, one-step unified", schedule="tcd", steps=1,
    made_for=ONE_TO_EIGHT, sampler="tcd", eta=1.0, shown=(999,), names=r"hyper[-_ ]?sd[-_ ]?15.*(?<!\d)1[-_ ]?step",
    lora="Hyper-SD15-1step-lora",
)  # fmt: skip
TCD = Preset(
    id="tcd_sd15", title="TCD", family="sd15", prediction="epsilon", schedule="tcd", steps=4,
    made_for=tuple(range(2, 51)), sampler="tcd", eta=0.3, shown=GRID_4, names=WORD + r"tcd(?:[^a-z]|$)",
    lora="TCD-SD15-LoRA", source=TCD_README,
)  # fmt: skip
DMD2 = Preset(
    id="dmd2_sdxl", title="DMD2", family="sdxl", prediction="epsilon", schedule="trailing", steps=4, made_for=(4,),
    sampler="lcm", shown=TRAILING_4, names=r"dmd[-_ ]?2", lora="dmd2_sdxl_4step_lora",
    source="https://github.com/tianweiy/DMD2",
)  # fmt: skip
INSTAFLOW = Preset(
    id="instaflow", title="InstaFlow-0.9B", family="sd15", prediction="rectified_flow", schedule="uniform", steps=1,
    made_for=(1,), sampler="euler", shown=(1.0,), names=r"insta[-_ ]?flow",
    source="https://github.com/gnobitab/InstaFlow",
)  # fmt: skip
PERFLOW = Preset(
    id="perflow_sd15", title="PeRFlow", family="sd15", prediction="diff_eps", schedule="windows", steps=8,
    made_for=(4, 6, 8), sampler="perflow", cfg=7.5, cfg_at=((1, 4.5), (6, 6.0), (8, 7.5)),
    shown=(1000, 875, 750, 625, 500, 375, 250, 125), names=r"perflow", source=PERFLOW_README,
)  # fmt: skip

DISTILLED = Preset(
    id="distilled_sd15", title="Distilled by this pack: phased, reflow, one step, progressive", family="sd15",
    prediction="epsilon", schedule="trailing", steps=4, made_for=tuple(range(1, 65)), sampler="euler",
    shown=TRAILING_4, names=NEVER, distilled=True,
    source="https://github.com/nibble-4bit/ComfyUI-Nibble/blob/main/docs/distillation.md",
)  # fmt: skip

# In the order of the nodes' lists, which is frozen.
PRESETS = (
    LCM_FULL,
    replace(LCM_FULL, id="lcm_full_sdxl", family="sdxl", source=f"{HF}latent-consistency/lcm-sdxl"),
    LCM_LORA,
    replace(LCM_LORA, id="lcm_lora_sdxl", family="sdxl", names=LCM + r"(?!.*sd[-_ ]?v?1)",
            lora="lcm-lora-sdxl", source=f"{HF}latent-consistency/lcm-lora-sdxl"),
    replace(LCM_LORA, id="lcm_sd21", title="LCM on SD 2.1", family="sd2", made_for=ONE_TO_EIGHT, names=LCM,
            lora="", source="https://arxiv.org/abs/2310.04378"),
    SD_TURBO,
    replace(SD_TURBO, id="sd_turbo_trailing", title="SD-Turbo, diffusers' timesteps", schedule="trailing", steps=4,
            shown=TRAILING_4, source=f"{HF}stabilityai/sd-turbo"),
    SDXL_TURBO,
    replace(SDXL_TURBO, id="sdxl_turbo_trailing", title="SDXL-Turbo, diffusers' timesteps", schedule="trailing",
            steps=4, shown=TRAILING_4, source=f"{HF}stabilityai/sdxl-turbo"),
    replace(LIGHTNING, id="lightning_sdxl_1step", title="SDXL-Lightning, one step", prediction="x0", steps=1,
            made_for=(1,), shown=(999,), names=r"lightning.*(?<!\d)1[-_ ]?step", lora=""),
    LIGHTNING,
    HYPER_CFG,
    HYPER_ONE,
    HYPER_SD15,
    replace(HYPER_CFG, id="hyper_sdxl_cfg", family="sdxl", lora="Hyper-SDXL-8steps-CFG-lora",
            names=HYPER_CFG.names.replace("[-_ ]?15", "[-_ ]?xl")),
    replace(HYPER_SD15, id="hyper_sdxl_1step_unet", title="Hyper-SD, one-step UNet", family="sdxl", schedule="listed",
            steps=1, made_for=(1,), timesteps=(800,), shown=(800,), names=r"hyper[-_ ]?sd[-_ ]?xl.*1[-_ ]?step.*unet",
            lora=""),
    replace(HYPER_ONE, id="hyper_sdxl_1step", family="sdxl", lora="Hyper-SDXL-1step-lora",
            names=HYPER_ONE.names.replace("[-_ ]?15", "[-_ ]?xl")),
    replace(HYPER_SD15, id="hyper_sdxl", family="sdxl", lora="Hyper-SDXL-8steps-lora",
            names=HYPER_SD15.names.replace("[-_ ]?15", "[-_ ]?xl")),
    TCD,
    replace(TCD, id="tcd_sd21", family="sd2", lora="TCD-SD21-base-LoRA"),
    replace(TCD, id="tcd_sdxl", family="sdxl", lora="TCD-SDXL-LoRA"),
    replace(DMD2, id="dmd2_sdxl_1step", title="DMD2, one step", schedule="listed", steps=1, made_for=(1,),
            timesteps=(399,), shown=(399,), names=r"dmd[-_ ]?2.*(?<!\d)1[-_ ]?step", lora=""),
    DMD2,
    INSTAFLOW,
    replace(INSTAFLOW, id="rectified_flow_2", title="2-Rectified Flow", steps=25, made_for=tuple(range(2, 26)), cfg=1.5,
            names=r"rectified[-_ ]?flow", shown=tuple(round(1 - i / 25, 4) for i in range(25))),
    PERFLOW,
    replace(PERFLOW, id="perflow_sd21", family="sd2", prediction="velocity", cfg_at=()),
    replace(PERFLOW, id="perflow_sdxl", family="sdxl", prediction="ddim_eps", steps=6, made_for=(4, 5, 6), cfg=2.0,
            cfg_at=(), shown=(1000, 875, 750, 625, 500, 250)),
    DISTILLED,
    replace(DISTILLED, id="distilled_sd2", family="sd2"),
    replace(DISTILLED, id="distilled_sdxl", family="sdxl"),
)  # fmt: skip


def presets(*variants: str) -> tuple[Preset, ...]:
    """The rows for ``variants``."""
    return tuple(row for row in PRESETS if row.family in variants)
