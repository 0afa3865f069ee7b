"""ARGS: float files. What a LoRA costs: merged and quantized again, as ComfyUI does for its own formats, against ours.

Per format, over every linear of the files that 4-bit would touch (K % 256 == 0), with D a rank-8 LoRA of 3 % of the
weight's norm and x Gaussian:
    unpatched  ||Q x - W x|| / ||W x||          before    of the weight alone
    patched    ||Q' x - (W + D) x|| / ||(W + D) x||
    noise      ||(Q' - Q) x - D x|| / ||D x||   how far what was added is from the LoRA, in sizes of the LoRA
"""

import json
from collections import defaultdict

from lora_common import args, comfy, kernels, lora_files, ours, patches, torch

quantize = ours("quant.modules").quantize_weight
LayerPlan = ours("quant.policy").LayerPlan
SHARE, RANK = 0.03, 8
CORE = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8", "int8_tensorwise", "float8_e4m3fn")
algorithms = comfy.ops.QUANT_ALGOS


def core(name):
    layout = algorithms[name]["comfy_tensor_layout"]

    def first(w):
        return comfy.ops.QuantizedTensor.from_float(w, layout, scale="recalculate")

    def again(q, w):  # what ComfyUI's Linear.set_weight does
        seed = comfy.utils.string_to_seed("layer")
        return q.requantize_from_float(w, scale="recalculate", stochastic_rounding=seed, inplace_ops=True)

    return first, again, lambda q: q.dequantize().float()


def ours_merged(scheme):
    plan = LayerPlan(scheme, "", 32 if scheme == "svdquant_w4a4" else 0)
    make = lambda w: kernels.wrap(quantize(w, None, plan, torch.bfloat16).weight)  # noqa: E731
    return make, lambda q, w: make(w), patches.dense


formats = {name: core(name) for name in CORE}
formats |= {f"{s}, merged": ours_merged(s) for s in ("svdquant_w4a4", "awq_w4a16")}
sums = defaultdict(lambda: [0.0, 0.0, 0.0, 0])


def note(name, w, d, before, after, x):
    y, yd, q, qd = (x @ t.t() for t in (w, w + d, before, after))
    row = sums[name]
    row[0] += ((q - y).norm() / y.norm()).item()
    row[1] += ((qd - yd).norm() / yd.norm()).item()
    row[2] += ((qd - q - (yd - y)).norm() / (yd - y).norm()).item()
    row[3] += 1


for path in args:
    tensors = comfy.utils.load_torch_file(path)
    names = [n for n, t in tensors.items() if t.dim() == 2 and t.shape[1] % 256 == 0 and t.shape[0] % 128 == 0]
    for number, name in enumerate(names[:24]):
        w = tensors[name].float()
        g = lora_files.generator(number)
        d = torch.randn(w.shape[0], RANK, generator=g) @ torch.randn(RANK, w.shape[1], generator=g)
        d *= SHARE * w.norm() / d.norm()
        x = torch.randn(256, w.shape[1], generator=g)
        for key, (first, again, dense) in formats.items():
            q = first(w.clone())
            before = dense(q)
            note(key, w, d, before, dense(again(q, before + d)), x)
        for scheme in ("svdquant_w4a4", "awq_w4a16"):
            q = formats[f"{scheme}, merged"][0](w)
            u, s, v = torch.linalg.svd(d, full_matrices=False)
            grown = patches.grown(q, v[:RANK].t() * s[:RANK], u[:, :RANK])
            note(f"{scheme}, low rank", w, d, patches.dense(q), patches.dense(grown), x)
rows = {name: [round(v / r[3], 5) for v in r[:3]] for name, r in sums.items()}
print(json.dumps({"layers": next(iter(sums.values()))[3], "share": SHARE, "rows": rows}))
