"""ARGS: family, float file, 4-bit file. One layer at a time in float32 sides: what a patch adds, against the float
layer.

Prints the worst figure of each check over the layers.
"""

import json
from collections import defaultdict

from lora_common import args, comfy, kernels, layers, load, lora_files, patches, relative, torch

family, float_file, four_file = args
four, plain = load.diffusion_model(four_file), comfy.sd.load_diffusion_model(float_file)
floats = dict(plain.model.diffusion_model.named_modules())
worst, notes = defaultdict(lambda: float("-inf")), defaultdict(set)


def patch_of(tensors: dict, strength: float = 1.0, offset=None, function=None):
    """ComfyUI's patch tuple, its adapter made by ComfyUI's loader."""
    file = {f"x{end}": t for end, t in tensors.items()}
    loaded = comfy.lora.load_lora(file, {"x": "w"}, log_missing=False)
    return strength, loaded["w"], 1.0, offset, function


def forward(layer, weight, x):
    """The layer's own forward with ``weight`` in place of its own."""
    mine, shift = layer.weight, layer.dense_shift
    if kernels.is_ours(weight):
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    else:
        layer.set_weight(weight)
    try:
        return layer(x)
    finally:
        layer.weight, layer.dense_shift = mine, shift


def note(name: str, value: float) -> None:
    worst[name] = max(worst[name], value)


for number, (name, layer) in enumerate(layers(four).items()):
    stored = layer.weight  # 16-bit sides, as in the file
    layer.weight = torch.nn.Parameter(kernels.cast(stored, torch.float32), requires_grad=False)
    n, k = layer._orig_shape
    x = torch.randn(2, 8, k, generator=lora_files.generator(number))
    if getattr(stored._params, "act_unsigned", False):
        x = torch.nn.functional.gelu(x)  # what an unsigned layer reads
    base, w, bias = layer.weight, floats[name].weight.float(), floats[name].bias
    before, float_before = forward(layer, base, x), torch.nn.functional.linear(x, w, bias)
    error_before = relative(before, float_before)
    tensors = lora_files.kind("lora", n, k, seed=number, size=0.3)
    d = 0.5 * tensors[".lora_up.weight"] @ tensors[".lora_down.weight"]

    out = patches.patched(base, [patch_of(tensors, 0.8)], name)
    note("delta", relative(forward(layer, out, x) - before, 0.8 * x @ d.t()))
    note("dequantized", relative(patches.dense(out) - patches.dense(base), 0.8 * d))
    if n % 128 == 0 and base._layout_cls == kernels.SVDQUANT_LAYOUT:
        tiled = patches.patched(kernels.wrap(kernels.unwrap(base), tiled=True), [patch_of(tensors, 0.8)], name)
        notes["tile-packed"].add(torch.equal(forward(layer, tiled, x), forward(layer, out, x)))
    notes["codes shared"].add(out._qdata.data_ptr() == base._qdata.data_ptr())
    notes["strength 0"].add(patches.patched(base, [patch_of(tensors, 0.0)], name) is base)
    both = patches.patched(base, [patch_of(tensors, 0.8), patch_of(tensors, -0.8)], name)
    note("plus and minus", relative(forward(layer, both, x), before))
    third = n // 3 // 64 * 64 or n // 2
    part = lora_files.kind("lora", third, k, seed=number, size=0.3)
    dp = torch.zeros(n, k)
    dp[third : 2 * third] = 0.5 * part[".lora_up.weight"] @ part[".lora_down.weight"]
    out = patches.patched(base, [patch_of(part, 1.0, (0, third, third))], name)
    change = forward(layer, out, x) - before
    note("rows inside", relative(change[..., third : 2 * third], (x @ dp.t())[..., third : 2 * third]))
    note("rows outside", change[..., :third].abs().max().item())
    columns = lora_files.kind("lora", n, k // 2, seed=number, size=0.3)
    dc = torch.zeros(n, k)
    dc[:, k // 2 :] = 0.5 * columns[".lora_up.weight"] @ columns[".lora_down.weight"]
    out = patches.patched(base, [patch_of(columns, 1.0, (1, k // 2, k // 2))], name)
    note("columns", relative(forward(layer, out, x) - before, x @ dc.t()))
    out = patches.patched(base, [patch_of(tensors, 1.0, None, comfy.utils.swap_scale_shift)], name)
    note("swapped halves", relative(forward(layer, out, x) - before, x @ torch.cat(d.chunk(2)[::-1]).t()))

    for kind in lora_files.KINDS:
        patch = patch_of(lora_files.kind(kind, n, k, seed=number, size=0.3))
        out = patches.patched(base, [patch], name)
        expected = comfy.lora.calculate_weight([patch], w.clone(), name)
        target = torch.nn.functional.linear(x, expected, bias)
        error = relative(forward(layer, out, x), target)
        note(f"{kind}: error beyond the unpatched", error - error_before)
        rounded = relative(forward(layer, patches.patched(stored, [patch], name), x), target)
        note(f"{kind}: error beyond, 16-bit sides", rounded - error_before)
        exact = comfy.lora.calculate_weight([patch], patches.dense(base), name)
        got = patches.dense(out) if kernels.is_ours(out) else out
        note(f"{kind}: against exact", relative(got, exact))
        notes[f"{kind}: stays 4-bit"].add(kernels.is_ours(out))
        notes[f"{kind}: changes"].add(relative(expected, w) > 1e-3)
    note("unpatched error", error_before)
half = patch_of({".lokr_w1": torch.zeros(8, 8), ".alpha": torch.tensor(1.0)})[1]
notes["half a LoKr fits"].add(patches.fits(half, (64, 64)))
print(json.dumps({**worst, **{name: sorted(values) for name, values in notes.items()}}))
