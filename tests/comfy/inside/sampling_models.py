"""Writes tiny models of further families for the preset tests. ARGS: OUT folder, names. Same weights on every run.

Qwen-Image and Mage-Flow have fixed widths, so theirs have no block at all: embedders and output layer only. Z-Image,
ERNIE-Image and Boogu-Image cannot be small under ComfyUI's detection: their blocks have fixed widths above 3000.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, comfyui, torch

sys.argv = ["tiny_models.py", comfyui, "."]
sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_models  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.krea2.model import SingleStreamDiT  # noqa: E402
from comfy.ldm.lens.model import LensTransformer2DModel  # noqa: E402
from comfy.ldm.mage_flow.model import MageFlowTransformer2DModel  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

OPS, UNET = tiny_models.OPS, tiny_models.UNET


def sd2():
    return UNetModel(
        **UNET, num_res_blocks=[1], channel_mult=[1], context_dim=1024, num_heads=-1, num_head_channels=64,
        transformer_depth=[1], transformer_depth_output=[1, 0], transformer_depth_middle=-2,
        use_linear_in_transformer=True, **OPS,
    )  # fmt: skip


def flux_schnell():
    return Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=256, mlp_ratio=4.0,
        num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
        guidance_embed=False, txt_ids_dims=[], **OPS,
    )  # fmt: skip


def flux2():
    return Flux(
        in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, context_in_dim=64, hidden_size=128,
        mlp_ratio=3.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[32, 32, 32, 32], theta=2000,
        qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True,
        ops_bias=False, **OPS,
    )  # fmt: skip


def qwen_image():
    return QwenImageTransformer2DModel(num_layers=0, **OPS)


def mage_flow():
    return MageFlowTransformer2DModel(num_layers=0, **OPS)


def lens():
    return LensTransformer2DModel(
        num_layers=1, num_attention_heads=2, enc_hidden_dim=64, multi_layer_encoder_feature=False,
        selected_layer_index=(0,), **OPS,
    )  # fmt: skip


def krea2():
    return SingleStreamDiT(features=256, txtdim=160, heads=2, kvheads=1, layers=1, txtlayers=1, **OPS)


out = Path(args[0])
for name in args[1:]:
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in tiny_models.randomised(globals()[name]()).items()}
    save_file(state, out / f"{name}.safetensors")
print("{}")
