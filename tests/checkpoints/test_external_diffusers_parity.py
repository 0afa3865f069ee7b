"""Our key maps against diffusers' own single-file converters: native -> diffusers gives back every tensor exactly."""

import pytest
import torch
from comfyui_nibble.checkpoints import convert
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.families import by_diffusers_class, by_id, detect, detect_published
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs


def unet(**more):
    base = dict(
        sample_size=8, layers_per_block=2, block_out_channels=(32, 64), cross_attention_dim=64, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return UNet2DConditionModel(**{**base, **more})


def sdxl():
    return unet(
        cross_attention_dim=2048, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=112,
        attention_head_dim=(2, 4),
    )  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux2(**more):
    return Flux2Transformer2DModel(**{**dict(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8),
    ), **more})  # fmt: skip


def sd3():
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip


def back_unet(native, model):
    prefixed = {f"model.diffusion_model.{k}": v for k, v in native.items()}
    return theirs.convert_ldm_unet_checkpoint(prefixed, dict(model.config))


CASES = {
    "sd15": (unet, back_unet),
    "sdxl": (sdxl, back_unet),
    "flux": (flux, None),
    "flux2": (flux2, lambda native, _: theirs.convert_flux2_transformer_checkpoint_to_diffusers(native)),
    "sd3": (sd3, lambda native, _: theirs.convert_sd3_transformer_checkpoint_to_diffusers(native)),
}


def randomised(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux2", "sd3"])
def test_native_names_convert_back(name, tmp_path):
    make, back = CASES[name]
    model = randomised(make())
    model.save_pretrained(tmp_path / "m")
    with open_source(tmp_path / "m") as source:
        assert source.family.id == name
        native = {k: source.get(k) for k in source}
        assert {k: tuple(v.shape) for k, v in native.items()} == source.shapes
    again = back(native, model)
    expected = model.state_dict()
    assert set(again) == set(expected)
    wrong = [k for k, v in expected.items() if not torch.equal(again[k], v)]
    assert not wrong


def test_flux_names_convert_back():
    """diffusers' Flux converter knows the real widths only: real rows, one column."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    expected = {k: torch.randn(v.shape[0], *[1] * (v.dim() - 1)) for k, v in model.state_dict().items()}
    native = {}
    for rule in by_id("flux").key_rules(model.config):
        if rule.sources[0] not in expected:
            continue  # q/k norms have no bias
        value = torch.cat([expected[s] for s in rule.sources])
        # its converter wants the older spelling of the norms
        name = rule.native.replace("_norm.weight", "_norm.scale")
        native[name] = torch.cat(value.chunk(2)[::-1]) if rule.swap_halves else value
    again = theirs.convert_flux_transformer_checkpoint_to_diffusers(native)
    assert set(again) == set(expected)
    assert not [k for k, v in expected.items() if not torch.equal(again[k], v)]


@pytest.mark.parametrize("name", CASES)
def test_family_is_recognised_from_native_names(name, tmp_path):
    make, _ = CASES[name]
    make().save_pretrained(tmp_path / "m")
    with open_source(tmp_path / "m") as source:
        for prefix in ("", "model.diffusion_model."):
            family, found = detect({prefix + k: s for k, s in source.shapes.items()})
            assert (family.id, found) == (name, prefix)


@pytest.mark.parametrize("name", CASES)
def test_policy_names_the_same_layers_in_both_spellings(name, tmp_path):
    """What is 4-bit in a native file is 4-bit in a diffusers module."""
    from comfyui_nibble.quant.modules import linear_shapes
    from comfyui_nibble.quant.policy import plan
    from comfyui_nibble.quant.schemes import KEEP

    make, _ = CASES[name]
    model = make()
    family = by_diffusers_class(type(model).__name__, model.config)
    inside = {
        n: (p.scheme, p.act_unsigned)
        for n, p in plan(linear_shapes(model), family.rules, 16).items()
        if p.scheme != KEEP
    }
    model.save_pretrained(tmp_path / "m")
    with open_source(tmp_path / "m") as source:
        shapes = convert.model_layers(source.shapes, "")
        native = plan(shapes, family.rules, 16)
        seen = {}
        for rule in source.rules.values():
            layer = rule.native.removesuffix(".weight")
            if rule.native.endswith(".weight") and native[layer].scheme != KEEP:
                seen |= dict.fromkeys(
                    (s.removesuffix(".weight") for s in rule.sources),
                    (native[layer].scheme, native[layer].act_unsigned),
                )
    assert seen == inside and inside


def ran(model, path, **inputs) -> tuple:
    """(the float model's output, the output with the layers of the 4-bit file in place, how many those are)."""
    from types import SimpleNamespace

    from comfyui_nibble.headless import pipeline

    with torch.no_grad():
        expected = model(**inputs).sample
        layers = pipeline.install_file(SimpleNamespace(unet=None, transformer=model), path)
        return expected, model(**inputs).sample, layers


def test_a_4bit_flux2_file_runs_in_the_diffusers_model(tmp_path, sqnr):
    """And nothing in it is unsigned, modulations stay as they are, and both spellings of its names are read."""
    model = flux2().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=1 / max(1, p.shape[-1]) ** 0.5 if p.dim() > 1 else 0.05)
    model.save_pretrained(tmp_path / "m")
    with open_source(tmp_path / "m") as source:
        done = convert.quantize(source, tmp_path / "flux2.safetensors")
    layers = load(done.path).layers
    assert len(layers) == 2 * 8 + 2 * 2 and not any(x.weight.act_unsigned for x in layers.values())
    kept = {n for n, p in convert.plan_source(source, 32).items() if p.scheme == "keep"}
    assert kept >= {"double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "final_layer.linear",
                    "single_stream_modulation.lin", "img_in", "txt_in"}  # fmt: skip
    found, published, _ = detect_published(model.state_dict())
    assert (found.id, published.title) == ("flux2", "diffusers")
    expected, got, count = ran(
        model, done.path, hidden_states=torch.randn(1, 16, 16), encoder_hidden_states=torch.randn(1, 4, 64),
        timestep=torch.tensor([0.7]), guidance=torch.tensor([3.5]), img_ids=torch.zeros(16, 4),
        txt_ids=torch.zeros(4, 4),
    )  # fmt: skip
    assert count == len(layers) + 2 * 2 * 2  # three q, k and v for each fused one
    assert sqnr(expected, got) > 15


def test_a_4bit_flux_file_runs_in_the_diffusers_model(tmp_path, sqnr):
    """Fused q/k/v of the native file come apart in diffusers' separate layers without a loss."""
    model = randomised(FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    )).eval()  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=1 / max(1, p.shape[-1]) ** 0.5 if p.dim() > 1 else 0.05)
    model.save_pretrained(tmp_path / "m")
    with open_source(tmp_path / "m") as source:
        path = convert.quantize(source, tmp_path / "flux.safetensors").path
    inputs = dict(
        hidden_states=torch.randn(1, 16, 16), encoder_hidden_states=torch.randn(1, 4, 64),
        pooled_projections=torch.randn(1, 64),
        timestep=torch.tensor([0.7]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(4, 3),
    )  # fmt: skip
    expected, got, layers = ran(model, path, **inputs)
    assert layers == len(load(path).layers) + 2 + 2 + 3  # three qkv and one qkv+mlp come apart
    assert sqnr(expected, got) > 18
