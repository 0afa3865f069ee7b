"""Peak memory and time of reading and of writing files of published sizes.

    python benchmarks/load.py [--scale 1.0] [--folder DIR]                       reads
    python benchmarks/load.py --write generic sdxl flux [--scale 1.0] [--folder DIR]    quantizes, and converts

Read: a synthetic nunchaku FLUX.1 (12 billion weights, 6.5 GB). The file is sparse: its header is real, its bytes are
zeros, so it takes no disk. Peak resident memory over the file's size, and the time over that of safetensors' own
load_file on the same file.

Written: ``nibble quantize`` of random weights, under names of no known family (2.5 GB) and under SDXL's (5.1 GB, its
real shapes), and ``nibble convert`` of the sparse file. Peak resident memory of the whole command (VmHWM, mapped pages
among it), the most of it that was no file's (RssAnon), and CPU seconds.

Each figure comes from a fresh process. ``--scale`` shrinks the number of blocks. Prints a markdown table.
"""

# ruff: noqa: TID251
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
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
        size = {"I8": 1, "I32": 4, "BF16": 2, "F16": 2}[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return path.stat().st_size


def generic(size: int) -> dict:
    """Tensor name -> (dtype, shape) of a transformer that is no known family's, in fp16, of about ``size`` bytes."""
    d, out, i = 2048, {}, 0
    while not out or sum(2 * prod(shape) for _, shape in out.values()) < size:
        b = f"blocks.{i}."
        for name, (n, k) in {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
                             "mlp.fc2": (d, 4 * d)}.items():  # fmt: skip
            out |= {f"{b}{name}.weight": ("F16", [n, k]), f"{b}{name}.bias": ("F16", [n])}
        out |= {f"{b}norm.weight": ("F16", [d])}
        i += 1
    return out


def sdxl(scale: float) -> dict:
    """Tensor name -> (dtype, shape) of SDXL's UNet in native names, with fewer transformer blocks for a ``scale``
    below 1.
    """
    import torch
    from comfyui_nibble.families import by_diffusers_class
    from diffusers import UNet2DConditionModel

    config = dict(
        block_out_channels=[320, 640, 1280], layers_per_block=2, cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=[1, max(1, round(2 * scale)), max(1, round(10 * scale))], sample_size=128,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in UNet2DConditionModel(**config).state_dict().items()}
    rules = by_diffusers_class("UNet2DConditionModel", config).key_rules(config)
    return {f"model.diffusion_model.{r.native}": ("F16", shapes[r.sources[0]]) for r in rules if r.sources[0] in shapes}


def write_random(path: Path, tensors: dict) -> int:
    """A safetensors file of fp16 values as trained weights have them. Returns its size."""
    import torch

    size = write_sparse(path, tensors)
    generator = torch.Generator().manual_seed(0)
    with path.open("r+b") as f:
        f.seek(8 + int.from_bytes(f.read(8), "little"))
        for _, shape in tensors.values():
            value = torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5
            f.write(value.half().numpy().tobytes())
    return size


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


COMMAND = """
import sys
from comfyui_nibble.headless.cli import main
sys.exit(main(sys.argv[1:]))
"""
PEAK = """
import sys, time
from pathlib import Path
status = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(status.split()[1]) * 1024, time.process_time(), file=sys.stderr)
"""


def run_command(arguments: list[str], before: str = "") -> tuple[int, int, float]:
    """(peak resident bytes, most of them that were no file's, CPU seconds) of a ``nibble`` command on Linux.
    ``before``: code that runs first.
    """
    code = before + COMMAND.replace("sys.exit(main(sys.argv[1:]))", f"assert not main(sys.argv[1:])\n{PEAK}")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    anonymous = [0]
    status = Path(f"/proc/{process.pid}/status")

    def follow() -> None:
        while process.poll() is None:
            found = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            anonymous[0] = max([anonymous[0], *(int(line.split()[1]) * 1024 for line in found)])
            time.sleep(0.02)

    thread = threading.Thread(target=follow)
    thread.start()
    said = process.stderr.read()
    thread.join()
    if process.returncode:
        raise RuntimeError(said)
    peak, seconds = said.split()[-2:]
    return int(peak), anonymous[0], float(seconds)


def written(folder: Path, kind: str, scale: float) -> None:
    """A row of the table for one of `SOURCES`."""
    make, command = SOURCES[kind]
    source, out = folder / f"{kind}.safetensors", folder / f"{kind}-4bit.safetensors"
    size = make(source, scale)
    peak, anonymous, seconds = run_command([*command, str(source), "--out", str(out)])
    sizes = " | ".join(f"{x / 1e6:.0f}" for x in (size, out.stat().st_size, peak, anonymous))
    print(f"| nibble {' '.join(command)}, {kind} | {sizes} | {seconds:.0f} |", flush=True)
    source.unlink()
    out.unlink()


SOURCES = {
    "generic": (lambda path, scale: write_random(path, generic(int(scale * 2.5e9))), ["quantize"]),
    "sdxl": (lambda path, scale: write_random(path, sdxl(scale)), ["quantize"]),
    "flux": (lambda path, scale: write_sparse(path, flux(scale)), ["convert"]),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--scale", type=float, default=1.0, help="share of the blocks (default 1.0)")
    arguments.add_argument("--folder", type=Path, help="where the sparse file goes (default: a temporary folder)")
    arguments.add_argument("--write", nargs="+", choices=SOURCES, default=(), help="what to write a 4-bit file of")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.write:
            print("| command | source, MB | file, MB | peak memory, MB | of it anonymous, MB | CPU s |")
            print("|---|---|---|---|---|---|")
            for kind in args.write:
                written(Path(folder), kind, args.scale)
            return
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
