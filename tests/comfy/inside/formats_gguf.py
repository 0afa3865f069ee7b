"""A GGUF file through this pack's loader, and the float file through ComfyUI's: the same forward pass.

ARGS: the GGUF file, the float file, the folder that holds the gguf library. Prints {"error", "layers", "share",
"lora"}.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, torch

torch.set_grad_enabled(False)
sys.path.append(args[2])  # last: everything but gguf comes from ComfyUI's own environment
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402

load = importlib.import_module("nibble_pack.nodes.bridge.load")
kernels = importlib.import_module("nibble_pack.quant.kernels")


def forward(patcher) -> torch.Tensor:
    mm.load_models_gpu([patcher], force_full_load=True)
    g = torch.Generator().manual_seed(1)
    x, text, y = (torch.randn(s, generator=g) for s in ((1, 16, 8, 8), (1, 12, 64), (1, 64)))
    return patcher.model.apply_model(
        x, torch.tensor([0.5]), c_crossattn=text, y=y, guidance=torch.tensor([3.5])
    ).float()


four_bit, plain = load.diffusion_model(args[0]), comfy.sd.load_diffusion_model(args[1])
ours = [m.weight for m in four_bit.model.diffusion_model.modules() if kernels.is_ours(getattr(m, "weight", None))]
got, want = forward(four_bit), forward(plain)
up, down = torch.randn(256, 4) / 8, torch.randn(4, 256) / 16
key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
patched = four_bit.clone()
patched.add_patches({key: ("diff", (up @ down,))}, 1.0)
print(json.dumps({
    "error": float((got - want).norm() / want.norm()),
    "layers": len(ours),
    "share": sum(w._qdata.nbytes for w in ours) / sum(2 * w.numel() for w in ours),
    "lora": float((forward(patched) - got).norm() / got.norm()),
}))  # fmt: skip
