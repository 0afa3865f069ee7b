"""What every layer of ComfyUI's own classes is fed, against what the families claim: {model: [family, layers that are
claimed to read a GELU, 4-bit layers, the lowest value that the former got, others that were fed nothing lower either]}.
"""

import importlib
import json

from _start import torch  # first: it puts ComfyUI where the imports below find it

torch.set_grad_enabled(False)
import comfy.ldm.flux.model as flux  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.ldm.chroma.model import Chroma  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.ldm.pixart.pixartms import PixArtMS  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402

families = importlib.import_module("nibble_pack.families")
plan = importlib.import_module("nibble_pack.quant.policy").plan
OPS = dict(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
FLUX = dict(
    in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=128, mlp_ratio=4.0,
    num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=True,
    txt_ids_dims=[],
)  # fmt: skip
GATED = dict(
    in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, mlp_ratio=3.0, axes_dim=[32] * 4, theta=2000,
    qkv_bias=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
)  # fmt: skip
CHROMA = {k: v for k, v in FLUX.items() if k not in ("guidance_embed",)} | dict(
    in_channels=64, out_channels=64, in_dim=64, out_dim=128, hidden_dim=64, n_layers=1, vec_in_dim=None
)
g = torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randn(shape, generator=g)


X, T, TEXT = noise(1, 16, 16, 16), torch.tensor([0.5]), noise(1, 20, 64)
GUIDE = dict(guidance=torch.tensor([3.5]))
MODELS = {
    "flux": (lambda: flux.Flux(**FLUX, **OPS), (X, T, TEXT), dict(y=noise(1, 64), **GUIDE)),
    "ovis": (lambda: flux.Flux(**FLUX | dict(yak_mlp=True, txt_norm=True), **OPS), (X, T, TEXT),
             dict(y=noise(1, 64), **GUIDE)),
    "flux2": (lambda: flux.Flux(**FLUX | GATED, **OPS), (noise(1, 128, 8, 8), T, TEXT), GUIDE),
    "flux2 with modulations of its own": (lambda: flux.Flux(**FLUX | GATED | dict(global_modulation=False), **OPS),
                                          (noise(1, 128, 8, 8), T, TEXT), GUIDE),
    "chroma": (lambda: Chroma(**CHROMA, **OPS), (X, T, TEXT), GUIDE),
    "sd3": (lambda: OpenAISignatureMMDITWrapper(
        input_size=None, pos_embed_scaling_factor=None, pos_embed_offset=None, pos_embed_max_size=64, num_patches=4096,
        patch_size=2, in_channels=16, depth=2, adm_in_channels=64, context_embedder_config={
            "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}, **OPS),
        (X, T, TEXT), dict(y=noise(1, 64))),
    "qwen_image": (lambda: QwenImageTransformer2DModel(
        in_channels=64, num_layers=1, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64, **OPS),
        (noise(1, 16, 1, 16, 16), T, TEXT), {}),
    "pixart": (lambda: PixArtMS(
        hidden_size=128, depth=1, num_heads=2, caption_channels=64, model_max_length=20, micro_condition=False,
        pe_interpolation=1, input_size=64, pe_precision=2, **OPS), (noise(1, 4, 64, 64), T, TEXT), {}),
}  # fmt: skip
result = {}
for name, (make, args, kwargs) in MODELS.items():
    model = make().eval()
    for p in model.parameters():
        p.data = noise(*p.shape) / p[0].numel() ** 0.5 if p.dim() > 1 else 1 + 0.1 * noise(*p.shape)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    family, _ = families.detect({k: tuple(v.shape) for k, v in model.state_dict().items()})
    plans, lowest = plan(shapes, family.rules, 16), {}

    def see(layer, lowest=lowest):
        def hook(_module, inputs):
            lowest[layer] = min(lowest.get(layer, torch.inf), float(inputs[0].min()))

        return hook

    for layer in shapes:
        model.get_submodule(layer).register_forward_pre_hook(see(layer))
    model(*args, **kwargs)
    claimed = {n for n, p in plans.items() if p.act_unsigned}
    four = {n for n, p in plans.items() if p.scheme == "svdquant_w4a4"}
    result[name] = [
        family.id, len(claimed), len(four), min([lowest[n] for n in claimed], default=None),
        sorted(n for n in four - claimed if lowest.get(n, -1) >= -0.171875),
    ]  # fmt: skip
print(json.dumps(result))
