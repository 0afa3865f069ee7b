"""Bytes and names of checkpoints: what is in a file (header), reading and writing 4-bit files, and converting models.

formats/   one file an on-disk format
A format knows bytes, a family knows names; neither knows the other.
"""
