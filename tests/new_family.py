"""A copy of the pack with one family more: a file, and its name in the list. What tests of new families run in."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILY = """
from .preset import Preset
from .spec import KEEP, SVDQUANT, TAGS, FamilySpec, Rule, Variant

FAMILY = FamilySpec(
    id="toy",
    title="Toy",
    marks=((r"toy\\.weight", None),),
    rules=(Rule(r"toy$", SVDQUANT, "what toys are made of"), Rule(r"", KEEP, "the rest")),
    module="ToyModel",
    inputs=lambda config: {"context": (5, config["width"])},
    variants=(
        Variant(id="toy", title="Toy", classes={"ToyConfig": {}, "ToyTransformer": {}}, style=TAGS, side=192,
                ordinary=("heun", "karras", 9, 2.0), shift=2.0, sized_like="sdxl", loras_of="sdxl"),
    ),
    presets=(
        Preset(id="toy_turbo", title="Toy Turbo", family="toy", prediction="flow", schedule="simple", steps=2,
               made_for=(2,), sampler="euler", shown=(1.0, 0.6667), names=r"toy.*turbo", source="https://example.org"),
    ),
)
"""


def grown(folder: Path) -> Path:
    """The pack's root in ``folder``: links to everything but the families, which are copied."""
    root = folder / "pack"
    (root / "families").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name != "families" and not path.name.startswith("."):
            (root / path.name).symlink_to(path)
    for path in (ROOT / "families").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py":
            text = text.replace("sdxl, z_image\n", "sdxl, toy, z_image\n").replace(
                " generic.FAMILY,\n", " toy.FAMILY, generic.FAMILY,\n"
            )
            assert text.count("toy") == 2
        (root / "families" / path.name).write_text(text, encoding="utf-8")
    (root / "families" / "toy.py").write_text(FAMILY, encoding="utf-8")
    return root
