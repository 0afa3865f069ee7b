"""On-disk formats of quantized layers, one file each."""

from . import comfy_quant

FORMATS = (comfy_quant,)
