"""What tests/data/prompts_golden.json holds. Needs nothing but the prompts core, so that any Python can make it.

``python tests/prompts/golden.py`` adds what is new and refuses to change what is there: a released domain never
changes. (While a version is not released yet, delete its entry first.) With ``--print`` it only prints all entries.
"""

import hashlib
import json
import sys
from pathlib import Path

from comfyui_nibble.prompts import batch, domain, expand
from comfyui_nibble.prompts.spec import STYLES

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "prompts_golden.json"
SHOWN, COUNT = 3, 1000


def entry(id: str) -> dict:
    """Hash, the first prompts of both styles in full, and a digest of a thousand prompts with all their choices."""
    d = domain.load(id)
    out = {"hash": d.hash}
    for style in STYLES:
        sampled = [p.to_json(indent=None) for p in batch.samples(d, [], COUNT, 0, style)]
        out[style] = {
            "prompts": [expand.expand(d, d.example, seed, style) for seed in range(SHOWN)],
            "largest_seed": expand.expand(d, d.example, 2**64 - 1, style),
            f"sha256_of_{COUNT}": hashlib.sha256("\n".join(sampled).encode()).hexdigest(),
        }
    return out


def read() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def main():
    entries = {id: entry(id) for id in domain.shipped()}
    if "--print" in sys.argv:
        print(json.dumps(entries))
        return
    golden = read() if GOLDEN.exists() else {}
    for id, new in entries.items():
        if golden.setdefault(id, new) != new:
            raise SystemExit(f"{id} is released and differs now; make it a new version instead")
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
