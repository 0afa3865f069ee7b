"""LoRA files that are odd in one way each, and what must become of each key. Used here and in tests/comfy/inside.

Every file is for one layer of n x k; a *case* is (tensors by suffix, expected status by suffix, reason of the keys that
are not applied).
"""

from __future__ import annotations

import torch
from lora_files import generator, kind

NAN, INF = float("nan"), float("inf")


def lora(n: int, k: int, rank: int = 4) -> dict[str, torch.Tensor]:
    g = generator(7)
    down, up = torch.randn(rank, k, generator=g) / k**0.5, torch.randn(n, rank, generator=g) / 2
    return {".lora_down.weight": down, ".lora_up.weight": up}


def lora_ab(n: int, k: int) -> dict[str, torch.Tensor]:
    return dict(zip((".lora_A.weight", ".lora_B.weight"), lora(n, k).values(), strict=True))


def some(*suffixes: str) -> dict[str, torch.Tensor]:
    return {suffix: torch.ones(4, 4) for suffix in suffixes}


def all_of(tensors: dict, status: str, why: str = "", keep: dict | None = None) -> tuple:
    """Every key has ``status``, but those in ``keep``."""
    return tensors, {suffix: (keep or {}).get(suffix, status) for suffix in tensors}, why


def zeros(**shapes) -> dict[str, torch.Tensor]:
    return {f".{name}": torch.zeros(shape) for name, shape in shapes.items()}


# Suffixes of kinds that nobody here reads -> the name that the report must give
UNREAD = {
    (".ia3_l",): "IA3",
    (".ia3_l.default",): "IA3",
    (".weight", ".on_input"): "IA3",
    (".vera_lambda_b", ".vera_lambda_d"): "VeRA",
    (".vera_lambda_b.default", ".vera_lambda_d.default"): "VeRA",
    (".pvera_lambda_b", ".pvera_lambda_d"): "PVeRA",
    (".lora_A", ".lora_B", ".lora_E"): "AdaLoRA",
    (".lora_embedding_A", ".lora_embedding_B"): "LoRA of an embedding",
    (".lora_A.weight", ".lora_B.weight", ".lora_diag"): "KaSA",
    (".hra_u",): "HRA",
    (".fourierft_spectrum",): "FourierFT",
    (".spectrum",): "FourierFT",
    (".waveft_spectrum",): "WaveFT",
    (".boft_R", ".boft_s"): "PEFT's BOFT",
    (".oft_R.weight",): "PEFT's OFT",
    (".oft_r", ".oft_s"): "PEFT's OFT",
    (".glora_A", ".glora_B", ".glora_C", ".glora_D", ".glora_E"): "PEFT's GLoRA",
    (".vblora_logits_A", ".vblora_logits_B"): "VB-LoRA",
    (".randlora_lambda", ".randlora_gamma"): "RandLoRA",
    (".delora_A", ".delora_B", ".delora_lambda"): "DeLoRA",
    (".gralora_A.weight", ".gralora_B.weight"): "GraLoRA",
    (".road_theta", ".road_alpha"): "RoAd",
    (".c3a_kernel",): "C3A",
    (".shira_weight",): "SHiRA",
    (".miss_block",): "MiSS",
    (".bone_block",): "MiSS",
    (".poly_lora_A", ".poly_lora_B", ".poly_router"): "Poly",
    (".ln_tuning_layers.weight",): "LN Tuning",
    (".q_layer.weight", ".p_layer.weight", ".lambda_layer", ".alpha"): "T-LoRA",
    (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".bm.weight"): "GLoRA with a core",
    (".lora_down", ".lora_up"): "packed for the nunchaku engine",
    (".weight", ".bias"): "whole weights, as a model file has them",
    (".something_new",): "",
}
# Keys of whole kinds that name no layer
ALONE = {
    "internal_xlora_classifier.layers.0.weight": "X-LoRA",
    "base_model.vera_A": "VeRA",
    "bundle_emb.cat.string_to_param.*": "a textual inversion",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "ControlNet-LLLite",
    "image_proj.proj.weight": "IP-Adapter",
    "lora_controlnet": "Control-LoRA",
}


def cases(n: int, k: int) -> dict[str, tuple]:
    """Name -> case, for a layer of ``n`` x ``k``."""
    rows, plain, size = {".dora_scale": torch.ones(n, 1)}, lora(n, k), n // 4
    blocks = 0.02 * torch.ones(4, size, size).triu(1)
    no_rank = {
        ".a1.weight": torch.ones(0, k),
        ".a2.weight": torch.ones(k, 0),
        ".b1.weight": torch.ones(0, k),
        ".b2.weight": torch.ones(n, 0),
    }
    narrow = {
        ".a1.weight": torch.ones(4, 32),
        ".a2.weight": torch.ones(32, 4),
        ".b1.weight": torch.ones(4, k),
        ".b2.weight": torch.ones(n, 4),
    }
    return {
        **{
            f"unread {', '.join(suffixes)}": all_of(some(*suffixes), "unread", name)
            for suffixes, name in UNREAD.items()
        },
        "no up": all_of({".lora_down.weight": torch.ones(4, k), ".alpha": torch.tensor(1.0)}, "incomplete", "no up"),
        "no down": all_of({".lora_B.weight": torch.ones(n, 4)}, "incomplete", "no down"),
        "only alpha": all_of({".alpha": torch.tensor(1.0)}, "incomplete", "only alpha"),
        "a LoRA's bias alone": all_of({".lora_B.bias": torch.ones(n)}, "incomplete", "no down, up"),
        "a LoRA with its bias": all_of({**lora_ab(n, k), ".lora_B.bias": torch.ones(n)}, "model"),
        "half a LoHa": all_of(some(".hada_w1_a", ".hada_w1_b", ".hada_w2_a"), "incomplete", "no hada_w2_b"),
        "half a core": all_of({**kind("loha", n, k), ".hada_t1": torch.ones(4, 4, 1, 1)}, "incomplete", "no hada_t2"),
        "half a LoKr": all_of(some(".lokr_w1", ".lokr_w2_a"), "incomplete", "no lokr_w2_b"),
        "half a GLoRA": all_of(some(".a1.weight", ".a2.weight", ".b1.weight"), "incomplete", "no b2"),
        "a LoRA and half a LoKr": all_of(
            {**plain, ".lokr_w1": torch.ones(4, 4)}, "model", "no lokr_w2", {".lokr_w1": "incomplete"}
        ),
        "a LoRA and half another": all_of(
            {**plain, ".lora_A.weight": torch.ones(4, k)}, "model", "no up", {".lora_A.weight": "incomplete"}
        ),
        "rank 0": all_of({**lora(n, k, 0), ".alpha": torch.tensor(1.0)}, "empty", "rank 0"),
        "rank 0, no alpha": all_of(lora(n, k, 0), "empty", "rank 0"),
        "rank 0, DoRA": all_of({**lora(n, k, 0), **rows}, "empty", "rank 0"),
        "rank 0, LoHa": all_of(
            zeros(hada_w1_a=(n, 0), hada_w1_b=(0, k), hada_w2_a=(n, 0), hada_w2_b=(0, k)), "empty", "rank 0"
        ),
        "rank 0, LoKr": all_of(zeros(lokr_w1=(8, 8), lokr_w2_a=(8, 0), lokr_w2_b=(0, 8), alpha=()), "empty", "rank 0"),
        "rank 0, GLoRA": all_of(no_rank, "empty", "rank 0"),
        "nothing in it": all_of({".diff": torch.zeros(0, k)}, "empty", "no numbers"),
        "alpha 0": all_of({**plain, ".alpha": torch.tensor(0.0)}, "empty", "alpha 0"),
        "alpha 0, LoHa": all_of({**kind("loha", n, k), ".alpha": torch.tensor(0)}, "empty", "alpha 0"),
        "alpha 0, DoRA": all_of({**plain, **rows, ".alpha": torch.tensor(0.0)}, "model"),
        "alpha NaN": all_of({**plain, ".alpha": torch.tensor(NAN)}, "broken"),
        "alpha infinite": all_of({**plain, ".alpha": torch.tensor(-INF)}, "broken"),
        "alpha in a row": all_of({**plain, ".alpha": torch.tensor([2.0])}, "model"),
        "alpha a whole number": all_of({**plain, ".alpha": torch.tensor(2)}, "model"),
        "alpha in 8 bits": all_of({**plain, ".alpha": torch.tensor(2.0).to(torch.float8_e4m3fn)}, "model"),
        "alphas": all_of({**plain, ".alpha": torch.tensor([2.0, 3.0])}, "halves", "an alpha of 2 numbers"),
        "no alpha in it": all_of({**plain, ".alpha": torch.zeros(0)}, "halves", "an alpha of 0 numbers"),
        "NaN": all_of({**plain, ".lora_up.weight": torch.full((n, 4), NAN)}, "broken"),
        "NaN in 8 bits": all_of({**plain, ".lora_up.weight": torch.full((n, 4), NAN).to(torch.float8_e5m2)}, "broken"),
        "no rank in common": all_of(
            {".lora_down.weight": torch.ones(4, k), ".lora_up.weight": torch.ones(n, 5)},
            "halves",
            f"down (4, {k}) and up ({n}, 5) do not share a rank",
        ),
        "a row for a matrix": all_of(
            {".lora_down.weight": torch.ones(k), ".lora_up.weight": torch.ones(n, 1)},
            "halves",
            f"down has the shape ({k},)",
        ),
        "LoHa's halves": all_of(
            zeros(hada_w1_a=(n, 4), hada_w1_b=(4, k), hada_w2_a=(n, 4), hada_w2_b=(3, k)),
            "halves",
            f"hada_w2_a ({n}, 4) and hada_w2_b (3, {k}) do not share a rank",
        ),
        "LoKr's halves": all_of(
            zeros(lokr_w1=(8, 8), lokr_w2_a=(8, 4), lokr_w2_b=(3, 8)),
            "halves",
            "lokr_w2_a (8, 4) and lokr_w2_b (3, 8) do not share a rank",
        ),
        "OFT of no square": all_of(
            {".oft_blocks": torch.zeros(4, size, 8)}, "halves", f"oft_blocks have the shape (4, {size}, 8)"
        ),
        "OFT's rescale": all_of(
            {".oft_blocks": blocks, ".rescale": torch.ones(3, 1)},
            "halves",
            f"rescale (3, 1) is not for {n} rows",
        ),
        "OFT with DoRA": all_of({".oft_blocks": blocks, **rows}, "unread", "OFT with DoRA"),
        "a difference with DoRA": all_of({".diff": torch.ones(n, k), **rows}, "unread", "a difference with DoRA"),
        "another width": all_of(lora(n, 32), "shape", f"made for {n} x 32, the layer has {n} x {k}"),
        "another height, OFT": all_of(
            {".oft_blocks": torch.zeros(4, 8, 8)}, "shape", f"made for 32 rows, the layer has {n} x {k}"
        ),
        "another size, a whole weight": all_of(
            {".set_weight": torch.ones(8, 8)}, "shape", f"made for 8 x 8, the layer has {n} x {k}"
        ),
        "another size, GLoRA": all_of(narrow, "shape", "made for 32 inputs"),
        "other magnitudes": all_of(
            {**plain, ".dora_scale": torch.ones(5, 1)},
            "shape",
            f"it has 5 DoRA magnitudes, the layer has {n} rows and {k} inputs",
        ),
        "a setting": all_of(
            {**plain, ".config": torch.tensor([123, 125], dtype=torch.uint8)}, "model", "", {".config": "setting"}
        ),
    }


# Types of numbers: a LoRA in each is the LoRA that its numbers are
TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.int32, torch.uint8,
)  # fmt: skip


def of_type(dtype: torch.dtype, n: int, k: int, what: str = "lora") -> dict[str, torch.Tensor]:
    """A LoRA (or LoKr) in numbers of ``dtype``, whole ones where it is a type of those."""
    g = generator(3)
    shapes = {
        "lora": {".lora_down.weight": (4, k), ".lora_up.weight": (n, 4)},
        "lokr": {".lokr_w1": (8, 8), ".lokr_w2": (n // 8, k // 8)},
    }[what]
    found = {s: torch.randint(0, 4, shape, generator=g).float() for s, shape in shapes.items()}
    if dtype.is_floating_point:
        found = {s: t + torch.rand(t.shape, generator=g) for s, t in found.items()}
    return {s: t.to(dtype) for s, t in found.items()}


def misshapen(chance) -> dict[str, torch.Tensor]:
    """Tensors of one kind in any shapes at all, with a few things beside them. ``chance``: a random.Random."""
    kinds = (
        (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".reshape_weight"),
        (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
        (".lokr_w1", ".lokr_w2"),
        (".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
        (".oft_blocks", ".rescale"),
        (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
        (".diff", ".diff_b", ".w_norm", ".b_norm"),
        (".set_weight",),
    )
    some = [
        *chance.choice(kinds),
        *chance.sample((".alpha", ".dora_scale", ".lora_magnitude_vector"), chance.randint(0, 2)),
    ]
    sizes, most = chance.choice(((0, 1, 2, 4), (4, 64), (8,), (64,))), chance.choice((2, 4))
    shapes = {end: [chance.choice(sizes) for _ in range(chance.randint(0, most))] for end in some}
    return {end: torch.ones(shape) for end, shape in shapes.items() if chance.random() < 0.95}
