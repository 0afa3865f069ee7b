"""Reading costs the file's own size: on a sparse file with the layer sizes of FLUX.1, one block of each kind."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "load.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("nibble_load_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLACK = 64 * 2**20  # what the allocator keeps; at the model's full size it is within the third


def test_peak_stays_below_the_files_size_and_a_third(bench, tmp_path):
    path = tmp_path / "flux.safetensors"
    size = bench.write_sparse(path, bench.flux(0.01))
    assert 0.3 * 2**30 < size < 0.5 * 2**30
    peak, _ = bench.measure(path, *bench.READERS["nibble load, as ComfyUI gets it"])
    assert 0.9 * size < peak < 1.3 * size + SLACK
