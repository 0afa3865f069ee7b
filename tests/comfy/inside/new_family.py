"""What the nodes know of a model of the family that tests/new_family.py adds to the pack: {what: found}."""

import json
from types import SimpleNamespace as Object

from _start import torch  # first: it puts ComfyUI where the imports below find it

torch.manual_seed(0)
import comfy.latent_formats  # noqa: E402
from nibble_pack.nodes import prompts, sampling  # noqa: E402
from nibble_pack.nodes.bridge import estimate  # noqa: E402
from nibble_pack.nodes.bridge import sampling as few_steps  # noqa: E402
from nibble_pack.profiling.estimate import Task  # noqa: E402


class ToyModel(torch.nn.Module):
    def __init__(self, width, in_channels, dtype=None, device=None, operations=None):
        super().__init__()
        self.toy = operations.Linear(width, width, bias=False, dtype=dtype, device=device)

    def forward(self, x, t, context, transformer_options):
        assert x.shape[1] == 4
        return self.toy(context)


class ToyConfig:
    unet_config = {"width": 64, "in_channels": 4}  # noqa: RUF012 - as ComfyUI's classes have it


def options(node, name: str) -> list[str]:
    return next(i.options for i in node.define_schema().inputs if i.id == name)


module = ToyModel(64, 4, operations=torch.nn)
base = Object(diffusion_model=module, model_config=ToyConfig(), latent_format=comfy.latent_formats.SD15(),
              get_dtype_inference=lambda: torch.float32)  # fmt: skip
model = Object(model=base, get_attachment=lambda name: None, patches={})
subject = estimate.from_model(model)
known = estimate.known(subject, Task(64, 64, 3, 1, 1.0), estimate.Models("none"), estimate.CARD_DTYPE, "")
facts = few_steps.facts_of(model, [few_steps.File("toy-turbo.safetensors")])
print(json.dumps({
    "variant": few_steps.variant_of(model).id, "preset": few_steps.choose("auto", facts).preset.id,
    "family": subject.family, "flops": known.work.flops,
    "listed": ["toy_turbo" in options(sampling.NibbleFewStepPreset, "preset"),
               "toy" in options(prompts.NibbleDomainPrompt, "triggers")],
}))  # fmt: skip
