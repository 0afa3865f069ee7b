"""Small checkpoints with the real families' names, and their quantized files."""

import pytest
import torch
from comfyui_nibble.checkpoints import convert
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.families import by_id
from safetensors.torch import save_file

FLUX = {"num_layers": 1, "num_single_layers": 1}
UNET = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [64, 128], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64, "attention_head_dim": 4, "sample_size": 8, "in_channels": 4, "out_channels": 4,
}  # fmt: skip


def flux_tensors(d: int = 64, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """A one-plus-one-block FLUX.1 in native names, random."""
    g = torch.Generator().manual_seed(0)
    rows = {
        "img_in": (d, 64),
        "txt_in": (d, 64),
        "final_layer.linear": (64, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for a, b in (("time_in", 256), ("guidance_in", 256), ("vector_in", 64)):
        rows |= {f"{a}.in_layer": (d, b), f"{a}.out_layer": (d, d)}
    for h in ("img", "txt"):
        rows |= {
            f"double_blocks.0.{h}_{n}": s
            for n, s in (
                ("mod.lin", (6 * d, d)),
                ("attn.qkv", (3 * d, d)),
                ("attn.proj", (d, d)),
                ("mlp.0", (4 * d, d)),
                ("mlp.2", (d, 4 * d)),
            )
        }
    rows |= {
        "single_blocks.0.linear1": (7 * d, d),
        "single_blocks.0.linear2": (d, 5 * d),
        "single_blocks.0.modulation.lin": (3 * d, d),
    }
    out = {}
    for name, shape in rows.items():
        out[f"{name}.weight"] = (torch.randn(shape, generator=g) / shape[1] ** 0.5).to(dtype)
        out[f"{name}.bias"] = (0.02 * torch.randn(shape[0], generator=g)).to(dtype)
    for block in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for n in ("query_norm", "key_norm"):
            out[f"{block}.norm.{n}.weight"] = torch.ones(32, dtype=dtype)
    return out


@pytest.fixture
def flux_file(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file(flux_tensors(), path, {"modelspec.title": "tiny", "secret": "/home/me"})
    return path


@pytest.fixture
def flux_4bit(flux_file, tmp_path):
    with open_source(flux_file) as source:
        return convert.quantize(source, tmp_path / "flux-4bit.safetensors", convert.Options(rank=16)).path


@pytest.fixture
def family():
    return by_id
