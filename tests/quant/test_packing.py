"""Byte order of 4-bit codes: by hand, by round trip, and against comfy-kitchen's own unpacker."""

import pytest
import torch
from comfy_kitchen.backends.eager import svdquant as kitchen
from comfyui_nibble.quant import packing

SIGNED = torch.tensor([[1, -2, 3, -4, 5, -6, 7, -8], [0, 1, 2, 3, -1, -2, -3, -4]])
UNSIGNED = torch.tensor([[1, 14, 3, 12, 5, 10, 7, 8], [0, 1, 2, 3, 15, 14, 13, 12]])
# Column 0 is 1 = 0x1 (low nibble), column 1 is -2 = 0xE (high nibble): the first byte is 0xE1.
BYTES = torch.tensor([[0xE1, 0xC3, 0xA5, 0x87], [0x10, 0x32, 0xEF, 0xCD]], dtype=torch.uint8)


@pytest.mark.parametrize("codes", [SIGNED, UNSIGNED])
def test_pack_by_hand(codes):
    assert torch.equal(packing.pack(codes).view(torch.uint8), BYTES)


def test_unpack_by_hand():
    packed = BYTES.view(torch.int8)
    assert torch.equal(packing.unpack_signed(packed).long(), SIGNED)
    assert torch.equal(packing.unpack_unsigned(packed).long(), UNSIGNED)


def test_tile_packed_by_hand():
    """The two rows above at rows 0 and 1, columns 0..7 of a 128 x 64 weight."""
    codes = torch.zeros(128, 64, dtype=torch.int8)
    codes[:2, :8] = SIGNED
    tiles = packing.tile_weight(packing.pack(codes))
    assert tiles.shape == (1, 1, 32, 128)
    assert torch.equal(tiles[0, 0, 0, 0:4].view(torch.uint8), BYTES[0])
    assert torch.equal(tiles[0, 0, 0, 32:36].view(torch.uint8), BYTES[1])
    assert tiles.view(torch.uint8).sum() == BYTES.sum()


@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 64), (830, 546), (256, 192)])
def test_round_trip(n, k):
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    assert torch.equal(packing.unpack_signed(packing.pack(codes)), codes)
    assert torch.equal(packing.unpack_unsigned(packing.pack(codes & 15)), (codes & 15).to(torch.uint8))


@pytest.mark.parametrize(("n", "k", "r"), [(128, 64, 16), (384, 256, 24)])
def test_tiles_round_trip_and_agree_with_kitchen(n, k, r):
    packed = packing.pack(torch.randint(-8, 8, (n, k), dtype=torch.int8))
    scales, up = torch.randn(k // 64, n), torch.randn(n, r)
    for tile, untile, theirs, value in (
        (packing.tile_weight, packing.untile_weight, kitchen._tile_packed_weight_to_row_major, packed),
        (packing.tile_scales, packing.untile_scales, kitchen._tile_packed_scales_to_natural, scales),
        (packing.tile_up, packing.untile_up, kitchen._tile_packed_lora_up_to_natural, up),
    ):
        assert torch.equal(untile(tile(value)), value)
        assert torch.equal(theirs(tile(value)), value)


def test_agrees_with_kitchen_unpackers():
    packed = torch.randint(-128, 128, (40, 32), dtype=torch.int8)
    assert torch.equal(packing.unpack_signed(packed), kitchen._unpack_int4_row_major(packed))
    assert torch.equal(packing.unpack_unsigned(packed).to(torch.int8), kitchen._unpack_uint4_row_major(packed))


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="must be even, got 7"):
        packing.pack(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="N=100, K=64"):
        packing.tile_weight(torch.zeros(100, 32, dtype=torch.int8))
