"""``nibble doctor``: what this machine is, and which forms of 4-bit files it runs natively."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from .shown import say


@dataclass(frozen=True)
class Diagnosis:
    """``versions``: library -> version. ``backends``: comfy-kitchen's, each "" or why it is not there. ``forms``: id ->
    "" where it runs natively, or why not. ``advice``: what could be better.
    """

    machine: str
    versions: dict[str, str]
    backends: dict[str, str]
    forms: dict[str, str]
    advice: tuple[str, ...]

    def text(self) -> str:
        lines = [self.machine, ", ".join(f"{n} {v}" for n, v in self.versions.items()), "", "comfy-kitchen's backends"]
        lines += [f"  {name:8} {reason or 'ready'}" for name, reason in self.backends.items()]
        lines += ["", "forms of 4-bit files"]
        width = max(map(len, self.forms))
        lines += [f"  {id:{width}}  {f'not natively: {why}' if why else 'native'}" for id, why in self.forms.items()]
        return "\n".join([*lines, "", *self.advice]).rstrip()


def add_command(subparsers) -> None:
    """Adds ``doctor`` to the command line."""
    out = subparsers.add_parser("doctor", help="say what this machine is and which 4-bit files it runs natively")
    out.add_argument("--json", action="store_true", help="print JSON instead of text")
    out.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``nibble doctor``: see `add_command`."""
    found = diagnose()
    say(json.dumps(asdict(found), indent=1) if args.json else found.text())


def diagnose(here=None) -> Diagnosis:
    """The diagnosis of ``here``, a `quant.machine.Machine`; by default the one this runs on."""
    from importlib.metadata import PackageNotFoundError, version

    import comfy_kitchen

    from ..checkpoints.forms import FORMS
    from ..quant import machine

    versions = {}
    for name in ("torch", "comfy-kitchen", "diffusers", "nibble-4bit"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    here = here or machine.here()
    listed = comfy_kitchen.registry.list_backends()
    backends = {n: _why(b) for n, b in sorted(listed.items())}
    forms = {f.id: here.lacks(f.kernel) for f in FORMS.values() if f.kernel}
    return Diagnosis(here.title, versions, backends, forms, _advice(here, machine))


def _why(backend: dict) -> str:
    if backend["available"]:
        return "turned off" if backend["disabled"] else ""
    return str(backend["unavailable_reason"] or "not installed").strip().splitlines()[0]


def _advice(here, machine) -> tuple[str, ...]:
    out = []
    if here.kind == machine.NVIDIA and here.cuda[:1] < (machine.KITCHENS_CUDA,):
        out.append(f"Install a PyTorch that is built for CUDA {machine.KITCHENS_CUDA}: ComfyUI uses comfy-kitchen's "
                   "kernels, all but those of svdquant_w4a4, with it only.")  # fmt: skip
    if here.kind == machine.CPU:
        out.append("No GPU was found: every form runs by comfy-kitchen's reference, right and slow.")
    if here.missing:
        out.append(f"{here.missing}. Install it again: pip install --force-reinstall --no-deps comfy-kitchen")
    return tuple(out)
