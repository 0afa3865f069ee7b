"""Makes `lora_files`, which makes the files, importable here and in tests/comfy."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
