"""Calibration: a few thousand tokens of each layer's input decide smoothing, low-rank branch, scales and codes.

presets   the recipes, one row each          solve      one layer, by a row
observe   hooks, and samples of tokens       smooth     the smoothing factor, closed form and learned
engine    layer after layer of a module      low_rank   where the rank goes: before rounding, and after
gptq      codes by error feedback
"""
