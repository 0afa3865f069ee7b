"""Cheaper forms of a UNet's self-attention and 3x3 convolutions, after MobileDiffusion (2311.16567). Pure torch.

One file an operation, one contract (`op`), one table (`table`). Who gets which operation is decided in `choose`.
"""
