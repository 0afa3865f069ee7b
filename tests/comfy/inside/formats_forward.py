"""nunchaku's mini files in ComfyUI's own modules (shrunk), against dense modules built from the expected values alone.

ARGS: the folder of fixtures. Prints {family: {"exact": error against the 4-bit arithmetic in float64 formulas,
"dense": error against no activation rounding, "share": bytes of codes by 16-bit bytes}}.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, torch

torch.set_grad_enabled(False)
import comfy.ops  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.lumina.model import FeedForward  # noqa: E402
from comfy.ldm.modules.attention import BasicTransformerBlock  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformerBlock  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

load = importlib.import_module("nibble_pack.nodes.bridge.load")
operations = importlib.import_module("nibble_pack.nodes.bridge.operations").operations
DATA = Path(args[0])
SHIFT = 0.171875


class Want:
    """One layer from its expected values: nothing here has seen the packing."""

    def __init__(self, e: dict):
        self.e = {n: t.double() for n, t in e.items()}
        self.awq = "w_zero_int_nk" in e
        scale = self.e["w_scales_nk"].repeat_interleave(64, 1)
        if self.awq:
            self.weight = (self.e["w_codes"] - self.e["w_zero_int_nk"].repeat_interleave(64, 1)) * scale
            self.bias = self.e["bias_natural"]
        else:
            self.codes = self.e["w_codes"] * scale
            branch = self.e["proj_up_nr"] @ self.e["proj_down_kr"].t()
            self.weight = self.codes / self.e["smooth"] + branch
            self.bias = self.e.get("bias_original", self.e.get("bias"))

    def rounded(self, x):
        """The layer with 4-bit activations, in float64."""
        x = x.double()
        if self.awq:
            return x @ self.weight.t() + self.bias
        unsigned = "act_shift" in self.e
        xs = ((x + (SHIFT if unsigned else 0)) / self.e["smooth"]).unflatten(-1, (-1, 64))
        low, high = (0, 15) if unsigned else (-7, 7)
        a = xs.abs().amax(-1, keepdim=True).clamp(min=1e-10) / high
        y = ((xs / a).round().clamp(low, high) * a).flatten(-2) @ self.codes.t()
        y = y + (x @ self.e["proj_down_kr"]) @ self.e["proj_up_nr"].t()
        return y + self.e["bias"] if "bias" in self.e else y


def wanted(file: str) -> dict[str, Want]:
    out = {}
    for name, value in load_file(DATA / f"{file}.expected.safetensors").items():
        layer, _, last = name.rpartition(".")
        out.setdefault(layer, {})[last] = value
    return {n: Want(e) for n, e in out.items()}


def install(module, name: str, pieces: list, rounded: bool, rows=None, columns: bool = False) -> None:
    """Makes linear ``name`` of a float module the layers in ``pieces``: rows one under the other, or columns summed."""
    layer = module.get_submodule(name)
    if not rounded:
        weight = torch.cat([p.weight for p in pieces], 1 if columns else 0)
        biases = [p.bias for p in pieces if p.bias is not None]
        bias = None if not biases else sum(biases) if columns else torch.cat(biases)
        layer.weight = torch.nn.Parameter((weight if rows is None else weight[rows]).float())
        layer.bias = None if bias is None else torch.nn.Parameter((bias if rows is None else bias[rows]).float())
        return

    def forward(x, *_):
        if columns:
            sizes = [p.weight.shape[1] for p in pieces]
            y = sum(p.rounded(part) for p, part in zip(pieces, x.split(sizes, -1), strict=True))
        else:
            y = torch.cat([p.rounded(x) for p in pieces], -1)
        return (y if rows is None else y[..., rows]).to(x.dtype)

    layer.forward = forward


def quantized(build, file: str, prefix: str):
    """The file through this pack's loader, into the module that ``build`` makes with its operations."""
    checkpoint = load.read(str(DATA / f"{file}.safetensors"))
    sd = {**checkpoint.dense, **load.wrapped(checkpoint.layers)}
    module = build(operations(torch.float32))
    inner = {n.removeprefix(prefix): v for n, v in sd.items() if n.startswith(prefix)}
    _, unexpected = module.load_state_dict(inner, strict=False)  # a mini file lacks some 16-bit tensors
    assert not unexpected, unexpected
    for name, m in module.named_modules():
        assert not (hasattr(m, "in_features") and m.weight is None), name
    ours = [v for v in inner.values() if hasattr(v, "_qdata")]
    size = sum(v._qdata.nbytes for v in ours) / sum(2 * v.numel() for v in ours)
    return module, inner, size


def dense(build, inner: dict):
    """The same module in float32, its 16-bit tensors from the file."""
    module = build(comfy.ops.disable_weight_init)
    plain = {n: v.float() for n, v in inner.items() if not hasattr(v, "_qdata") and not n.endswith("comfy_quant")}
    for name, value in plain.items():
        owner, _, last = name.rpartition(".")
        target = module.get_submodule(owner)
        if getattr(target, last, None) is not None and getattr(target, last).shape == value.shape:
            setattr(target, last, torch.nn.Parameter(value))
    return module


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def compare(build, file: str, prefix: str, layers, run) -> dict:
    got, inner, size = quantized(build, file, prefix)
    want = wanted(file)
    out = {"share": size}
    for kind, rounded in (("exact", True), ("dense", False)):
        reference = dense(build, inner)
        for name, sources, rows, columns in layers:
            install(reference, name, [want[s] for s in sources], rounded, rows, columns)
        out[kind] = relative(run(got), run(reference))
    return out


def flux() -> dict:
    def build(ops):
        return Flux(
            in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=128, hidden_size=256,
            mlp_ratio=1.5, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
            qkv_bias=True,
            guidance_embed=True, txt_ids_dims=[], dtype=torch.float32, device="cpu", operations=ops,
        ).eval()  # fmt: skip

    a, b = "transformer_blocks.0.", "single_transformer_blocks.0."
    layers = []
    for native, end in (("img", ""), ("txt", "_context")):
        table = (("attn.qkv", f"qkv_proj{end}"), ("attn.proj", f"out_proj{end}"), ("mlp.0", f"mlp{end}_fc1"),
                 ("mlp.2", f"mlp{end}_fc2"), ("mod.lin", f"norm1{end}.linear"))  # fmt: skip
        layers += [(f"double_blocks.0.{native}_{n}", [a + s], None, False) for n, s in table]
    layers += [
        ("single_blocks.0.linear1", [f"{b}qkv_proj", f"{b}mlp_fc1"], None, False),
        ("single_blocks.0.linear2", [f"{b}out_proj", f"{b}mlp_fc2"], None, True),
        ("single_blocks.0.modulation.lin", [f"{b}norm.linear"], None, False),
    ]
    g = torch.Generator().manual_seed(1)
    x, text, y = (torch.randn(s, generator=g) for s in ((1, 16, 8, 8), (1, 12, 128), (1, 64)))

    def run(model):
        model.dtype = torch.float32
        return model(x, torch.tensor([0.5]), text, y, torch.tensor([3.5]))

    return compare(build, "d_mini_flux_int4", "", layers, run)


def sdxl() -> dict:
    stem = "down_blocks.1.attentions.0.transformer_blocks.0."

    def build(ops):
        return BasicTransformerBlock(
            128, 2, 64, context_dim=256, dtype=torch.float32, device="cpu", operations=ops
        ).eval()

    q = [slice(i * 128, (i + 1) * 128) for i in range(3)]
    layers = [(f"attn1.to_{n}", [f"{stem}attn1.to_qkv"], q[i], False) for i, n in enumerate("qkv")]
    layers += [
        (n, [stem + n], None, False)
        for n in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 64, 128, generator=g), torch.randn(1, 12, 256, generator=g)

    def run(model):
        return model(x, text)

    return compare(build, "e_mini_sdxl_int4", "input_blocks.4.1.transformer_blocks.0.", layers, run)


def z_image() -> dict:
    """A feed-forward as nunchaku fuses it (first half times silu of the second), from layers of other fixtures."""
    stem = "layers.0.feed_forward."
    parts = {"net.0.proj": ("e_mini_qwenimage_int4", "transformer_blocks.0.img_mlp.net.0.proj."),
             "net.2": ("a_svdq_int4_outproj_smooth_fused", "")}  # fmt: skip
    tensors, want = {"cap_embedder.1.weight": torch.ones(2, 2)}, {}
    for name, (file, prefix) in parts.items():
        for kind, out in ((".safetensors", tensors), (".expected.safetensors", want)):
            found = {
                n.removeprefix(prefix): t for n, t in load_file(DATA / (file + kind)).items() if n.startswith(prefix)
            }
            out |= {f"{stem}{name}.{n}": t for n, t in found.items() if n != "bias"}
    tensors |= {n.replace("feed_forward.net.2", "attention.to_qkv"): t.clone() for n, t in tensors.items()}
    layers = {}
    for name, value in want.items():
        layer, _, last = name.rpartition(".")
        layers.setdefault(layer, {})[last] = value
    gate, down = (Want(layers[stem + n]) for n in parts)
    save_file({n: t.clone() for n, t in tensors.items()}, "z.safetensors")
    checkpoint = load.read("z.safetensors")
    sd = load.wrapped(checkpoint.layers)
    settings = {"operations": operations(torch.float32), "device": "cpu", "dtype": torch.float32}
    module = FeedForward(128, 256, 256, None, settings).eval()
    module.load_state_dict({n.removeprefix(stem): v for n, v in sd.items() if n.startswith(stem)})
    x = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(1))
    got, out = module(x), {"share": 0.25}
    for kind in ("exact", "dense"):
        run = (lambda w, v: w.rounded(v)) if kind == "exact" else (lambda w, v: v.double() @ w.weight.t())
        one, two = run(gate, x).chunk(2, -1)
        out[kind] = relative(got, run(down, one * torch.nn.functional.silu(two)))
    return out


def qwen() -> dict:
    stem = "transformer_blocks.0."

    def build(ops):
        return QwenImageTransformerBlock(128, 1, 128, dtype=torch.float32, device="cpu", operations=ops).eval()

    q = [slice(i * 128, (i + 1) * 128) for i in range(3)]
    layers = [(f"attn.to_{n}", [f"{stem}attn.to_qkv"], q[i], False) for i, n in enumerate("qkv")]
    layers += [(f"attn.add_{n}_proj", [f"{stem}attn.add_qkv_proj"], q[i], False) for i, n in enumerate("qkv")]
    layers += [(n, [stem + n], None, False) for n in ("attn.to_out.0", "attn.to_add_out")]
    for h in ("img", "txt"):
        layers += [(f"{h}_{n}", [f"{stem}{h}_{n}"], None, False) for n in ("mlp.net.0.proj", "mlp.net.2", "mod.1")]
    g = torch.Generator().manual_seed(1)
    image, text, t = (torch.randn(s, generator=g) for s in ((1, 64, 128), (1, 12, 128), (1, 128)))
    angles = torch.rand(1, 1, 76, 64, generator=g)
    table = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))

    def run(model):
        out = model(image, text, None, t, table)
        return torch.cat(out, 1)

    return compare(build, "e_mini_qwenimage_int4", stem, layers, run)


print(json.dumps({"flux": flux(), "sdxl": sdxl(), "qwen": qwen(), "z_image": z_image()}))
