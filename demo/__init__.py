"""The shipped demo model: a small text-to-image latent diffusion model that draws emoji (demo/README.md).

``MODEL`` is an ordinary diffusers folder; ``LORAS`` are ordinary LoRA files in kohya key names. Importing this loads
nothing.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "model"
LORAS = {
    "style": ROOT / "loras" / "nibble_demo_flat_style.safetensors",
    "lcm": ROOT / "loras" / "nibble_demo_lcm.safetensors",
}
# 48 emoji in the flat style with captions (captions.jsonl): a folder to try training on
PICTURES = ROOT / "twemoji"
REFERENCES = {"noto": ROOT / "references" / "noto.png", "twemoji": ROOT / "references" / "twemoji.png"}
