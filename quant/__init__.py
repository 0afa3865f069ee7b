"""The quantization core: pure torch on plain tensors, no names and no files.

packing   4-bit codes <-> bytes                 schemes   the table of numeric recipes
svdquant  W4A4 with a low-rank branch           awq       W4A16 with zero points
scales    the signed -8 scale search            datafree  quantize a weight from itself alone
kernels   plain tensors <-> comfy-kitchen       policy    which layer gets which scheme, as data
modules   quantize the linears of a module
"""
