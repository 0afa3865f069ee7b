"""A key of a LoRA file = what it changes + which part of the change it is: every trainer's suffixes in one table.

kohya       lora_unet_<path with _>.lora_down.weight    .alpha   .dora_scale
diffusers   unet.<path>.lora_A.weight | transformer.<path>... | <path>.lora.down.weight | <path>_lora.down.weight
PEFT        base_model.model.<path>.lora_A.weight        .lora_magnitude_vector; alpha in adapter_config.json
ComfyUI     diffusion_model.<path>.lora_down.weight      .diff .diff_b .set_weight .reshape_weight
OneTrainer  lora_transformer_<path with _>.lora_down.weight | <part>.<path>.lora_down.weight
LyCORIS     <any of these>.hada_w1_a | .lokr_w1 | .oft_blocks ...
XLabs       double_blocks.0.processor.qkv_lora1.down.weight
"""

from __future__ import annotations

import re

# A target's two halves in each spelling -> {suffix: role}. A target may hold several spellings: each is a LoRA.
HALVES = {
    "kohya": {".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid"},
    "PEFT": {".lora_A.weight": "down", ".lora_B.weight": "up"},
    "diffusers": {".lora.down.weight": "down", ".lora.up.weight": "up"},
    "diffusers 2023": {"_lora.down.weight": "down", "_lora.up.weight": "up"},
    "diffusers linear": {".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up"},
    "bare": {".lora_A": "down", ".lora_B": "up"},
}
# suffix -> role, of what belongs to the target whatever its halves are called
SHARED = {
    ".alpha": "alpha", ".dora_scale": "dora_scale", ".reshape_weight": "reshape",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".hada_w1_a": "hada_w1_a", ".hada_w1_b": "hada_w1_b", ".hada_w2_a": "hada_w2_a", ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1", ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1", ".lokr_w1_a": "lokr_w1_a", ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2", ".lokr_w2_a": "lokr_w2_a", ".lokr_w2_b": "lokr_w2_b", ".lokr_t2": "lokr_t2",
    ".oft_blocks": "oft_blocks", ".rescale": "rescale",
    ".a1.weight": "a1", ".a2.weight": "a2", ".b1.weight": "b1", ".b2.weight": "b2",
    ".diff": "diff", ".diff_b": "diff_b", ".lora_B.bias": "up_b", ".set_weight": "set_weight",
    ".w_norm": "w_norm", ".b_norm": "b_norm",
}  # fmt: skip
# (suffix, role, spelling of the halves or ""), longest first: "_lora.up.weight" is no ".weight"
SUFFIXES = tuple(sorted(
    [(suffix, role, spelling) for spelling, some in HALVES.items() for suffix, role in some.items()]
    + [(suffix, role, "") for suffix, role in SHARED.items()],
    key=lambda row: -len(row[0]),
))  # fmt: skip
# PEFT with the adapter's name in it: each name is a spelling of its own
NAMED_ADAPTER = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)\.(\w+)(?:\.weight)?$")
NAMED_ROLES = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
# Keys of kinds that no reader here knows: (pattern of the key, the kind's name). The first that fits names it.
UNREAD = tuple((re.compile(pattern), name) for pattern, name in (
    (r"\.on_input$|\.ia3_l\b", "IA3"),
    (r"\.lora_E\b|\.ranknum\b", "AdaLoRA"),
    (r"\.lora_embedding_[AB]\b", "LoRA of an embedding"),
    (r"\.lora_diag\b", "KaSA"),
    (r"\.lora_latent_mapping\b|\.default_lora_latent_mapping\b", "LoRA-XS"),
    (r"\bpvera_", "PVeRA"),
    (r"\bvera_(lambda_[bd]|[AB])\b", "VeRA"),
    (r"\bboft_[Rs]\b", "PEFT's BOFT"),
    (r"\boft_(embedding_)?[RrSs]\b", "PEFT's OFT"),
    (r"\bglora_[A-E]\b", "PEFT's GLoRA"),
    (r"\bhra_u\b", "HRA"),
    (r"\bwaveft_spectrum\b", "WaveFT"),
    (r"\bfourierft_spectrum\b|\.spectrum\b", "FourierFT"),
    (r"\bxlora_|\binternal_xlora", "X-LoRA"),
    (r"\bvblora_", "VB-LoRA"),
    (r"\brandlora_", "RandLoRA"),
    (r"\bgralora_", "GraLoRA"),
    (r"\bdelora_", "DeLoRA"),
    (r"\broad_(theta|alpha)\b", "RoAd"),
    (r"\bc3a_kernel\b", "C3A"),
    (r"\bshira_weight\b", "SHiRA"),
    (r"\b(bone|miss)_block\b", "MiSS"),
    (r"\bpoly_(lora_[AB]|router)\b", "Poly"),
    (r"\bln_tuning_layers\b", "LN Tuning"),
    (r"\bosf_svd_params\b", "OSF"),
    (r"\b(adamss|beft|deft|frod|hira|lily|peanut|psoft|shadow|supertuning|tinylora|trainable_tokens|unilora)_",
     "another of PEFT's methods"),
    (r"\b(prompt_embeddings|prompt_encoder|adaption_prompt|adaption_gate)\b", "prompt tuning"),
    (r"\.(lambda_layer|[qp]_layer\.weight|base_(q|p|lambda))$", "T-LoRA"),
    (r"\.bm\.weight$", "GLoRA with a core"),
    (r"\.lokr_t1$", "LoKr with two cores"),
    (r"^bundle_emb\.|^emb_params$|\.string_to_param\.", "a textual inversion"),
    (r"^lllite_", "ControlNet-LLLite"),
    (r"^(ip_adapter|image_proj)\.", "IP-Adapter"),
    (r"^lora_controlnet$", "Control-LoRA"),
    (r"\.lora_(down|up)$|\.(qweight|wscales|smooth_factor)$", "packed for the nunchaku engine"),
))  # fmt: skip
SETTING = ".config"  # newer ComfyUI: a block's setting as JSON in a U8 tensor
WEIGHTS = "whole weights, as a model file has them"
# role -> the suffix that ComfyUI's loaders know
COMFYUI = {
    "down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", "reshape": ".reshape_weight",
    "a1": ".a1.weight", "a2": ".a2.weight", "b1": ".b1.weight", "b2": ".b2.weight",
}  # fmt: skip
# kind -> roles of which one set must be whole; the first kind that fits names a target
KINDS = (
    ("lora", ({"down", "up"},)),
    ("loha", ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},)),
    ("lokr", ({"lokr_w1", "lokr_w2"}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
              {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"})),
    ("oft", ({"oft_blocks"},)),
    ("glora", ({"a1", "a2", "b1", "b2"},)),
    ("diff", ({"diff"}, {"w_norm"})),
    ("set", ({"set_weight"},)),
    ("bias", ({"diff_b"}, {"b_norm"})),
)  # fmt: skip
# kind -> roles that it reads beside those
MORE = {
    "lora": ("mid", "alpha", "dora_scale", "magnitude", "reshape", "up_b"),
    "loha": ("hada_t1", "hada_t2", "alpha", "dora_scale", "magnitude"),
    "lokr": ("lokr_t2", "alpha", "dora_scale", "magnitude"),
    "oft": ("rescale", "alpha", "dora_scale"),
    "glora": ("alpha", "dora_scale"),
    "diff": ("alpha", "dora_scale"),
    "set": ("alpha",),
    "bias": ("alpha",),
}
XLABS = (
    (re.compile(r"\.processor\.(qkv|proj)_lora1\."), r".img_attn.\1.lora."),
    (re.compile(r"\.processor\.(qkv|proj)_lora2\."), r".txt_attn.\1.lora."),
    (re.compile(r"\.processor\.qkv_lora\."), ".linear1_qkv.lora."),
    (re.compile(r"\.processor\.proj_lora\."), ".linear2.lora."),
)


def split(key: str) -> tuple[str, str] | None:
    """(target, role) of a key, or None for one that is no part of any kind of LoRA."""
    hit = parse(key)
    return None if hit is None else hit[:2]


def parse(key: str) -> tuple[str, str, str] | None:
    """(target, role, spelling of the halves that it belongs to, "" for any), or None for no part of a known kind."""
    path = key
    for pattern, new in XLABS:
        path = pattern.sub(new, path)
    for suffix, role, spelling in SUFFIXES:
        if path.endswith(suffix) and len(path) > len(suffix):
            return path.removesuffix(suffix), role, "XLabs" if spelling and path != key else spelling
    named = NAMED_ADAPTER.match(path)
    return (named[1], NAMED_ROLES[named[2]], f"adapter {named[3]}") if named else None


def unread(key: str) -> tuple[str, str] | None:
    """(target, name of the kind) for a key of a kind that no reader here knows; None for every other key."""
    for pattern, name in UNREAD:
        hit = pattern.search(key)
        if hit is not None:
            return key[: hit.start()].rstrip("."), name
    return None


def kinds_of(roles) -> list[tuple[str, set[str]]]:
    """[(kind, the roles it takes)] for a target with these roles, each role once; what no kind takes is left over."""
    left, out = set(roles), []
    for kind, need in ((kind, need) for kind, sets in KINDS for need in sets):
        if need <= left:
            taken = need | (left & set(MORE[kind]))
            out.append((kind, taken))
            left -= taken
    return out


def kind_of(roles) -> str:
    """What a target with these roles is: the first of `KINDS` that is whole, or "" when parts are missing."""
    return next((kind for kind, _ in kinds_of(roles)), "")


def comfyui_suffix(role: str) -> str:
    return COMFYUI.get(role, f".{role}")
