"""Shared fixtures: seeds, single-threaded torch, small weights with outliers."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # what tests of all folders share: project_files.py
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def weight():
    """make(n, k): a weight with a few strong directions and outlier columns, as trained linears have."""

    def make(n: int, k: int, seed: int = 0) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(n, k, generator=g) / k**0.5
        w += torch.randn(n, 4, generator=g) @ torch.randn(4, k, generator=g) / k**0.5
        w[:, :: max(1, k // 8)] *= 4
        return w

    return make


def sqnr(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to quantization noise in dB."""
    noise = (reference.double() - value.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


@pytest.fixture(name="sqnr")
def _sqnr():
    return sqnr
