"""What Slim UNet saves and costs on the demo model, on top of 4 bits: the table of docs/slim.md.

    <ComfyUI's Python> benchmarks/slim.py --comfyui <ComfyUI's folder> [--pictures 6] [--steps 12]

Every row draws the same captions from the same noise. PSNR: to the pictures of the 16-bit model. FLOPs saved: of one
evaluation. Error: of the model's answer, as the node reports it. Needs ComfyUI, whose own UNet is slimmed.
"""

# ruff: noqa: TID251
from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDE = 16  # of the demo's latents
# operation -> what is set; levels counted as in the node
WISHES = {
    "pool": {"attention": "pool", "attention_levels": 2},
    "low rank, innermost": {"convolutions": "low rank", "conv_levels": 1},
    "pool and low rank": {
        "attention": "pool", "attention_levels": 2, "convolutions": "low rank", "conv_levels": 1,
    },
}  # fmt: skip
ALONE = {
    "skip, highest": {"attention": "skip"},
    "relu, highest": {"attention": "relu"},
    "separable, innermost": {"convolutions": "separable"},
}
STRENGTHS = (0.25, 0.5, 0.75)
HEAD = ("model", "strength", "FLOPs saved", "weights saved", "error", "PSNR", "recognised")


def start(comfyui: Path):
    """ComfyUI on this machine, and the pack as ComfyUI loads it; returns import_module for it."""
    sys.path.insert(0, str(comfyui))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401 - ComfyUI's own, which must be there first

    spec = importlib.util.spec_from_file_location(
        "nibble_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["nibble_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["nibble_pack"])
    return lambda name: importlib.import_module(f"nibble_pack.{name}")


class Bench:
    """The demo model's parts, the captions, and the noise."""

    def __init__(self, ours, pictures: int, steps: int):
        import torch

        self.ours, self.steps = ours, steps
        self.demo, self.slim = ours("nodes.bridge.demo"), ours("nodes.bridge.slim")
        self.references = ours("demo.recognise").load("noto")
        self.captions = [names[0] for names in self.references.names[:pictures]]
        clip, self.vae = self.demo.clip(), self.demo.vae()
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(c))[0] for c in (*self.captions, "")]
        conds = torch.cat([e[0] for e in encoded])
        self.positive = [[conds[:-1], {}]]
        self.negative = [[conds[-1:].expand(len(self.captions), -1, -1).clone(), {}]]
        self.priced = self.slim.Inputs(tuple([e] for e in encoded[:2]), torch.zeros(1, 4, SIDE, SIDE), 3)
        self.noise = torch.randn(pictures, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def draw(self, model):
        """Pictures (N, H, W, 3) of the captions."""
        import comfy.sample
        import torch

        latent = comfy.sample.sample(
            model, self.noise, self.steps, 3.0, "ddim", "ddim_uniform", self.positive, self.negative,
            torch.zeros_like(self.noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return self.vae.decode(latent).clamp(0, 1).cpu().numpy()

    def row(self, title: str, pictures, truth) -> list[str]:
        """[title, PSNR, share of the captions recognised]"""
        psnr = self.ours("metrics.images").mean_psnr(list(truth), list(pictures)) if pictures is not truth else None
        seen = sum(self.references.recognised(p, c) for p, c in zip(pictures, self.captions, strict=True))
        return [title, "reference" if psnr is None else f"{psnr:.1f} dB", f"{seen} of {len(self.captions)}"]


def rows(bench: Bench):
    """Every row of the table as it is measured."""
    report, choose = bench.ours("nodes.bridge.slim_report"), bench.ours("slim.choose")
    models = {"16-bit": bench.demo.model(False), "4-bit": bench.demo.model(True)}
    truth = bench.draw(models["16-bit"])
    for name, model in models.items():
        title, psnr, seen = bench.row(name, truth if name == "16-bit" else bench.draw(model), truth)
        yield [title, "", "", "", "", psnr, seen]
    whole = report.whole(models["4-bit"], bench.priced)
    runs = [(n, w, s) for n, w in WISHES.items() for s in STRENGTHS] + [(n, w, 0.5) for n, w in ALONE.items()]
    for name, wish, strength in runs:
        facts = bench.slim.price(models["4-bit"], choose.Wish(strength, **wish), bench.priced)
        savings = [report.saving(facts, c) for c in facts.plan.changes]
        flops, size = sum(s.flops_saved for s in savings) / whole, sum(s.bytes_saved for s in savings)
        error = facts.price.errors[facts.plan.changes]
        title, psnr, seen = bench.row(
            f"4-bit, {name}", bench.draw(bench.slim.slimmed(models["4-bit"], facts.plan)), truth
        )
        yield [title, f"{strength:g}", f"{flops:.1%}", f"{size / 2**20:.1f} MiB", f"{error:.1%}", psnr, seen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--pictures", type=int, default=6, help="how many of the reference captions")
    parser.add_argument("--steps", type=int, default=12, help="guided DDIM steps of each picture")
    args = parser.parse_args()
    ours = start(args.comfyui)
    import torch

    with torch.inference_mode():
        bench = Bench(ours, args.pictures, args.steps)
        print("|", " | ".join(HEAD), "|")
        print("|" + "---|" * len(HEAD))
        for row in rows(bench):
            print("|", " | ".join(row), "|", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
