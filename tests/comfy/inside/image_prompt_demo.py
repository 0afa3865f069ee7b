"""The demo's IP-Adapters on its 16-bit and its 4-bit model, and Uni-ControlNet's tokens: GLOBAL_ADAPTER -> figures."""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, pack, torch  # first: it puts ComfyUI where the imports below find it

torch.set_grad_enabled(False)
import comfy.model_management as mm  # noqa: E402
import numpy as np  # noqa: E402
from nibble_pack import demo as shipped  # noqa: E402
from nibble_pack.image_prompt import load  # noqa: E402
from nibble_pack.nodes import image_prompt as topic  # noqa: E402
from nibble_pack.nodes.bridge import demo, image_prompt  # noqa: E402
from nibble_pack.quant import kernels  # noqa: E402
from PIL import Image  # noqa: E402

models = {"16": demo.model(False), "4": demo.model(True)}
tower, clip = demo.vision(), demo.clip()
picture = Image.open(sorted(shipped.PICTURES.glob("*.webp"))[0]).convert("RGB").resize((128, 128))
image = torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
words = torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in ("", "fox")])
noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def run(model) -> torch.Tensor:
    """The denoised latents of [no prompt, prompt] at three noise levels."""
    mm.load_models_gpu([model])
    options = model.model_options["transformer_options"] | {"cond_or_uncond": [1, 0]}
    out = []
    for sigma in (10.0, 3.0, 0.7):
        sigmas = torch.full((2,), sigma)
        given = options | {"sigmas": sigmas}
        out.append(
            model.model.apply_model(noise * (sigma**2 + 1) ** 0.5, sigmas, c_crossattn=words, transformer_options=given)
        )
    return torch.stack(out)


def codes(model) -> str:
    found = hashlib.sha256()
    for module in model.model.diffusion_model.modules():
        if getattr(module, "layout_type", None) in kernels.OURS:
            found.update(module.weight._qdata.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


before = {bits: run(m) for bits, m in models.items()}
out = {"4-bit error": relative(before["4"], before["16"]), "codes": codes(models["4"])}
for name, path in shipped.IP_ADAPTERS.items():
    adapter = image_prompt.adapter(str(path))
    dtypes = {str(p.dtype) for p in adapter.parameters()}
    how = image_prompt.How(1.0)
    after = {bits: run(image_prompt.apply(m, adapter, tower, image, how)) for bits, m in models.items()}
    moved = {bits: after[bits] - before[bits] for bits in models}
    none = run(image_prompt.apply(models["4"], adapter, tower, image, image_prompt.How(0.0)))
    out[name] = {
        "error with it": relative(after["4"], after["16"]),
        "moved": moved["16"].norm().item() / before["16"].norm().item(),
        "cosine of the move": torch.nn.functional.cosine_similarity(
            moved["4"].flatten(), moved["16"].flatten(), 0
        ).item(),
        "weight 0": torch.equal(none, before["4"]),
        "dtypes": sorted(dtypes),
        "16 bits after use": {str(p.dtype) for p in adapter.parameters()} == dtypes,
    }
out["same codes"] = codes(models["4"]) == out.pop("codes")

# Uni-ControlNet: lengths, untouched text, the tokens of the image and of none
text = [[words[1:], {"pooled_output": None}]]
positive, negative = image_prompt.append_tokens(text, [[words[:1], {}]], tower, image, args[0], 0.75)
module = load(args[0]).float()
embeds = tower.encode_image(image)["image_embeds"].float()
expected = (0.75 * module(embeds)[0], 0.75 * module(torch.zeros_like(embeds))[0])
n = words.shape[1]
out["uni"] = {
    "tokens": [positive[0][0].shape[1] - n, negative[0][0].shape[1] - n],
    "text kept": torch.equal(positive[0][0][:, :n], words[1:]) and torch.equal(negative[0][0][:, :n], words[:1]),
    "error": max((p[0][0][0, n:] - e).abs().max().item() for p, e in zip((positive, negative), expected, strict=True)),
    "given back": len(text[0][0][0]) == n,
}
try:
    topic.NibbleLoadIPAdapter.execute("adapter.bin")
except ValueError as e:
    out["pickle"] = str(e)
out["loaded as"] = pack.__name__
json.dump(out, sys.stdout)
print()
