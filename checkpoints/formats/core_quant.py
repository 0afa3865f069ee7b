"""Layers in ComfyUI's own quantized formats, written as ComfyUI reads them: it needs no pack for these.

    nvfp4            weight U8 (N, K/2)   weight_scale F8_E4M3, blocked    weight_scale_2 F32
    convrot_w4a4     weight I8 (N, K/2)   weight_scale F32 (N,)           JSON convrot_groupsize
    asym_w4a8_int8   weight I8 (N, K/2)   weight_s_rel F8_E4M3, weight_s_channel F32 (N), weight_codebook F32 (16)
                                                                          JSON group_size, convrot_groupsize
    int8_tensorwise  weight I8 (N, K)     weight_scale F32 (N, 1)         JSON convrot, convrot_groupsize

Every layer carries its JSON in a U8 tensor ``<layer>.comfy_quant``. Source: comfy/ops.py of ComfyUI 0.33. Reading is
ComfyUI's business; `comfy_quant.read` leaves these layers alone.
"""

from __future__ import annotations

from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ...quant.core_formats import FORMATS
from ...quant.kernels import tensors
from . import comfy_quant

BY_LAYOUT = {f.layout: f for f in FORMATS.values()}


def write(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one layer under ``layer``, without bias. Raises KeyError for any other layout."""
    row = BY_LAYOUT[weight._layout_cls]
    out = {f"{layer}.weight{suffix}": t.contiguous() for suffix, t in tensors(weight).items()}
    out[f"{layer}.comfy_quant"] = comfy_quant.encode_config({"format": row.id, **row.config(weight.shape[1])})
    return out
