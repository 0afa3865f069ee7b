"""Writes an SD1.5 checkpoint as people have them: tiny UNet, CLIP-L and VAE with random weights. ARGS: out file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, comfyui, torch

sys.argv = ["tiny_models.py", comfyui, "."]
sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_models  # noqa: E402
from comfy import sd1_clip  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.manual_seed(0)
tensors = {f"model.diffusion_model.{k}": v.half() for k, v in tiny_models.randomised(tiny_models.sd15()).items()}
clip = sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32)
state = tiny_models.randomised(clip.clip_l.transformer)
tensors |= {f"cond_stage_model.transformer.{k}": v.half() for k, v in state.items() if "text_projection" not in k}
dd = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
      "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
vae = AutoencoderKL(ddconfig=dd, embed_dim=4)
tensors |= {
    f"first_stage_model.{k}": v.half() for k, v in tiny_models.randomised(vae).items() if not k.startswith("loss")
}
save_file({k: v.contiguous() for k, v in tensors.items()}, args[0])
print("{}")
