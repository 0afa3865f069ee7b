"""Small UNets of SD1.5's and SDXL's shape in diffusers, a CLIP tower, IP-Adapter files for them, and what diffusers
draws.
"""

import torch
from comfyui_nibble import image_prompt
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

CONTEXT, EMBED, HIDDEN, SIZE = 64, 48, 64, 32
SHAPES = {
    "sd15": dict(
        block_out_channels=(32, 64, 96, 96), layers_per_block=2, cross_attention_dim=CONTEXT, attention_head_dim=8,
    ),
    "sdxl": dict(
        block_out_channels=(32, 32, 64), layers_per_block=2, cross_attention_dim=CONTEXT, attention_head_dim=(2, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=16, projection_class_embeddings_input_dim=128,
    ),
}  # fmt: skip
# The same in ComfyUI's words
COMFYUI = {
    "sd15": dict(
        model_channels=32, num_res_blocks=[2] * 4, channel_mult=[1, 2, 3, 3], transformer_depth=[1] * 6 + [0] * 2,
        transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, use_linear_in_transformer=False,
        adm_in_channels=None, num_heads=8, num_head_channels=-1,
    ),
    "sdxl": dict(
        model_channels=32, num_res_blocks=[2] * 3, channel_mult=[1, 1, 2], transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0] * 3 + [2] * 3 + [10] * 3, transformer_depth_middle=10,
        use_linear_in_transformer=True, adm_in_channels=128, num_classes="sequential", num_heads=-1,
        num_head_channels=16,
    ),
}  # fmt: skip


def randomised(shapes: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations finite and make every key matter."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        one = name.endswith("weight") and len(shape) == 1
        # LoRAs smaller: random ones on queries and keys sharpen attention until rounding shows
        size = 0.3 if name.endswith(".up.weight") else 1.5
        out[name] = 1 + 0.1 * noise if one else noise * (0.05 if len(shape) == 1 else size / noise[0].numel() ** 0.5)
    return out


def unet(shape: str):
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=16, **SHAPES[shape]).eval().requires_grad_(False)


def tower() -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                              image_size=SIZE, patch_size=8, projection_dim=EMBED)  # fmt: skip
    # ComfyUI keeps towers in 16 bits: the same numbers on both sides
    return CLIPVisionModelWithProjection(config).half().float().eval().requires_grad_(False)


def image_keys(kind: str) -> dict[str, tuple]:
    """Keys and shapes under image_proj. of a variant; spelled out, as published files have them."""
    c, e, h, d = CONTEXT, EMBED, HIDDEN, 128
    if kind == "plain":
        return {"proj.weight": (4 * c, e), "proj.bias": (4 * c,), "norm.weight": (c,), "norm.bias": (c,)}
    if kind == "full":
        norm = {"proj.3.weight": (c,), "proj.3.bias": (c,)}
        return {"proj.0.weight": (h, h), "proj.0.bias": (h,), "proj.2.weight": (c, h), "proj.2.bias": (c,), **norm}
    keys = {"latents": (1, 16, d), "proj_in.weight": (d, h), "proj_in.bias": (d,), "proj_out.weight": (c, d),
            "proj_out.bias": (c,), "norm_out.weight": (c,), "norm_out.bias": (c,)}  # fmt: skip
    for n in range(4):
        p = f"layers.{n}."
        keys |= {f"{p}0.norm{i}.{w}": (d,) for i in (1, 2) for w in ("weight", "bias")}
        keys |= {f"{p}0.to_q.weight": (128, d), f"{p}0.to_kv.weight": (256, d), f"{p}0.to_out.weight": (d, 128)}
        keys |= {
            f"{p}1.0.weight": (d,),
            f"{p}1.0.bias": (d,),
            f"{p}1.1.weight": (4 * d, d),
            f"{p}1.3.weight": (d, 4 * d),
        }
    return keys


def adapter_file(model, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """An IP-Adapter for ``model``, its layers numbered as diffusers' attention processors are."""
    widths = {}
    for number, name in enumerate(model.attn_processors):
        if ".attn2." in name:
            widths[number] = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
    keys = {f"ip_adapter.{n}.{part}.weight": (w, CONTEXT) for n, w in widths.items() for part in ("to_k_ip", "to_v_ip")}
    if kind == "lora":
        full, keys = keys, {}
        for name in full:
            stem, (w, c) = name.removesuffix("to_k_ip.weight").removesuffix("to_v_ip.weight"), full[name]
            for part, size in (("to_k_ip", c), ("to_v_ip", c), ("to_q_ip", w), ("to_out_ip", w)):
                keys |= {f"{stem}{part}.down.weight": (4, size), f"{stem}{part}.up.weight": (w, 4)}
    image = image_keys("plain" if kind == "lora" else kind)
    return randomised(keys | {f"image_proj.{k}": v for k, v in image.items()}, seed)


def features(clip, pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """(2, n, ...): of no image and of ``pixels`` (n, 3, H, W), as tencent-ailab/IP-Adapter makes them."""
    if kind in ("plain", "lora"):
        found = clip(pixels).image_embeds
        return torch.stack([torch.zeros_like(found), found])
    found = [clip(p, output_hidden_states=True).hidden_states[-2] for p in (torch.zeros_like(pixels), pixels)]
    return torch.stack(found)


def drawn(model, x: dict, files: list[dict], given: list[torch.Tensor]) -> torch.Tensor:
    """One forward of a UNet with IP-Adapters loaded by diffusers itself; ``given``: each one's features."""
    halves = [{half: {k.removeprefix(f"{half}."): v for k, v in file.items() if k.startswith(half)}
               for half in ("image_proj", "ip_adapter")} for file in files]  # fmt: skip
    model._load_ip_adapter_weights(halves, low_cpu_mem_usage=False)
    model.config.encoder_hid_dim_type = "ip_image_proj"
    added = {"image_embeds": given} | {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    return model(x["x"], x["t"], x["text"], added_cond_kwargs=added).sample


def drawn_by_ours(model, x: dict, file: dict, given: torch.Tensor) -> torch.Tensor:
    """The same for the LoRA variant, which diffusers does not know, with this pack's processor."""
    adapter = image_prompt.read(file)
    image_prompt.attach(model, adapter)
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    return model(x["x"], x["t"], x["text"], added_cond_kwargs=added,
                 cross_attention_kwargs={"ip_hidden_states": adapter(given[:, 0])}).sample  # fmt: skip


def inputs(shape: str) -> dict[str, torch.Tensor]:
    """[no prompt, prompt] of two latents each, as samplers batch them."""
    g = torch.Generator().manual_seed(2)
    out = {"x": torch.randn(4, 4, 16, 16, generator=g), "t": torch.full((4,), 500.0),
           "text": torch.randn(4, 9, CONTEXT, generator=g)}  # fmt: skip
    if shape == "sdxl":
        out |= {
            "text_embeds": torch.randn(4, 32, generator=g),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4),
        }
    return out
