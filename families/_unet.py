"""What the UNet families share: names of SD1.x, SD2.x and SDXL UNets, in both spellings. Not a family itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .spec import KEEP, SVDQUANT, KeyRule, Place, Rule, layer_rules

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
