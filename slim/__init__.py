"""Cheaper forms of a UNet's self-attention and 3x3 convolutions, after MobileDiffusion (2311.16567). Pure torch.

`operations` holds them, one row each; who gets which is decided in `choose`.
"""
