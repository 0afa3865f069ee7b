"""Which module a file becomes: every variant from its key shapes, its size, and what is refused."""

import pytest
import torch
from adapter_shapes import FILES, SD15, SDXL, layers, linear, patches, resampler, uni
from comfyui_nibble import image_prompt
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

SD15_CONFIG = dict(cross_attention_dim=768, attention_head_dim=8)
SDXL_CONFIG = dict(
    block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
)  # fmt: skip


def test_a_file_becomes_the_module_with_just_its_keys_and_size(file):
    name, shapes, million = file
    built = image_prompt.from_shapes(shapes, device="meta")
    prefix = "" if isinstance(built, image_prompt.ImagePrompt) else "global_adapter."
    assert {prefix + k: tuple(v.shape) for k, v in built.state_dict().items()} == shapes, name
    count = sum(p.numel() for p in built.parameters())
    assert f"{count / 1e6:.2f}" == f"{million:.2f}"


def test_the_published_global_adapter_to_the_parameter():
    built = image_prompt.from_shapes(FILES["Uni-ControlNet (global), published"][0], device="meta")
    assert sum(p.numel() for p in built.parameters()) == 47_213_568


@pytest.mark.parametrize(("config", "widths"), [(SD15_CONFIG, SD15), (SDXL_CONFIG, SDXL)], ids=["SD1.5", "SDXL"])
def test_cross_attentions_are_counted_as_diffusers_counts_them(config, widths):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    found = image_prompt.attention.sites(unet)
    theirs = [(n, name) for n, name in enumerate(unet.attn_processors) if ".attn2." in name]
    assert [f"{s.name}.processor" for s in found] == [name for _, name in theirs]
    assert [2 * n + 1 for n in range(len(found))] == [n for n, _ in theirs]
    assert [s.hidden for s in found] == widths


def test_style_and_composition_of_sdxl_are_the_transformers_of_instantstyle():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_CONFIG)
    found = image_prompt.attention.sites(unet)
    style, composition = (image_prompt.attention.chosen(found, b) for b in ("style", "composition"))
    assert {s.transformer for s in style} == {"up_blocks.0.attentions.1"} and len(style) == 10
    assert {s.transformer for s in composition} == {"down_blocks.2.attentions.1"} and len(composition) == 10
    with pytest.raises(ValueError, match="it may be all, style, composition"):
        image_prompt.attention.chosen(found, "both")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "IP-Adapter MLP LoRA",
            ("MLP, keys and values LoRA of rank 128", "SD1.5 (16", "512 (CLIP ViT-B)", "image: 4", "24.27"),
        ),
        ("ip-adapter-plus_sdxl_vit-h", ("plus (or plus-face)", "SDXL (70", "1280 (CLIP ViT-H/14)", "image: 16")),
        ("ip-adapter-full-face_sd15", ("full-face", "hidden states of width 1280", "one a patch")),
        ("ip-adapter_sdxl", ("plain, keys and values full", "1280 (CLIP ViT-bigG/14)")),
    ],
)
def test_the_report_says_what_goes_with_it(name, words):
    report = image_prompt.describe(image_prompt.from_shapes(FILES[name][0], device="meta"))
    assert [w for w in words if w not in report] == []


GOOD = linear(8, 16) | layers([32, 64], 16)
BAD = {
    "a LoRA": ({"lora_unet_x.lora_up.weight": (1, 1)}, "it has no image_proj"),
    "FaceID": (GOOD | {"ip_adapter.0.to_q_lora.down.weight": (4, 8)}, "it is a FaceID adapter"),
    "FaceID plus": (GOOD | {"image_proj.perceiver_resampler.proj_in.weight": (4, 8)}, "it is a FaceID adapter"),
    "another projection": ({"image_proj.a": (1,)} | layers([32], 16), "neither a linear, an MLP"),
    "a key too many": (GOOD | {"image_proj.extra": (3,)}, r"image_proj.extra is \(3,\), expected no such key"),
    "half a layer": ({k: v for k, v in GOOD.items() if "3.to_v_ip" not in k}, "instead of to_k_ip and to_v_ip"),
    "no bias": ({k: v for k, v in GOOD.items() if "norm.bias" not in k}, r"norm.bias is missing, expected \(16,\)"),
    "half a Uni-ControlNet": ({"global_adapter.norm1.weight": (8,)}, "global_adapter.ff1.net.0.proj.weight is missing"),
    "another width": (uni(8, 4) | {"global_adapter.ff2.net.2.weight": (5, 64)}, r"expected \(32, 64\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_in_a_sentence(case, tmp_path):
    shapes, why = BAD[case]
    save_file({k: torch.zeros(v) for k, v in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{why}"):
        image_prompt.load(tmp_path / "x.safetensors")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"<html>404</html>" * 9)
    with pytest.raises(ValueError, match=r"x.safetensors: not a whole safetensors file .* Download it again"):
        image_prompt.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "image", [linear(8, 16), patches(8, 16), resampler(8, 16, 64, 2)], ids=["linear", "patches", "plus"]
)
def test_a_file_comes_back_as_it_was_written(image, tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(v, generator=g).half() for k, v in (image | layers([32, 64], 16)).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    read = image_prompt.load(tmp_path / "x.safetensors").state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)


def test_uni_controlnet_reads_its_part_of_a_larger_checkpoint(tmp_path):
    part = {k: torch.ones(v) for k, v in uni(8, 4).items()}
    save_file(part | {"model.diffusion_model.x": torch.zeros(4)}, tmp_path / "x.safetensors")
    assert image_prompt.load(tmp_path / "x.safetensors")(torch.ones(2, 8)).shape == (2, 4, 8)
