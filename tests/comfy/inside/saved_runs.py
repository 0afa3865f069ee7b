"""ARGS: a folder with the saved run good.json. What is listed and read where there are very many saved runs."""

import builtins
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args

sys.path.insert(0, sys.path[1])
import folder_paths
from nibble_pack.nodes import files
from nibble_pack.nodes.bridge import history, records

output = Path(args[0]) / "output"
folder = output / "nibble"
folder.mkdir(parents=True)
folder_paths.set_output_directory(str(output))
run = (Path(args[0]) / "good.json").read_text()
for i in range(1200):
    (folder / f"run_{i:05}_.json").write_text(run)
    os.utime(folder / f"run_{i:05}_.json", (i, i))
(folder / "other.json").write_text("{}")
(folder / "of.calibration.json").write_text(run)
(folder / "caf\udce9.json").write_text(run)
(folder / "folder.json").mkdir()
(folder / "gone.json").symlink_to(folder / "nowhere")
opened = []
really = builtins.open


def counted(file, *more, **how):
    opened.append(str(file))
    return really(file, *more, **how)


builtins.open = counted


def opens(call, *given) -> tuple:
    opened.clear()
    return call(*given), len(opened)


saved, listing = opens(records.saved)
mark, marking = opens(records.measured)
two, picking = opens(records.fingerprint, [records.NEWEST, "run_00003_.json"])
old, loading = opens(records.load, "run_00003_.json")
builtins.open = really
strange = ["caf\udce9.json", "../good.json", "/etc/passwd", "of.calibration.json", "other.json", "folder.json",
           "gone.json", "nibble/run_00003_.json", "x" * 100_000 + ".json", "a\0.json", "", "run_00003_"]  # fmt: skip
said = {}
for name in strange:
    try:
        records.load(name)
    except ValueError as e:
        said[name] = str(e)
shown = history.rows()
os.chdir(output)
gone = {}
for path in (folder / "run_01199_.json", folder):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    gone[path.name] = [len(records.saved()), records.choices()[:2]]
print(json.dumps({
    "saved": [len(saved), saved[0], saved[-1]], "opens": [listing, marking, picking, loading], "label": old.label,
    "strange": [records.is_saved(n) for n in strange], "said": [said.get(n, "") for n in strange],
    "rows": len(shown), "gone": gone, "mark": len(mark), "empty": files.entries(folder, ".json"),
}))  # fmt: skip
