"""Every spelling of a layer's name finds it, in models of both spellings, fused or split."""

import lora_files
import pytest
import torch
from comfyui_nibble.lora.apply import TEXT, apply, layers_of, rules_of
from comfyui_nibble.lora.names import Slot, canonical, index, place
from comfyui_nibble.lora.read import read
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel


def unet():
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(32, 64), cross_attention_dim=64, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def sd3():
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip


# family: (diffusers module, spellings of its own names)
FAMILIES = {
    "unet": (
        unet,
        ("kohya", "peft", "peft named", "diffusers unet", "old diffusers", "processor", "onetrainer dotted"),
    ),
    "flux": (flux, ("onetrainer", "peft", "diffusers transformer", "lycoris", "bfl")),
    "sd3": (sd3, ("onetrainer", "peft", "diffusers transformer", "lycoris", "bfl")),
}
NATIVE = ("kohya", "comfyui", "bfl")  # spellings of the original authors' names


def linears(module) -> dict:
    return {n: tuple(m.weight.shape) for n, m in layers_of(module).items() if m.weight.dim() == 2}


def state(module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach().clone() for n, m in layers_of(module).items()}


@pytest.mark.parametrize(("family", "spelling"), [(f, s) for f, (_, s) in FAMILIES.items() for s in s])
def test_own_names_in_every_spelling(family, spelling):
    module = FAMILIES[family][0]()
    before = state(module)
    parts = lora_files.factors(linears(module))
    report = apply(module, read(lora_files.spell(parts, spelling, alpha=2.0)), 1.0)
    assert len(report.applied) == len(parts) and report.summary() == f"{len(parts)} applied"
    for layer, after in state(module).items():
        change = lora_files.delta(parts, layer, 0.5) if layer in parts else 0
        assert torch.allclose(after, before[layer] + change, atol=1e-6), layer


@pytest.mark.parametrize("spelling", NATIVE)
@pytest.mark.parametrize("family", FAMILIES)
def test_native_names_on_a_diffusers_module(family, spelling):
    """The original names: q, k and v of FLUX and SD3 are one layer there, and scale and shift the other way round."""
    module = FAMILIES[family][0]()
    before, shapes = state(module), linears(module)
    rules = [r for r in rules_of(module) if r.native.endswith(".weight")]
    rules = [r for r in rules if all(s.removesuffix(".weight") in shapes for s in r.sources)]
    native = {
        r.native.removesuffix(".weight"): (
            sum(shapes[s.removesuffix(".weight")][0] for s in r.sources),
            shapes[r.sources[0].removesuffix(".weight")][1],
        )
        for r in rules
    }
    parts = lora_files.factors(native)
    report = apply(module, read(lora_files.spell(parts, spelling)), 1.0)
    assert len(report.applied) == len(parts), report
    after, done = state(module), set()
    for r in rules:
        whole = lora_files.delta(parts, r.native.removesuffix(".weight"))
        whole = torch.cat(whole.chunk(2)[::-1]) if r.swap_halves else whole
        start = 0
        for s in r.sources:
            layer = s.removesuffix(".weight")
            rows = whole[start : start + shapes[layer][0]]
            assert torch.allclose(after[layer], before[layer] + rows, atol=1e-6), layer
            start += shapes[layer][0]
            done.add(layer)
    assert done == set(shapes)


def test_native_model_takes_split_names():
    """A model in native names: FLUX's qkv takes q, k and v into its own rows, and linear1 the feed-forward too."""
    from comfyui_nibble.families import by_id

    rules = by_id("flux").key_rules({"num_layers": 1, "num_single_layers": 1})
    shapes = {"double_blocks.0.img_attn.qkv": (192, 64), "single_blocks.0.linear1": (448, 64)}
    names = index(shapes, rules)
    qkv, linear1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
    assert names["transformer_blocks_0_attn_to_k"] == (Slot(qkv, into=(64, 64)),)
    assert names["transformer_blocks_0_attn_to_qkv"] == (Slot(qkv, into=(0, 192)),)
    assert names["single_transformer_blocks_0_proj_mlp"] == (Slot(linear1, into=(192, 256)),)
    assert names["single_blocks_0_linear1_qkv"] == (Slot(linear1, into=(0, 192)),)
    assert names["double_blocks_0_img_attn_qkv"] == (Slot(qkv),)


def test_fused_names_on_split_layers():
    names = index({f"b.attn1.to_{x}": (32, 64) for x in "qkv"})
    assert names["b_attn1_to_qkv"] == tuple(Slot(f"b.attn1.to_{x}", source=(32 * i, 32)) for i, x in enumerate("qkv"))
    assert names["b_attn1_to_kv"] == (Slot("b.attn1.to_k", source=(0, 32)), Slot("b.attn1.to_v", source=(32, 32)))


@pytest.mark.parametrize(
    ("target", "part", "name", "ordinal"),
    [
        ("lora_unet_down_blocks_0_attn1_to_out_0", "model", "down_blocks_0_attn1_to_out", 1),
        ("unet.down_blocks.0.attn1.processor.to_out", "model", "down_blocks_0_attn1_to_out", 1),
        ("base_model.model.unet.mid_block.attn1.to_q", "model", "mid_block_attn1_to_q", 1),
        ("unet.base_model.model.mid_block.attn1.to_q", "model", "mid_block_attn1_to_q", 1),
        ("model.diffusion_model.input_blocks.1.0.in_layers.2", "model", "input_blocks_1_0_in_layers_2", 1),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", TEXT, "text_model_encoder_layers_0_mlp_fc1", 1),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", TEXT, "text_model_encoder_layers_0_mlp_fc1", 2),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", TEXT, "text_model_encoder_layers_0_mlp_fc1", 2),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_q", TEXT,
         "text_model_encoder_layers_1_self_attn_q_proj", 1),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", TEXT, "text_model_encoder_layers_0_mlp_fc1", 1),
        ("transformer.single_transformer_blocks.0.proj_mlp", "model", "single_transformer_blocks_0_proj_mlp", 1),
    ],
)  # fmt: skip
def test_parts_and_canonical_names(target, part, name, ordinal):
    found = place(target)
    assert (found.part, found.name, found.ordinal) == (part, name, ordinal)


def test_xlabs_names():
    g = lora_files.generator()
    file = {f"double_blocks.0.processor.qkv_lora1.{x}.weight": torch.randn(s, generator=g) for x, s in
            (("down", (4, 64)), ("up", (192, 4)))}  # fmt: skip
    module = flux()
    report = apply(module, read(file), 1.0)
    assert report.summary() == "1 applied"


def test_a_text_encoder_takes_only_its_part():
    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            inner = torch.nn.Module()
            inner.encoder = torch.nn.Module()
            inner.encoder.layers = torch.nn.ModuleList(
                [torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"fc1": torch.nn.Linear(8, 8)})})]
            )
            self.text_model = inner

    parts = lora_files.factors({"text_model.encoder.layers.0.mlp.fc1": (8, 8)})
    file = {k.replace("lora_unet_", "lora_te_"): v for k, v in lora_files.spell(parts, "kohya").items()}
    file |= lora_files.spell(lora_files.factors({"mid_block.x": (8, 8)}), "kohya")
    text = Text()
    assert apply(text, read(file), 1.0, TEXT).summary() == "1 applied, 1 for another part of the pipeline"
    told = apply(unet(), read(file), 1.0).summary()
    assert told == "0 applied, 1 for another part of the pipeline, 1 unknown to this model"


def test_canonical_is_one_name():
    assert canonical("a.b.processor.to_q") == canonical("a_b_to_q") == canonical("a.b.to_q")
