"""Key shapes of the adapter files that exist, spelled out, so that every variant is built as from its file."""

from itertools import pairwise

# N of each cross-attention of the published UNets, in IP-Adapter's order: down, up, middle
SD15 = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SDXL = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10


def layers(widths: list[int], context: int, rank: int = 0) -> dict[str, tuple]:
    """ip_adapter.* of a model with these widths, full or as LoRA on all four projections."""
    out: dict[str, tuple] = {}
    for number, n in enumerate(widths):
        stem = f"ip_adapter.{2 * number + 1}."
        if not rank:
            out |= {f"{stem}to_k_ip.weight": (n, context), f"{stem}to_v_ip.weight": (n, context)}
            continue
        for part, size in (("to_k_ip", context), ("to_v_ip", context), ("to_q_ip", n), ("to_out_ip", n)):
            out |= {f"{stem}{part}.down.weight": (rank, size), f"{stem}{part}.up.weight": (n, rank)}
    return out


def linear(embed: int, context: int) -> dict[str, tuple]:
    keys = {"proj.weight": (4 * context, embed), "proj.bias": (4 * context,)}
    return _image(keys | {"norm.weight": (context,), "norm.bias": (context,)})


def mlp(sizes: list[int], context: int) -> dict[str, tuple]:
    keys = {"norm.weight": (context,), "norm.bias": (context,)}
    for n, (one, other) in enumerate(pairwise(sizes)):
        keys |= {f"proj.{2 * n}.weight": (other, one), f"proj.{2 * n}.bias": (other,)}
    return _image(keys)


def patches(width: int, context: int) -> dict[str, tuple]:
    keys = {"proj.0.weight": (width, width), "proj.0.bias": (width,), "proj.2.weight": (context, width)}
    return _image(keys | {"proj.2.bias": (context,), "proj.3.weight": (context,), "proj.3.bias": (context,)})


def resampler(width: int, context: int, dim: int, heads: int) -> dict[str, tuple]:
    inner = 64 * heads
    keys = {"latents": (1, 16, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,),
            "proj_out.weight": (context, dim), "proj_out.bias": (context,), "norm_out.weight": (context,),
            "norm_out.bias": (context,)}  # fmt: skip
    for n in range(4):
        p = f"layers.{n}."
        keys |= {f"{p}0.norm{i}.{w}": (dim,) for i in (1, 2) for w in ("weight", "bias")}
        keys |= {f"{p}0.to_q.weight": (inner, dim), f"{p}0.to_kv.weight": (2 * inner, dim)}
        keys |= {f"{p}0.to_out.weight": (dim, inner), f"{p}1.0.weight": (dim,), f"{p}1.0.bias": (dim,)}
        keys |= {f"{p}1.1.weight": (4 * dim, dim), f"{p}1.3.weight": (dim, 4 * dim)}
    return _image(keys)


def uni(width: int, factor: int, bias: bool = True) -> dict[str, tuple]:
    """global_adapter.* of Uni-ControlNet, its feed-forwards ``factor`` times as wide inside."""
    keys = {}
    for n, (d, out) in enumerate(((width, 2 * width), (2 * width, 4 * width)), 1):
        keys |= {f"norm{n}.weight": (d,), f"norm{n}.bias": (d,), f"ff{n}.net.0.proj.weight": (2 * factor * d, d),
                 f"ff{n}.net.2.weight": (out, factor * d)}  # fmt: skip
        if bias:
            keys |= {f"ff{n}.net.0.proj.bias": (2 * factor * d,), f"ff{n}.net.2.bias": (out,)}
    return {f"global_adapter.{k}": v for k, v in keys.items()}


def _image(keys: dict) -> dict[str, tuple]:
    return {f"image_proj.{k}": v for k, v in keys.items()}


# name -> (key shapes, million parameters); the first five are a published comparison on SD1.5 with CLIP ViT-B
WIDE = [512, 2048, 2048, 3072]
FILES = {
    "Uni-ControlNet (global), narrow": (uni(768, 1, bias=False), 11.80),
    "IP-Adapter MLP LoRA": (mlp(WIDE, 768) | layers(SD15, 768, 128), 24.27),
    "IP-Adapter LoRA": (linear(512, 768) | layers(SD15, 768, 128), 14.31),
    "IP-Adapter MLP": (mlp(WIDE, 768) | layers(SD15, 768), 30.71),
    "IP-Adapter": (linear(512, 768) | layers(SD15, 768), 20.75),
    "Uni-ControlNet (global), published": (uni(768, 4), 47.21),
    "ip-adapter_sd15": (linear(1024, 768) | layers(SD15, 768), 22.32),
    "ip-adapter-plus_sd15, plus-face": (resampler(1280, 768, 768, 12) | layers(SD15, 768), 49.09),
    "ip-adapter-full-face_sd15": (patches(1280, 768) | layers(SD15, 768), 21.79),
    "ip-adapter_sdxl": (linear(1280, 2048) | layers(SDXL, 2048), 351.29),
    "ip-adapter_sdxl_vit-h": (linear(1024, 2048) | layers(SDXL, 2048), 349.19),
    "ip-adapter-plus_sdxl_vit-h": (resampler(1280, 2048, 1280, 20) | layers(SDXL, 2048), 423.75),
}
