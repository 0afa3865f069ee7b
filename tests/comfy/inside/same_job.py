"""ARGS: job, a folder. The same job by the node's run and by the command line on the demo model, each writing a file.

ComfyUI's UNet and diffusers' add up in another order, so their answers differ in the last bits; here the command line
is handed ComfyUI's, and what it is shown. Everything else (weights, names, plans, settings, the file) is its own.
"""

import json
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from lora_common import args, mm, ours, torch  # first: it puts ComfyUI on the path

import folder_paths  # isort: skip
from safetensors import safe_open
from safetensors.torch import load_file

job, out = args[0], Path(args[1])
folder_paths.set_output_directory(str(out))
demo, shipped, cli = ours("nodes.bridge.demo"), ours("demo"), ours("headless.cli")
PROMPTS, EMPTY = ("red apple", "fox face"), torch.zeros(1, 4, 16, 16)
node, command = out / "one" / "same.safetensors", out / "two" / "same.safetensors"
prompts = out / "prompts.txt"
prompts.write_text("\n".join(PROMPTS))
for path in (node, command):
    path.parent.mkdir(parents=True)


train_model = ours("nodes.bridge.train_model")
base_of, seen = train_model.base_of, []  # seen: the models that a node's run trains or asks
train_model.base_of = lambda model, *more: seen.append(model) or base_of(model, *more)


def calibrate() -> None:
    bridge, headless, save = ours("nodes.bridge.calibrate"), ours("headless.calibrate"), ours("nodes.bridge.save")
    model = demo.model(False)
    inputs = bridge.Inputs(bridge.encode(demo.clip(), list(PROMPTS), ""), EMPTY)
    settings = bridge.Settings("fast", "svdquant_w4a4", 16, 0, 2, 3.0, 1)
    save.diffusion_model(bridge.calibrate(model, inputs, settings, out / "kept")[0], str(node), None, None)
    theirs, subject_of = bridge.subject_of(model, inputs, settings), headless.subject_of
    headless.subject_of = lambda *given: replace(
        subject_of(*given), module=theirs.module, sample=theirs.sample, place=lambda name: name
    )
    run("quantize", shipped.MODEL, "--preset", "fast", "--rank", 16, "--samples", 2, "--levels", 2,
        "--cfg", 3, "--seed", 1, "--prompts", prompts)  # fmt: skip


def train() -> None:
    bridge, headless = ours("nodes.bridge.training"), ours("headless.base")
    pictures = out / "pictures"
    pictures.mkdir()
    for line in (shipped.PICTURES / "captions.jsonl").read_text().splitlines()[:4]:
        shutil.copy(shipped.PICTURES / json.loads(line)["file_name"], pictures)
        (pictures / json.loads(line)["file_name"]).with_suffix(".txt").write_text(json.loads(line)["text"])
    row = bridge.Lora(updates=3, batch=2, rank=4, rate=1e-3, side=128, seed=5)
    with handed_to(bridge.lora, "run") as calls:
        bridge.train((demo.model(True, 16), demo.clip(), demo.vae()), pictures, row, node)
    base, samples = calls[0][:2]
    headless.base_of, headless.samples = lambda _pipe: base, lambda *_: samples
    with train_model.placed(seen[0], True):
        run("train", pictures, "--steps", 3, "--batch", 2, "--rank", 4, "--seed", 5)


def distill() -> None:
    bridge, headless = ours("nodes.bridge.distill"), ours("headless.base")
    row = bridge.Distill(updates=3, batch=2, rank=4, rate=1e-3, steps=2, pairs=2, teacher_steps=2, seed=5)
    inputs = bridge.Inputs(bridge.encode(demo.clip(), list(PROMPTS), ""), EMPTY)
    with handed_to(bridge.core, "run") as calls:
        bridge.distill((demo.model(True, 16), demo.model(False)), inputs, row, node)
    bases, prompts_seen = calls[0][:2]
    given = iter(bases)
    headless.base_of, headless.prompts = lambda _pipe: next(given), lambda *_: prompts_seen
    with learning():
        run("distill", "--updates", 3, "--batch", 2, "--rank", 4, "--steps", 2, "--pairs", 2, "--teacher-steps", 2,
            "--seed", 5, "--prompts", prompts)  # fmt: skip


def refine() -> None:
    bridge, headless, save = ours("nodes.bridge.refine"), ours("headless.base"), ours("nodes.bridge.save")
    load, tools = ours("nodes.bridge.load"), ours("checkpoints.save")
    plain, source = out / "plain.safetensors", out / "base.safetensors"
    assert cli.main(["quantize", str(shipped.MODEL), "--out", str(plain), "--rank", "16"]) == 0
    with safe_open(plain, framework="pt") as f:
        tools.save(source, load_file(plain), {**f.metadata(), "modelspec.title": "mine"})
    row = bridge.Refine(updates=3, batch=2, stops=2, seed=5)
    inputs = bridge.Inputs(bridge.calibrate.encode(demo.clip(), list(PROMPTS), ""), EMPTY)
    with handed_to(bridge.core, "ask") as asked, handed_to(bridge.core, "run") as calls:
        refined = bridge.refine((load.diffusion_model(str(source)), demo.model(False)), inputs, row)[0]
    save.diffusion_model(refined, str(node), None, None)
    given, learned = iter([asked[0][0], calls[0][0]]), ours("training.distill").Prompts(*calls[0][1], asked[0][2])
    headless.base_of, headless.prompts = lambda _pipe: next(given), lambda *_: learned
    with learning():
        run("refine", "--quantized", source, "--updates", 3, "--batch", 2, "--stops", 2, "--seed", 5)


@contextmanager
def handed_to(module, name: str):
    """What a function is called with inside."""
    calls, real = [], getattr(module, name)
    setattr(module, name, lambda *given: calls.append(given) or real(*given))
    yield calls
    setattr(module, name, real)


@contextmanager
def learning():
    """What a node's run has around it: its models are loaded, and can be trained."""
    mm.load_models_gpu(seen, force_full_load=True)
    with ExitStack() as stack:
        for model in seen:
            stack.enter_context(train_model.learning(model))
        yield


def run(*words) -> None:
    assert cli.main([*map(str, words), "--out", str(command)]) == 0


def read(path: Path) -> tuple[dict, dict, bytes]:
    """(metadata, tensors' places, their bytes)."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:size])
    return head.pop("__metadata__"), head, data[size:]


globals()[job]()
one, two = read(node), read(command)
records = [json.loads(m.pop("nibble", "{}")) for m in (one[0], two[0])]
print(json.dumps({
    "tensors": len(one[1]), "same places": one[1] == two[1], "same bytes": one[2] == two[2],
    "other metadata": sorted(k for k in one[0].keys() | two[0].keys() if one[0].get(k) != two[0].get(k)),
    "title": two[0].get("modelspec.title"),
    "other in the record": sorted(k for k in records[0] | records[1] if records[0].get(k) != records[1].get(k)),
}))  # fmt: skip
