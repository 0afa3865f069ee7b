"""ARGS: LoRA file, number of captions, steps. The demo model in 16 and 4 bits, with and without its style LoRA.

1. Direction: (patched 4-bit - unpatched 4-bit) against (patched 16-bit - unpatched 16-bit) of the denoiser's output.
2. Style: which style's thumbnail of the same emoji a picture is nearest to. Captions are the last name of each
   reference, which is a held-out one where the emoji has one.
"""

import json

from lora_common import args, codes_hash, comfy, cosine, mm, ours, torch, with_lora

lora_file, count, steps = args[0], int(args[1]), int(args[2])
demo, recognise = ours("nodes.bridge.demo"), ours("demo.recognise")
references = {style: recognise.load(style) for style in ("noto", "twemoji")}
names = references["noto"].names
rows = [i for i, n in enumerate(names) if len(n) > 1][:count]
clip, vae = demo.clip(), demo.vae()


def encode(texts: list[str]) -> list:
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0][0] for t in texts]
    return [[torch.cat(conds), {}]]


positive, negative = encode([f"{names[i][-1]}, flat style" for i in rows]), encode([""] * len(rows))
noise = torch.randn(len(rows), 4, 16, 16, generator=torch.Generator().manual_seed(0))
file = comfy.utils.load_torch_file(lora_file)
variants = {"16": demo.model(False), "4": demo.model(True, 16)}
codes = codes_hash(variants["4"])
variants |= {f"{name}+lora": with_lora(m, file) for name, m in list(variants.items())}


def sample(model) -> torch.Tensor:
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, steps, 3.0, "ddim", "ddim_uniform", positive, negative, empty,
                               disable_pbar=True, seed=0)  # fmt: skip


latents = {name: sample(m) for name, m in variants.items()}
result = {"captions": len(rows), "same codes": codes_hash(variants["4+lora"]) == codes}

changes = {}
for bits in ("16", "4"):
    out = {}
    for name in (bits, f"{bits}+lora"):
        mm.load_models_gpu([variants[name]])
        model = variants[name].model
        x0 = model.process_latent_in(latents["16"])
        out[name] = torch.stack([
            model.apply_model(x0 + s * noise, torch.full((len(rows),), s), c_crossattn=positive[0][0])
            for s in (0.5, 1.5, 4.0, 10.0)
        ])  # fmt: skip
    changes[bits] = out[f"{bits}+lora"] - out[bits]
result["delta cosine"] = cosine(changes["4"], changes["16"])
result["delta size"] = (changes["4"].norm() / changes["16"].norm()).item()


def nearest(picture, style: str) -> int:
    return int(((references[style].thumbnails - picture) ** 2).mean((1, 2, 3)).argmin())


def closer_to_flat(picture, row: int) -> bool:
    noto, flat = (((references[s].thumbnails[row] - picture) ** 2).mean() for s in references)
    return bool(flat < noto)


styles, seen = {}, {}
for name, latent in latents.items():
    small = [recognise.thumbnail(p) for p in vae.decode(latent).clamp(0, 1).cpu().numpy()]
    styles[name] = [closer_to_flat(s, i) for s, i in zip(small, rows, strict=True)]
    seen[name] = [any(nearest(s, style) == i for style in references) for s, i in zip(small, rows, strict=True)]
result["flat style"] = {name: sum(s) / len(s) for name, s in styles.items()}
result["recognised"] = {name: sum(s) / len(s) for name, s in seen.items()}
pairs = list(zip(styles["16+lora"], styles["4+lora"], strict=True))
result["agreement"] = sum(a == b for a, b in pairs) / len(pairs)
print(json.dumps(result))
