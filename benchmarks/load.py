"""Peak memory and load time of a published-size 4-bit file: a synthetic nunchaku FLUX.1 (12 billion weights, 6.5 GB).

    python benchmarks/load.py [--scale 1.0] [--folder DIR]

The file is sparse: its header is real, its bytes are zeros, so it takes no disk. Each figure comes from a fresh
process. ``--scale`` shrinks the number of blocks. Prints a markdown table: peak resident memory over the file's size,
and the time over that of safetensors' own load_file on the same file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

D, M, R = 3072, 12288, 32
DOUBLE, SINGLE = 19, 38


def svdq(name: str, n: int, k: int) -> dict:
    sides = {
        "wscales": [k // 64, n],
        "bias": [n],
        "smooth": [k],
        "smooth_orig": [k],
        "lora_down": [k, R],
        "lora_up": [n, R],
    }
    return {f"{name}.qweight": ("I8", [n, k // 2])} | {f"{name}.{s}": ("BF16", shape) for s, shape in sides.items()}


def awq(name: str, n: int, k: int) -> dict:
    sides = {"wscales": [k // 64, n], "wzeros": [k // 64, n], "bias": [n]}
    return {f"{name}.qweight": ("I32", [n // 4, k // 2])} | {
        f"{name}.{s}": ("BF16", shape) for s, shape in sides.items()
    }


def dense(name: str, n: int, k: int) -> dict:
    return {f"{name}.weight": ("BF16", [n, k]), f"{name}.bias": ("BF16", [n])}


def flux(scale: float) -> dict:
    """Tensor name -> (dtype, shape) of a FLUX.1 as nunchaku publishes it."""
    out = dense("x_embedder", D, 64) | dense("context_embedder", D, 4096) | dense("proj_out", 64, D)
    out |= dense("norm_out.linear", 2 * D, D)
    for name, k in (("timestep", 256), ("guidance", 256), ("text", 768)):
        stem = f"time_text_embed.{name}_embedder.linear_"
        out |= dense(f"{stem}1", D, k) | dense(f"{stem}2", D, D)
    for i in range(max(1, round(DOUBLE * scale))):
        b = f"transformer_blocks.{i}."
        for end in ("", "_context"):
            out |= svdq(f"{b}qkv_proj{end}", 3 * D, D) | svdq(f"{b}out_proj{end}", D, D)
            out |= (
                svdq(f"{b}mlp{end}_fc1", M, D) | svdq(f"{b}mlp{end}_fc2", D, M) | awq(f"{b}norm1{end}.linear", 6 * D, D)
            )
        out |= {f"{b}norm_{n}.weight": ("BF16", [128]) for n in ("q", "k", "added_q", "added_k")}
    for i in range(max(1, round(SINGLE * scale))):
        b = f"single_transformer_blocks.{i}."
        out |= svdq(f"{b}qkv_proj", 3 * D, D) | svdq(f"{b}mlp_fc1", M, D) | svdq(f"{b}out_proj", D, D)
        out |= svdq(f"{b}mlp_fc2", D, M) | awq(f"{b}norm.linear", 3 * D, D)
        out |= {f"{b}norm_{n}.weight": ("BF16", [128]) for n in ("q", "k")}
    return out


def write_sparse(path: Path, tensors: dict) -> int:
    """A safetensors file of zeros that takes no disk. Returns its size."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"I8": 1, "I32": 4, "BF16": 2}[dtype]
        for s in shape:
            size *= s
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return path.stat().st_size


PROBE = """
import json, resource, sys, time
from pathlib import Path
{imports}

def peak():  # the kernel's figure for this program; getrusage's may be that of the process that started it
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
start = time.perf_counter()
{call}
seconds = time.perf_counter() - start
print(json.dumps([(peak() - before) * 1024, seconds]))
"""
READERS = {
    "safetensors load_file, every byte touched": (
        "import safetensors.torch, torch",
        "found = {n: t.clone() for n, t in safetensors.torch.load_file(sys.argv[1]).items()}",
    ),
    "safetensors load_file (mapped)": ("import safetensors.torch", "found = safetensors.torch.load_file(sys.argv[1])"),
    "nibble load, unpacked": ("from comfyui_nibble.checkpoints.load import load", "found = load(sys.argv[1])"),
    "nibble load, as ComfyUI gets it": (
        "from comfyui_nibble.checkpoints.load import load\nfrom comfyui_nibble.quant import kernels",
        "c = load(sys.argv[1])\nfound = {n: kernels.wrap(c.layers.pop(n).weight) for n in list(c.layers)}",
    ),
}


def measure(path: Path, imports: str, call: str) -> tuple[int, float]:
    """(peak bytes above the imports', seconds) of one reader in a process of its own."""
    code = PROBE.format(imports=imports, call=call)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--scale", type=float, default=1.0, help="share of the blocks (default 1.0)")
    arguments.add_argument("--folder", type=Path, help="where the sparse file goes (default: a temporary folder)")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic-flux.safetensors"
        size = write_sparse(path, flux(args.scale))
        print(f"{size / 2**30:.2f} GiB, {len(flux(args.scale))} tensors\n")
        print("| reader | peak memory / file | seconds | time / mapped load_file touched |\n|---|---|---|---|")
        base = None
        for name, (imports, call) in READERS.items():
            peak, seconds = measure(path, imports, call)
            base = base or seconds
            print(f"| {name} | {peak / size:.2f} | {seconds:.2f} | {seconds / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
