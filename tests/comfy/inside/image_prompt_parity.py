"""The nodes' own code on UNets whose weights and results came from diffusers: FILE CONFIG (JSON) ... -> differences."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, torch  # first: it puts ComfyUI where the imports below find it

torch.set_grad_enabled(False)
import comfy.clip_vision  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
from nibble_pack.image_prompt import read  # noqa: E402
from nibble_pack.nodes.bridge import image_prompt  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def difference(a, b) -> float:
    return (a - b).abs().max().item()


def other(q, k, v, extra):
    """Another pack's replacer of a cross-attention."""
    return image_prompt._attend(q, k, v, extra) * 0.5


class Case:
    """One UNet with its tower, its IP-Adapters, an input, and what diffusers made of them."""

    def __init__(self, path: str, config: dict):
        self.stored, self.config, self.fired = load_file(path), config, {}
        self.x, self.images = self.below("in."), self.stored["image"]  # (2, H, W, 3)
        self.prompts = {kind: read(self.below(f"{kind}.")) for kind in config["kinds"]}
        self.tower = comfy.clip_vision.ClipVisionModel(config["tower"])
        assert not any(self.tower.load_sd(self.below("tower.")))
        self.base = self.model()
        self.plain = self.forward(self.base)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.stored.items() if k.startswith(prefix)}

    def model(self):
        """The UNet as an ordinary MODEL, from weights in diffusers' names."""
        shape = dict(image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False,
                     use_temporal_attention=False, **self.config["unet"])  # fmt: skip
        kind = comfy.supported_models.SDXL if shape["adm_in_channels"] else comfy.supported_models.SD15
        found = kind(shape)
        found.unet_config |= {k: shape[k] for k in ("num_heads", "num_head_channels")}
        found.set_inference_dtype(torch.float32, None)
        base, names = found.get_model({}, ""), comfy.utils.unet_to_diffusers(shape)
        base.diffusion_model.load_state_dict({names[k]: v for k, v in self.below("unet.").items()}, strict=True)
        return comfy.model_patcher.ModelPatcher(base, mm.get_torch_device(), mm.unet_offload_device())

    def forward(self, model, sigma: float = 1.0, count: str = "") -> torch.Tensor:
        options = model.model_options["transformer_options"]
        options = options | {"cond_or_uncond": [1, 0], "sigmas": torch.full((4,), sigma)}
        if count:
            replaced = options["patches_replace"]["attn2"]
            options["patches_replace"] = {"attn2": {k: self.noted(count, k, fn) for k, fn in replaced.items()}}
        x, extra = self.x, {"y": self.x["y"]} if "y" in self.x else {}
        unet = model.model.diffusion_model
        return unet(x["x"], x["t"], context=x["text"], transformer_options=options, **extra)

    def noted(self, count: str, key: tuple, fn):
        def call(q, k, v, extra):
            assert (*extra["block"], extra["block_index"]) == key
            self.fired.setdefault(count, set()).add(key)
            return fn(q, k, v, extra)

        return call

    def applied(self, to, kind: str, images: int = 1, mask=None, **how):
        given = self.images[:images]
        return image_prompt.apply(to, self.prompts[kind], self.tower, given, image_prompt.How(**how), mask)

    def off(self, model, name: str) -> float:
        """How far the model's result is from diffusers' ``name``."""
        return difference(self.forward(model), self.stored[f"out.{name}"])

    def parity(self) -> dict:
        base, (one, two, *_) = self.base, self.prompts
        out = {"base": self.off(base, "none")}
        for kind in self.prompts:
            got = self.forward(self.applied(base, kind), count=kind)
            out |= {kind: difference(got, self.stored[f"out.{kind}"]), f"{kind} effect": difference(got, self.plain)}
        out["two"] = self.off(self.applied(self.applied(base, one), two), "two")
        out["two images"] = self.off(self.applied(base, one, images=2), "two images")
        out["average differs"] = self.off(self.applied(base, one, images=2, combine="average"), "two images")
        for kind in (one, "lora"):
            halves = self.applied(self.applied(base, kind, weight=0.3), kind, weight=0.7)
            out[f"{kind} 0.3 + 0.7"] = self.off(halves, kind)
        out["fired"] = {k: [len(v), sum(place[0] == "middle" for place in v)] for k, v in self.fired.items()}
        return out

    def unchanged(self) -> dict:
        """Nothing changes at weight 0 and outside start and end, bit for bit."""
        base, last = self.base, list(self.prompts)[-1]
        out = {"weight 0": all(torch.equal(self.forward(self.applied(base, k, weight=0.0)), self.plain)
                               for k in self.prompts)}  # fmt: skip
        late, at = self.applied(base, last, start=0.5, end=0.8), base.model.model_sampling.percent_to_sigma
        sigmas = {"before": at(0.2), "inside": at(0.6), "after": at(0.9)}
        out["range"] = {k: torch.equal(self.forward(late, s), self.plain) for k, s in sigmas.items()}
        return out

    def masks(self) -> dict:
        base, one = self.base, next(iter(self.prompts))
        white, black, prompted = torch.ones(1, 50, 70), torch.zeros(1, 50, 70), self.stored[f"out.{one}"]
        first = self.forward(self.applied(base, one, mask=torch.cat([white, black])))  # of the two latents of a half
        return {
            "white mask": self.off(self.applied(base, one, mask=white), one),
            "black mask": difference(self.forward(self.applied(base, one, mask=black)), self.plain),
            "mask of the batch": [difference(first[::2], prompted[::2]), difference(first[1::2], self.plain[1::2])],
        }

    def places(self) -> dict:
        """Which blocks are chosen; and a replacer that was there first, known by block without an index."""
        one, mixed = next(iter(self.prompts)), self.base.clone()

        def chosen(blocks: str) -> list:
            options = self.applied(self.base, one, blocks=blocks).model_options["transformer_options"]
            return sorted({key[:2] for key in options["patches_replace"]["attn2"]})

        for place in [("middle", 0), *((part, n) for part in ("input", "output") for n in range(12))]:
            mixed.set_model_attn2_replace(other, *place)
        before = self.forward(mixed)
        return {
            "style": chosen("style"),
            "composition": chosen("composition"),
            "after another replacer": difference(self.forward(self.applied(mixed, one, weight=1e-30)), before),
            "it counts": difference(before, self.plain),
        }


results = []
for path, config in zip(args[::2], args[1::2], strict=True):
    case = Case(path, json.loads(config))
    results.append(case.parity() | case.unchanged() | case.masks() | case.places())
json.dump(results, sys.stdout)
print()
