"""nunchaku's packed layers, and diffusers' Nunchaku Lite, which packs alike: svdq int4, svdq nvfp4 and AWQ W4A16.

    svdq   qweight I8 (N, K/2)    wscales bf16 (K/64, N) for int4, e4m3 (K/16, N) for nvfp4    bias (N,) optional
           smooth (K,)   lora_down (K, R)   lora_up (N, R)          v1 names
           smooth_factor   proj_down   proj_up                      v2 and Lite names; either is read in any file
           wcscales (N,)   wtscale (1,)                             nvfp4, both optional
    awq    qweight I32 (N/4, K/2)   wscales, wzeros (>= K/64, N)   bias (N,) optional

Everything of svdq but wtscale is permuted, vectors too; of awq only qweight is. The shapes on disk are nominal, so
nothing may be cut or joined before it is unpacked. smooth_orig is never read at run time and is dropped.
Layers come out in natural order, under the file's own names. Source: the nunchaku engine and its exporter's packer;
held against tensors that the exporter's own code packed (tests/data/nunchaku).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant import packing
from ...quant.awq import AWQWeight
from ...quant.nvfp4_lowrank import NVFP4LowRankWeight
from ...quant.svdquant import SVDQuantWeight
from .. import lazy
from ..errors import naming
from .stored import StoredLayer, all_finite

TITLE = "nunchaku"
SVDQ, SVDQ_FP4, AWQ = "nunchaku_svdq_int4", "nunchaku_svdq_nvfp4", "nunchaku_awq_w4a16"
END = ".qweight"
# v1 name -> v2 name
V2 = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}
TILE, RANK_TILE = 128, 16
AWQ_ROWS = 256  # stored rows, four of the matrix each
REPAIR = "Download the file again, or load it with the nunchaku nodes"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDE = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Refusal:
    """A layer that looks like this format and is none: ``test`` on {tensor name: (dtype, shape)}."""

    test: Callable[[Mapping[str, tuple]], bool]
    what: str
    remedy: str


def _is(parts: Mapping[str, tuple], name: str, *dtypes: str) -> bool:
    return name in parts and parts[name][0] in dtypes


REFUSALS = (
    Refusal(
        lambda p: _is(p, "qweight", "I8") and _is(p, "wscales", "U8", "F8_E8M0"),
        "it is SVDQuant with MXFP4 codes, whose scales lie in an order of their own",
        "Load it with the pack that made it, or take the model's int4 or nvfp4 file",
    ),
    Refusal(
        lambda p: _is(p, "qweight", "I16"),
        "it is a tinychat W4A16 layer, as nunchaku's T5 text encoder has them",
        "Load it with nunchaku's text encoder loader, or use the 16-bit or fp8 text encoder",
    ),
    Refusal(
        lambda p: _is(p, "qweight", "I32") and ("qzeros" in p or "g_idx" in p),
        "it is a GPTQ or AutoAWQ layer of a language model",
        "Load it with the tool that made it",
    ),
    Refusal(
        lambda p: any(_is(p, n, "I8", "U8", "F8_E4M3", "F8_E5M2") for n in ("proj_down", "lora_down")),
        "its low-rank branch is stored in 8 bits, which no published description covers",
        "Load it with the pack that made it",
    ),
)  # fmt: skip


def detect(names: Mapping[str, object]) -> bool:
    """Whether any layer in ``names`` is packed like this, or pretends to be."""
    return any(n.endswith(END) for n in names)


def kind(parts: Mapping[str, tuple]) -> str | None:
    """SVDQ, SVDQ_FP4, AWQ or None, for one layer's {tensor name: (dtype, shape)} from the header."""
    if _is(parts, "qweight", "I32"):
        return AWQ if _is(parts, "wscales", *WIDE) and _is(parts, "wzeros", *WIDE) else None
    if not (_is(parts, "qweight", "I8") and ("smooth" in parts or "smooth_factor" in parts)):
        return None
    if _is(parts, "wscales", *WIDE):
        return SVDQ
    return SVDQ_FP4 if _is(parts, "wscales", "F8_E4M3") else None


def refusal(parts: Mapping[str, tuple]) -> tuple[str, str] | None:
    """(what it is, what to do) for a layer that this version does not read, else None."""
    for row in REFUSALS:
        if row.test(parts):
            return row.what, row.remedy
    if kind(parts) is None:
        have = ", ".join(f"{n} {d}" for n, (d, _) in sorted(parts.items()))
        what = f"its 4-bit layers are in nunchaku's packing, but {have[:200]} is no layer that this version knows"
        return what, "Load it with the pack that made it"
    return None


def logical(parts: Mapping[str, tuple]) -> tuple[int, int]:
    """(N, K) of a layer, from its header. (0, 0) where the shape makes none."""
    shape = parts["qweight"][1]
    if len(shape) != 2:
        return 0, 0
    n, half = shape
    return (4 * n, 2 * half) if parts["qweight"][0] == "I32" else (n, 2 * half)


def rank(parts: Mapping[str, tuple]) -> int:
    return next((parts[n][1][-1] for n in ("proj_down", "lora_down") if n in parts and parts[n][1]), 0)


def logical_shapes(names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """``names`` (with their shapes) and a ``.weight`` of its logical shape for every packed layer."""
    out = dict(names)
    for name, shape in names.items():
        if name.endswith(END) and len(shape) == 2:
            layer, (n, half) = name.removesuffix(END), shape
            scales = names.get(f"{layer}.wscales", ())
            out.setdefault(f"{layer}.weight", (scales[1] if len(scales) == 2 else n, 2 * half))  # awq packs rows too
    return out


OWN = ("qweight", "wscales", "wzeros", "wcscales", "wtscale", *V2, *V2.values())


def of_layer(names: Mapping[str, object], layer: str) -> dict[str, object]:
    """What of ``names`` belongs to ``layer``, by its last name."""
    return {n: names[f"{layer}.{n}"] for n in (*OWN, "qzeros", "g_idx") if f"{layer}.{n}" in names}


@dataclass(frozen=True)
class Order:
    """An order in which the kernels want a matrix: reshape, permute, reshape. Both directions, byte for byte.

    ``split``: shape of the stored tensor -> its small dimensions, which ``permute`` brings into natural order;
    ``natural``: the shape of the stored tensor -> the shape to read it as.
    """

    split: Callable[..., tuple[int, ...]]
    permute: tuple[int, ...]
    natural: Callable[..., tuple[int, ...]]

    def unpack(self, stored: Tensor) -> Tensor:
        """Stored order -> natural order."""
        if not stored.numel():
            return stored.reshape(self.natural(*stored.shape))
        small = stored.reshape(self.split(*stored.shape)).permute(self.permute)
        out = lazy.empty(self.natural(*stored.shape), stored.dtype, stored)
        out.view(small.shape).copy_(small)
        return out

    def pack(self, value: Tensor) -> Tensor:
        """Natural order -> stored order."""
        stored = self.natural(*value.shape)  # every order here is its own inverse on shapes
        if not value.numel():
            return value.reshape(stored)
        split = self.split(*stored)
        back = sorted(range(len(split)), key=self.permute.__getitem__)
        return value.reshape([split[i] for i in self.permute]).permute(back).reshape(stored)


def _same(*shape: int) -> tuple[int, ...]:
    return shape


def _swapped(a: int, b: int) -> tuple[int, int]:
    return b, a


# Dimensions by name, n = output rows, k = input columns.
# codes: tile of 128 rows, group of 64 columns, then 16 rows, lane row, lane column, 8-row half, 32-column half, byte
CODES = Order(lambda n, h: (n // 128, h // 32, 8, 8, 4, 2, 2, 4), (0, 2, 5, 3, 1, 6, 4, 7), _same)
# int4 scales (K/64, N): n = 128 tile + 16 a + 8 b + 2 c + d, stored as tile, group, a, c, b, d
SCALES = Order(lambda g, n: (n // 128, g, 8, 4, 2, 2), (1, 0, 2, 4, 3, 5), _same)
# bias, smooth, channel scales: the same without groups; stored positions 0, 1, 2, 3 are 0, 1, 8, 9
VECTOR = Order(lambda n: (n // 128, 8, 4, 2, 2), (0, 1, 3, 2, 4), _same)
# nvfp4 scales, stored (K/16, N), natural (N, K/16): n = 128 tile + 32 sp + 8 q + l, group = 4 kt + kk
FP4_SCALES = Order(lambda g, n: (n // 128, g // 4, 8, 4, 4, 4), (0, 4, 3, 2, 1, 5), _swapped)
# branch factors: 16 x 16 tiles
DOWN = Order(lambda k, r: (k // 16, r // 16, 8, 4, 2, 2, 2), (0, 5, 3, 6, 1, 4, 2), _same)
UP = Order(lambda n, r: (n // 16, r // 16, 8, 4, 2, 2, 2), (0, 4, 2, 1, 5, 3, 6), _same)


def awq_codes(stored: Tensor) -> Tensor:
    """I32 (N/4, K/2) -> (N, K) uint8 codes, 0..15.

    As 16-bit words: 4 rows of a 64-column tile side by side, 16 words each; nibble j of word i of half h is column
    32 h + 8 j + i.
    """
    n, k = stored.shape[0] * 4, stored.shape[1] * 2
    words = stored.contiguous().view(torch.int16).reshape(n // 4, k // 64, 4, 2, 8).permute(0, 2, 1, 3, 4)
    nibbles = [(words >> shift) & 15 for shift in (0, 4, 8, 12)]
    return torch.stack(nibbles, -2).reshape(n, k).to(torch.uint8)


def pack_awq_codes(codes: Tensor) -> Tensor:
    """The inverse of `awq_codes`."""
    n, k = codes.shape
    nibbles = codes.to(torch.int32).reshape(n, k // 64, 2, 4, 8).unbind(-2)
    words = sum(c << shift for c, shift in zip(nibbles, (0, 4, 8, 12), strict=True))
    words = torch.where(words > 32767, words - 65536, words).to(torch.int16)
    tiles = words.reshape(n // 4, 4, k // 64, 16).permute(0, 2, 1, 3).reshape(n // 4, k)
    return tiles.contiguous().view(torch.int32)


def read(tensors: MutableMapping[str, Tensor], file: str, lite: bool = False) -> dict[str, StoredLayer]:
    """Takes every packed layer out of ``tensors``; its bias stays there, unpacked. ``lite``: diffusers' Nunchaku Lite
    wrote them, which weaves no modulation and has no unsigned activations. Raises CheckpointError.
    """
    found = {}
    for layer in [k.removesuffix(END) for k in tensors if k.endswith(END)]:
        parts = {n: tensors.pop(f"{layer}.{n}") for n in OWN if f"{layer}.{n}" in tensors}
        parts = {V2.get(n, n): t for n, t in parts.items()}
        bias = tensors.pop(f"{layer}.bias", None)
        with naming(file, REPAIR, layer):
            found[layer], bias = _read_layer(parts, bias, lite)
        if bias is not None:
            tensors[f"{layer}.bias"] = bias
    return found


def _read_layer(parts: dict[str, Tensor], bias: Tensor | None, lite: bool) -> tuple[StoredLayer, Tensor | None]:
    finite(parts)
    awq = parts["qweight"].dtype == torch.int32
    gone = [n for n in (("wscales", "wzeros") if awq else ("wscales", "smooth_factor")) if n not in parts]
    if gone or parts["qweight"].dim() != 2:
        raise ValueError(f"{gone[0]} is not there" if gone else "qweight is no matrix")
    if awq:
        return StoredLayer(unpack_awq(parts), form=AWQ, padded=True, woven=not lite), bias
    n, k = parts["qweight"].shape[0], parts["qweight"].shape[1] * 2
    if n % TILE or k % TILE or n * k == 0:
        raise ValueError(f"N={n}, K={k} are not multiples of {TILE}, so it is not packed as its name says")
    if bias is not None:
        want("bias", bias, (n,))
        bias = VECTOR.unpack(bias)
    fp4 = parts["wscales"].dtype == torch.float8_e4m3fn
    if fp4:
        return StoredLayer(unpack_nvfp4(parts), form=SVDQ_FP4, padded=True), bias
    return StoredLayer(unpack_int4(parts), form=SVDQ, padded=True, unsigned=not lite), bias


def want(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in (*FLOATS, torch.float8_e4m3fn):
        raise ValueError(f"{name} is {tensor.dtype}, expected a 16-bit float")


def finite(parts: Mapping[str, Tensor]) -> None:
    """Raises ValueError for NaN or infinity in what scales the codes."""
    for name, t in parts.items():
        if t.dtype.is_floating_point and name != "smooth_factor_orig" and not all_finite(t):
            raise ValueError(f"{name} holds NaN or infinity")


def _common(parts: dict[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
    """smooth_factor and the branch, unpacked; a file without a branch gets one of rank 0."""
    smooth = parts["smooth_factor"]
    want("smooth", smooth, (k,))
    down = parts.get("proj_down", smooth.new_empty(k, 0))
    up = parts.get("proj_up", smooth.new_empty(n, 0))
    r = down.shape[-1] if down.dim() else 0
    want("lora_down", down, (k, r))
    want("lora_up", up, (n, r))
    if r % RANK_TILE:
        raise ValueError(f"a packed branch has a rank that is a multiple of {RANK_TILE}, not {r}")
    return dict(smooth_factor=VECTOR.unpack(smooth), proj_down=DOWN.unpack(down), proj_up=UP.unpack(up))


def unpack_int4(parts: dict[str, Tensor]) -> SVDQuantWeight:
    n, k = parts["qweight"].shape[0], parts["qweight"].shape[1] * 2
    want("wscales", parts["wscales"], (k // 64, n))
    codes = CODES.unpack(parts["qweight"])
    return SVDQuantWeight(codes, SCALES.unpack(parts["wscales"]), **_common(parts, n, k))


def unpack_nvfp4(parts: dict[str, Tensor]) -> NVFP4LowRankWeight:
    n, k = parts["qweight"].shape[0], parts["qweight"].shape[1] * 2
    want("wscales", parts["wscales"], (k // 16, n))
    codes = CODES.unpack(parts["qweight"]).view(torch.uint8)
    block = FP4_SCALES.unpack(parts["wscales"].view(torch.uint8)).view(torch.float8_e4m3fn)
    channel = torch.ones(n)
    if "wcscales" in parts:
        want("wcscales", parts["wcscales"], (n,))
        channel = VECTOR.unpack(parts["wcscales"]).float()
    if "wtscale" in parts:
        if parts["wtscale"].numel() != 1:
            raise ValueError(f"wtscale has {parts['wtscale'].numel()} values, expected one")
        channel = channel * parts["wtscale"].float().reshape(())
    return NVFP4LowRankWeight(_swap(codes), block, channel, **_common(parts, n, k))


def _swap(codes: Tensor) -> Tensor:
    """The two nibbles of every byte change places."""
    return (codes << 4) | (codes >> 4)


def unpack_awq(parts: dict[str, Tensor]) -> AWQWeight:
    """wzeros counts from code 0 and this pack's from code 8. Rows of scales beyond K/64 are the exporter's padding."""
    n, k = parts["qweight"].shape[0] * 4, parts["qweight"].shape[1] * 2
    groups = k // 64
    if k % 64 or groups == 0:
        raise ValueError(f"K={k} is not a multiple of 64")
    for name in ("wscales", "wzeros"):
        value = parts[name]
        want(name, value, (max(groups, value.shape[0] if value.dim() == 2 else 0), n))
    scales, zeros = parts["wscales"][:groups].contiguous(), parts["wzeros"][:groups]
    zeros = (zeros.float() + 8 * scales.float()).to(scales.dtype)
    # Some rows at a time: unpacked, a modulation of FLUX.1 takes eight times its bytes.
    codes = lazy.empty((n, k // 2), torch.int8, parts["qweight"])
    for i, rows in enumerate(parts["qweight"].split(AWQ_ROWS)):
        at = 4 * AWQ_ROWS * i
        codes[at : at + 4 * len(rows)] = packing.pack(awq_codes(rows))
    return AWQWeight(codes, scales, zeros)


def write(layer: str, weight: SVDQuantWeight | NVFP4LowRankWeight | AWQWeight, v2: bool = False) -> dict[str, Tensor]:
    """The packed tensors of a layer under ``layer``, without bias; the inverse of `read`. ``v2``: names of svdq parts.

    nvfp4: a channel scale that is the same everywhere becomes wtscale, any other wcscales beside a wtscale of 1.
    """
    if isinstance(weight, AWQWeight):
        parts = _awq_parts(weight)
    else:
        down, up, smooth = ("proj_down", "proj_up", "smooth_factor") if v2 else ("lora_down", "lora_up", "smooth")
        parts = {smooth: VECTOR.pack(weight.smooth_factor), down: DOWN.pack(weight.proj_down)}
        parts[up] = UP.pack(weight.proj_up)
        parts |= _int4_parts(weight) if isinstance(weight, SVDQuantWeight) else _nvfp4_parts(weight)
    return {f"{layer}.{n}": t.contiguous() for n, t in parts.items()}


def _int4_parts(weight: SVDQuantWeight) -> dict[str, Tensor]:
    return {"qweight": CODES.pack(weight.qweight), "wscales": SCALES.pack(weight.wscales)}


def _nvfp4_parts(weight: NVFP4LowRankWeight) -> dict[str, Tensor]:
    scale = FP4_SCALES.pack(weight.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    out = {"qweight": CODES.pack(_swap(weight.qweight).view(torch.int8)), "wscales": scale}
    dtype, channel = weight.smooth_factor.dtype, weight.channel_scale
    if (channel == channel[0]).all():
        return out | {"wtscale": channel[:1].to(dtype)}
    return out | {"wcscales": VECTOR.pack(channel.to(dtype)), "wtscale": torch.ones(1, dtype=dtype)}


def _awq_parts(weight: AWQWeight) -> dict[str, Tensor]:
    zeros = (weight.wzeros.float() - 8 * weight.wscales.float()).to(weight.wzeros.dtype)
    codes = pack_awq_codes(packing.unpack_unsigned(weight.qweight))
    return {"qweight": codes, "wscales": weight.wscales, "wzeros": zeros}


def write_bias(bias: Tensor) -> Tensor:
    """(N,) natural -> packed, as svdq layers have it."""
    return VECTOR.pack(bias)
