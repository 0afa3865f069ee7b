"""The modules that these tests share, and every known file as a fixture."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from adapter_shapes import FILES


@pytest.fixture(params=FILES)
def file(request) -> tuple[str, dict[str, tuple], float]:
    """Name, key shapes, million parameters."""
    return request.param, *FILES[request.param]
