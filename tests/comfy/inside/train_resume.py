"""ARGS: folder of pictures, a folder to write into. The node's work with the demo model, stopped and gone on with."""

import json
import os
from pathlib import Path

from lora_common import args, codes_hash, comfy, mm, ours, torch  # first: it puts ComfyUI on the path

import folder_paths  # isort: skip
from safetensors.torch import load_file

bridge, demo = ours("nodes.bridge.training"), ours("nodes.bridge.demo")
pictures, out = Path(args[0]), Path(args[1])
folder_paths.set_output_directory(str(out))
parts = (demo.model(True, 16), demo.clip(), demo.vae())
settings = bridge.Lora(updates=6, batch=2, rank=4, rate=1e-3, side=128, seed=1, hold_out=0.25)
codes = codes_hash(parts[0])
result, previews = {}, []
comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.Latent2RGB
comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, node_id=None: previews.append(preview))


def train(name: str):
    return bridge.train(parts, pictures, settings, out / f"{name}.safetensors")


trained, report, chart = train("whole")
result["report"], result["chart"] = report, chart.size
shown = next(p for p in previews if p is not None)[1]
corner = shown.crop((540, 56, 600, 120)).convert("L").getextrema()
result["preview"], result["previewed"] = shown.size, corner[1] - corner[0]
result["codes"] = codes_hash(parts[0]) == codes and codes_hash(trained) == codes

told, tell = [], bridge.tell


def stop_at_three(node_id, text: str) -> None:
    told.append(text)
    if text.startswith("step 3 of 6"):
        mm.interrupt_current_processing()


bridge.tell = stop_at_three
try:
    train("stopped")
    result["stopped"] = False
except mm.InterruptProcessingException:
    result["stopped"] = True
bridge.tell = lambda _node, text: told.append(text)
result["left"] = sorted(p.suffix for p in out.rglob("*.safetensors") if "nibble_unfinished" in str(p))
result["file while stopped"] = (out / "stopped.safetensors").exists()
del told[:]
train("resumed")
result["first told"] = next(t for t in told if t.startswith("step"))
one, two = (load_file(out / f"{n}.safetensors") for n in ("whole", "resumed"))
result["same file"] = one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
result["nothing left"] = not (out / "nibble_unfinished").exists()
result["keys"] = sorted({k.split(".", 1)[0] for k in one}), len(one)


def refuse(part, path) -> None:
    if "unfinished" not in str(path):
        raise OSError(28, "No space left on device", str(path))
    replace(part, path)


replace, os.replace = os.replace, refuse
try:
    train("full")
except ValueError as e:
    result["no room anywhere"] = str(e)
os.replace = replace
del told[:]
result["only written"] = "6 of 6 updates were done already" in train("full")[1]
result["no steps then"] = not [t for t in told if t.startswith("step")]
unet = parts[0].model.diffusion_model
result["forwards left"] = sum("forward" in m.__dict__ for m in unet.modules())
print(json.dumps(result))
