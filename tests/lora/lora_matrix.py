"""Every kind of update at every place it can stand, and what it must come to, written out in float64.

A *kind* makes the tensors of one target, named by their suffixes. A *place* says how the target's rows lie in a model:

    same             the target is a layer
    fused on split   the target is three layers, one under the other
    split on fused   the target is some rows of a layer
    swapped          the target's halves stand in the layer the other way round

Used without ComfyUI (test_matrix.py) and inside its Python (tests/comfy/inside/lora_matrix.py).
"""

from __future__ import annotations

import torch
from lora_files import generator

PLACES = ("same", "fused on split", "split on fused", "swapped")
RANK, SIZE = 4, 0.3


def block(n: int, piece: int, across: bool) -> int:
    """How many of an update's ``n`` rows belong together: a number that divides ``piece``, or one that does not."""
    found = [c for c in range(2, n + 1) if n % c == 0 and (piece % c != 0) == (across and piece != n)]
    return min(found, key=lambda c: abs(c - n**0.5))


def kind(name: str, n: int, k: int, piece: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of an update of ``n`` x ``k``, of which a layer takes ``piece`` rows."""
    g = generator(seed)
    noise = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    across, r = "across" in name, RANK
    c, d = block(n, piece, across), 8
    a, b = n // c, k // d
    alpha = {".alpha": torch.tensor(r / 2)}
    lora = {".lora_down.weight": noise(r, k) / k**0.5, ".lora_up.weight": SIZE * noise(n, r) / r**0.5, **alpha}
    loha = {
        ".hada_w1_a": SIZE * noise(n, r), ".hada_w1_b": noise(r, k) / k**0.5,
        ".hada_w2_a": noise(n, r) / r, ".hada_w2_b": noise(r, k), **alpha,
    }  # fmt: skip
    lokr = {".lokr_w1": noise(a, b) / b**0.5, ".lokr_w2": SIZE * noise(c, d) / d**0.5}
    lokr_low = {
        ".lokr_w1": noise(a, b) / b**0.5, ".lokr_w2_a": SIZE * noise(c, 2), ".lokr_w2_b": noise(2, d) / d**0.5, **alpha,
    }  # fmt: skip
    lokr_both = {".lokr_w1_a": noise(a, 2), ".lokr_w1_b": noise(2, b) / b**0.5, **lokr_low}
    lokr_both.pop(".lokr_w1")
    oft = {".oft_blocks": 0.02 * noise(a, c, c)}
    glora = {
        ".a1.weight": 0.3 * noise(r, k) / k**0.5, ".a2.weight": noise(k, r) / r**0.5,
        ".b1.weight": noise(r, k) / k**0.5, ".b2.weight": SIZE * noise(n, r) / r**0.5, **alpha,
    }  # fmt: skip
    rows, inputs = {".dora_scale": 1 + 0.1 * noise(n, 1)}, {".dora_scale": (n / k) ** 0.5 * (1 + 0.1 * noise(1, k))}
    kinds = {
        "lora": lora,
        "lora without alpha": {name: t for name, t in lora.items() if name != ".alpha"},
        "lora with a bias": {**lora, ".diff_b": SIZE * noise(n)},
        "dora": {**lora, **rows},
        "dora, PEFT": {**lora, ".lora_magnitude_vector": 1 + 0.1 * noise(n)},
        "dora of inputs": {**lora, **inputs},
        "loha": loha,
        "loha, dora": {**loha, **rows},
        "loha, dora of inputs": {**loha, **inputs},
        "lokr": lokr,
        "lokr across": lokr,
        "lokr low": lokr_low,
        "lokr low across": lokr_low,
        "lokr both low across": lokr_both,
        "lokr, dora": {**lokr, **rows},
        "lokr across, dora": {**lokr, **rows},
        "lokr across, dora of inputs": {**lokr_low, **inputs},
        "oft": oft,
        "oft across": oft,
        "oft held": {**oft, ".alpha": torch.tensor(0.5)},
        "oft, rescaled": {**oft, ".rescale": 1 + 0.1 * noise(n, 1)},
        "boft": {".oft_blocks": 0.05 * noise(2, n // 8, 8, 8)},
        "boft, rescaled": {
            ".oft_blocks": 0.05 * noise(2, n // 8, 8, 8), ".rescale": 1 + 0.1 * noise(n, 1),
            ".alpha": torch.tensor(0.9),
        },
        "glora": glora,
        "glora, new": {
            ".a1.weight": 0.3 * noise(k, r) / r**0.5, ".a2.weight": noise(r, k) / k**0.5, ".b1.weight": noise(n, r),
            ".b2.weight": SIZE * noise(r, k) / k**0.5, **alpha,
        },
        "glora, dora": {**glora, **rows},
        "diff": {".diff": SIZE * noise(n, k) / k**0.5},
        "set": {".set_weight": noise(n, k) / k**0.5},
        "bias": {".diff_b": SIZE * noise(n)},
    }  # fmt: skip
    return kinds[name]


KINDS = (
    "lora", "lora without alpha", "lora with a bias", "dora", "dora, PEFT", "dora of inputs", "loha", "loha, dora",
    "loha, dora of inputs", "lokr", "lokr across", "lokr low", "lokr low across", "lokr both low across", "lokr, dora",
    "lokr across, dora", "lokr across, dora of inputs", "oft", "oft across", "oft held", "oft, rescaled", "boft",
    "boft, rescaled", "glora", "glora, new", "glora, dora", "diff", "set", "bias",
)  # fmt: skip


def convolution(name: str, n: int, c: int, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same for a kernel (n, c, size, size), which always stands in one layer."""
    g = generator(seed)
    noise = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    r, k, alpha = RANK, c * size**2, {".alpha": torch.tensor(RANK / 2)}
    up = SIZE * noise(n, r, 1, 1) / r**0.5
    lora = {".lora_down.weight": noise(r, c, size, size) / k**0.5, ".lora_up.weight": up, **alpha}
    core = noise(r, r, size, size) / size
    kinds = {
        "lora": lora,
        "lora with a core": {
            ".lora_down.weight": noise(r, c, 1, 1) / c**0.5, ".lora_mid.weight": core / r, ".lora_up.weight": up,
            **alpha,
        },
        "dora": {**lora, ".dora_scale": 1 + 0.1 * noise(n, 1, 1, 1)},
        "dora, PEFT": {**lora, ".lora_magnitude_vector.weight": 1 + 0.1 * noise(1, n, 1, 1)},
        "dora of inputs": {**lora, ".dora_scale": (n / c) ** 0.5 * (1 + 0.1 * noise(1, c, 1, 1))},
        "loha": {
            ".hada_w1_a": SIZE * noise(n, r), ".hada_w1_b": noise(r, k) / k**0.5, ".hada_w2_a": noise(n, r) / r,
            ".hada_w2_b": noise(r, k), **alpha,
        },
        "loha with cores": {
            ".hada_t1": core, ".hada_w1_a": SIZE * noise(r, n), ".hada_w1_b": noise(r, c) / k**0.5,
            ".hada_t2": core / r, ".hada_w2_a": noise(r, n) / r, ".hada_w2_b": noise(r, c), **alpha,
        },
        "lokr": {".lokr_w1": noise(4, 4) / 4, ".lokr_w2": SIZE * noise(n // 4, c // 4, size, size) / k**0.5},
        "lokr low": {
            ".lokr_w1": noise(4, 4) / 4, ".lokr_w2_a": SIZE * noise(n // 4, r),
            ".lokr_w2_b": noise(r, k // 4) / k**0.5, **alpha,
        },
        "lokr with a core": {
            ".lokr_w1": noise(4, 4) / 4, ".lokr_t2": core, ".lokr_w2_a": SIZE * noise(r, n // 4),
            ".lokr_w2_b": noise(r, c // 4) / k**0.5, **alpha,
        },
        "oft": {".oft_blocks": 0.05 * noise(n // 8, 8, 8)},
        "glora, new": {
            ".a1.weight": 0.3 * noise(c, r, 1, 1) / r**0.5, ".a2.weight": noise(r, c, 1, 1) / c**0.5,
            ".b1.weight": noise(n, r, 1, 1), ".b2.weight": SIZE * noise(r, c, size, size) / k**0.5, **alpha,
        },
        "diff": {".diff": SIZE * noise(n, c, size, size) / k**0.5},
        "set": {".set_weight": noise(n, c, size, size) / k**0.5},
    }  # fmt: skip
    return kinds[name]


CONVOLUTIONS = (
    "lora", "lora with a core", "dora", "dora, PEFT", "dora of inputs", "loha", "loha with cores", "lokr", "lokr low",
    "lokr with a core", "oft", "glora, new", "diff", "set",
)  # fmt: skip


def strength(name: str) -> float:
    """Not 1 where a kind has one meaning at every strength."""
    return 1.0 if name.startswith(("oft", "boft", "set")) else 0.7


def refused(name: str, place: str, comfyui: bool) -> tuple[str, str] | None:
    """(status, the start of its reason) where an update cannot be applied; None where it must be."""
    cut = place in ("fused on split", "swapped")
    if comfyui and name == "oft, rescaled":
        return "unread", "OFT with a rescale, which ComfyUI leaves out"
    if name.startswith("boft") and cut:
        return "rows", "BOFT"
    if name == "oft across" and cut:
        return "rows", "OFT in blocks of"
    return None


def changed(tensors: dict, w: torch.Tensor, bias: torch.Tensor, strength: float, comfyui: bool) -> tuple:
    """(weight, bias) with the update, from the papers' formulas in float64. ``comfyui``: rows of DoRA are divided by
    the lengths that they had before, as ComfyUI does.
    """
    t = {suffix: x.double() for suffix, x in tensors.items()}
    flat, mm = w.flatten(1), lambda *names: t[names[0]].flatten(1) @ t[names[1]].flatten(1)
    new_bias = bias + strength * t.get(".diff_b", torch.zeros_like(bias))
    if set(t) == {".diff_b"}:
        return w, new_bias
    if ".set_weight" in t:
        return t[".set_weight"], new_bias
    if ".diff" in t:
        return w + strength * t[".diff"], new_bias
    if ".oft_blocks" in t:
        return rotated(t, flat).reshape(w.shape), new_bias
    tucker = lambda core, a, b: torch.einsum("rskl,rn,sc->nckl", t[core], t[a], t[b]).flatten(1)  # noqa: E731
    rank = RANK
    if ".lora_mid.weight" in t:
        up, down = t[".lora_up.weight"].flatten(1), t[".lora_down.weight"].flatten(1)
        d = torch.einsum("nr,rskl,sc->nckl", up, t[".lora_mid.weight"], down).flatten(1)
    elif ".lora_up.weight" in t:
        d = mm(".lora_up.weight", ".lora_down.weight")
    elif ".hada_t1" in t:
        d = tucker(".hada_t1", ".hada_w1_a", ".hada_w1_b") * tucker(".hada_t2", ".hada_w2_a", ".hada_w2_b")
    elif ".hada_w1_a" in t:
        d = mm(".hada_w1_a", ".hada_w1_b") * mm(".hada_w2_a", ".hada_w2_b")
    elif ".b1.weight" in t:
        old = t[".b2.weight"].shape[0] == len(w)
        a = mm(".a2.weight", ".a1.weight") if old else mm(".a1.weight", ".a2.weight")
        b = mm(".b2.weight", ".b1.weight") if old else mm(".b1.weight", ".b2.weight")
        d = torch.einsum("oi...,ij->oj...", w, a).flatten(1) + b
    else:
        one = t[".lokr_w1"] if ".lokr_w1" in t else mm(".lokr_w1_a", ".lokr_w1_b")
        if ".lokr_t2" in t:
            two = tucker(".lokr_t2", ".lokr_w2_a", ".lokr_w2_b")
        else:
            two = t[".lokr_w2"].flatten(1) if ".lokr_w2" in t else mm(".lokr_w2_a", ".lokr_w2_b")
            rank = t[".lokr_w2_b"].shape[0] if ".lokr_w2_b" in t else RANK
        d = torch.kron(one, two)
    new = w + (float(t[".alpha"]) / rank if ".alpha" in t else 1) * d.reshape(w.shape)
    by_row = next((t[s].reshape(-1, 1) for s in t if s.startswith(".lora_magnitude")), None)
    scale = t.get(".dora_scale", by_row)
    if by_row is None and scale is not None and scale.shape[0] == len(w):
        by_row = scale.reshape(-1, 1)
    if by_row is not None:
        lengths = (w if comfyui else new).flatten(1).norm(dim=1, keepdim=True)
        new = (new.flatten(1) * by_row / lengths).reshape(w.shape)
    elif scale is not None:
        channels = new.transpose(0, 1).flatten(1)
        new = (
            (channels * scale.reshape(-1, 1) / channels.norm(dim=1, keepdim=True))
            .reshape(new.transpose(0, 1).shape)
            .transpose(0, 1)
        )
    return w + strength * (new - w), new_bias


def rotated(t: dict, w: torch.Tensor) -> torch.Tensor:
    """``w`` after OFT, or BOFT's stages, row by row from the definitions: a stage pairs row i with the row half a block
    (then a block, then two ...) further.
    """
    blocks = t[".oft_blocks"]
    q = blocks - blocks.transpose(-1, -2)
    limit = float(t.get(".alpha", 0))
    if 0 < limit < q.norm():
        q = q * limit / q.norm()
    one = torch.eye(q.shape[-1], dtype=q.dtype)
    turn = (one + q) @ torch.linalg.inv(one - q)
    if blocks.dim() == 3:
        out = torch.block_diag(*turn.transpose(1, 2)) @ w
    else:
        out = w
        for stage, some in enumerate(turn):
            apart = 2**stage * blocks.shape[-1] // 2
            order = [start + side * apart + i for start in range(0, len(w), 2 * apart) for i in range(apart)
                     for side in (0, 1)]  # fmt: skip
            mixed = torch.block_diag(*some) @ out[order]
            out = torch.empty_like(out)
            out[order] = mixed
    return out * t[".rescale"].reshape(-1, 1) if ".rescale" in t else out


def halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(x.chunk(2)[::-1])
