"""On-disk formats of quantized layers, one file each. A format has ``detect(names)`` and ``read(tensors, file)``.

GGUF is a file of its own, not layers in a safetensors file: gguf.py has ``is_gguf(path)`` and ``load(path)``.
"""

from . import bnb, comfy_quant, nunchaku

FORMATS = (comfy_quant, nunchaku, bnb)
