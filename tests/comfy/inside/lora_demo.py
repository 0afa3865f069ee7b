"""ARGS: LoRA file, steps. The demo model in 16 and 4 bits, with and without its style LoRA.

1. Direction: (patched 4-bit - unpatched 4-bit) against (patched 16-bit - unpatched 16-bit) of the denoiser's output.
2. Style: which style's thumbnail of the same emoji a picture is nearest to, for the emoji that the LoRA learned, and
   for others, which it leaves as they are. Captions that no training saw are told apart.
"""

import json

from lora_common import args, codes_hash, comfy, cosine, mm, ours, torch, with_lora

lora_file, steps = args[0], int(args[1])
demo, recognise, evaluate = ours("nodes.bridge.demo"), ours("demo.recognise"), ours("demo.evaluate")
references = {style: recognise.load(style) for style in ("noto", "twemoji")}
names = references["noto"].names
unseen = set(json.loads((ours("demo").ROOT / "training.json").read_text())["evaluation"]["held_out"])
learned = range(evaluate.STYLED)
captions = {i: next((c for c in n if c in unseen), n[-1]) for i, n in enumerate(names)}
rows = [i for i, caption in captions.items() if (i in learned and i % 2) or caption in unseen]
clip, vae = demo.clip(), demo.vae()


def encode(texts: list[str]) -> list:
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0][0] for t in texts]
    return [[torch.cat(conds), {}]]


plain, negative = encode([captions[i] for i in rows]), encode([""] * len(rows))
positive = encode([f"{captions[i]}, flat style" for i in rows])
noise = torch.randn(len(rows), 4, 16, 16, generator=torch.Generator().manual_seed(0))
file = comfy.utils.load_torch_file(lora_file)
variants = {"16": demo.model(False), "4": demo.model(True, 16)}
codes = codes_hash(variants["4"])
variants |= {f"{name}+lora": with_lora(m, file) for name, m in list(variants.items())}


def sample(model, positive) -> torch.Tensor:
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, steps, 3.0, "ddim", "ddim_uniform", positive, negative, empty,
                               disable_pbar=True, seed=0)  # fmt: skip


# Without the LoRA the trigger is a word the model never saw.
latents = {name: sample(m, positive if "lora" in name else plain) for name, m in variants.items()}
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
groups = {
    "learned": [i in learned for i in rows],
    "learned, caption unseen": [i in learned and captions[i] in unseen for i in rows],
    "others": [i not in learned for i in rows],
}
result["flat style"] = {
    group: {
        name: sum(s for s, use in zip(flat, members, strict=True) if use) / sum(members)
        for name, flat in styles.items()
    }
    for group, members in groups.items()
}
result["members"] = {group: sum(members) for group, members in groups.items()}
result["recognised"] = {name: sum(s) / len(s) for name, s in seen.items()}
pairs = list(zip(styles["16+lora"], styles["4+lora"], strict=True))
result["agreement"] = sum(a == b for a, b in pairs) / len(pairs)
print(json.dumps(result))
