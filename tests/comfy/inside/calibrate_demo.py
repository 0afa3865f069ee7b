"""ARGS: number of captions, sampling steps, then preset:rank ... The demo model in 16 bits, calibrated by the node's
function with each preset, through ComfyUI's own sampler: mean PSNR in dB to the 16-bit pictures of the same noise.
"""

import json
import sys
import tempfile
from pathlib import Path

from lora_common import args, comfy, mm, ours, torch

count, steps, rows = int(args[0]), int(args[1]), [a.split(":") for a in args[2:]]
demo, recognise, bridge = ours("nodes.bridge.demo"), ours("demo.recognise"), ours("nodes.bridge.calibrate")
batch, domain, psnr = ours("prompts.batch"), ours("prompts.domain"), ours("metrics.images").mean_psnr
references = recognise.load()
captions = [n[0] for n in references.names[:count]]
clip, vae = demo.clip(), demo.vae()


def encode(texts: list[str]) -> list:
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0][0] for t in texts]
    return [[torch.cat(conds), {}]]


positive, negative = encode(captions), encode([""] * count)
noise = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))
texts = [p.positive for p in batch.unique(domain.load("emoji"), 16, 0)]
inputs = bridge.Inputs(bridge.encode(clip, texts, ""), torch.zeros(1, 4, 16, 16))


def pictures(model) -> list:
    latent = comfy.sample.sample(model, noise, steps, 3.0, "euler", "normal", positive, negative, noise * 0,
                                 disable_pbar=True, seed=0)  # fmt: skip
    return list(vae.decode(latent).clamp(0, 1).cpu().numpy())


def recognised(drawn: list) -> float:
    return sum(references.recognised(p, c) for p, c in zip(drawn, captions, strict=True)) / count


base = demo.model(False)
expected = pictures(base)
result = {"16-bit": {"recognised": recognised(expected)}}
with torch.inference_mode():
    for preset, rank in rows:
        settings = bridge.Settings(preset, "svdquant_w4a4", int(rank), 0, 25, 3.0, 0)
        with tempfile.TemporaryDirectory() as folder:
            model, solved, _, _ = bridge.calibrate(base, inputs, settings, Path(folder))
        drawn = pictures(model)
        result[f"{preset}:{rank}"] = {
            "psnr": psnr(expected, drawn),
            "recognised": recognised(drawn),
            "layers": len(solved),
        }
        print(json.dumps(result), file=sys.stderr, flush=True)
        mm.unload_all_models()
print(json.dumps(result))
