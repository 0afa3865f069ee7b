"""Writes small float models that ComfyUI's detection recognises: random weights, real shapes' rules.

Run by the suite in ComfyUI's own environment: ``python tiny_models.py COMFYUI OUT NAME...``. Same seed, same file.
"""

import sys
from pathlib import Path

comfyui, out, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, comfyui)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.cldm.cldm import ControlNet  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

OPS = dict(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False
)


SD15 = dict(
    num_res_blocks=[1], channel_mult=[1], context_dim=768, num_heads=8, num_head_channels=-1, transformer_depth=[1],
    use_linear_in_transformer=False,
)  # fmt: skip


def sd15():
    return UNetModel(**UNET, **SD15, transformer_depth_output=[1, 0], transformer_depth_middle=-2, **OPS)


def controlnet_sd15():
    """A ControlNet of `sd15`: the hint's eight-fold reduction, a copy of the way down, one output each."""
    shared = {k: v for k, v in UNET.items() if k != "out_channels"}
    return ControlNet(**shared, **SD15, hint_channels=3, transformer_depth_middle=-2, **OPS)


def sdxl():
    return UNetModel(
        **UNET, num_res_blocks=[2, 2, 2], channel_mult=[1, 1, 1], context_dim=2048, num_heads=-1, num_head_channels=64,
        transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_output=[0] * 9, transformer_depth_middle=-1,
        use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential", **OPS,
    )  # fmt: skip


def flux(hidden=256):
    return Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=hidden,
        mlp_ratio=4.0, num_heads=hidden // 128, depth=1, depth_single_blocks=1,
        axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
        guidance_embed=True, txt_ids_dims=[], **OPS,
    )  # fmt: skip


def flux2(hidden=256, double=1, single=1):
    """FLUX.1's class as ComfyUI's detection sets it up for FLUX.2: gated feed-forwards, one modulation, no biases."""
    return Flux(
        in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, context_in_dim=64, hidden_size=hidden,
        mlp_ratio=3.0, num_heads=hidden // 128, depth=double, depth_single_blocks=single, axes_dim=[32] * 4, theta=2000,
        qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True,
        ops_bias=False, default_ref_method="index", ref_index_scale=10.0, **OPS,
    )  # fmt: skip


def sd3(depth=2):
    linear = {"in_features": 128, "out_features": 64 * depth}
    return OpenAISignatureMMDITWrapper(
        input_size=None, pos_embed_scaling_factor=None, pos_embed_offset=None, pos_embed_max_size=64, num_patches=4096,
        patch_size=2, in_channels=16, depth=depth, adm_in_channels=128,
        context_embedder_config={"target": "torch.nn.Linear", "params": linear}, **OPS,
    )  # fmt: skip


def randomised(model):
    """Weights of a size that keeps activations finite over a few steps."""
    g = torch.Generator().manual_seed(0)
    out = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=g)
        if value.dim() >= 2:
            fan_in = value[0].numel()
            out[name] = noise / fan_in**0.5
        elif name.endswith("bias"):
            out[name] = 0.02 * noise
        else:
            out[name] = 1 + 0.1 * noise
    return out


if __name__ == "__main__":
    for name in names:
        save_file(randomised(globals()[name]()), out / f"{name}.safetensors")
