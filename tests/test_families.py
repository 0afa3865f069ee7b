"""Which model is which, and that a family is one file: added to a copy of the pack, everything that asks finds it."""

import json
import subprocess
import sys

import pytest
from comfyui_nibble import families
from comfyui_nibble.demo import parts
from comfyui_nibble.families.spec import MAX_TOKENS
from new_family import grown

SCRIPT = """
import importlib.util, json, sys
from types import SimpleNamespace as Object

root, data = sys.argv[1:]
spec = importlib.util.spec_from_file_location("grown", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["grown"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["grown"])
from grown import families
from grown.headless import draw, few_steps
from grown.prompts import expand, schema
from grown.quant.policy import plan
from grown.sampling import detect, presets, schedules

family, prefix = families.detect({"model.diffusion_model.toy.weight": (64, 64)})
plans = plan({"toy": (64, 64), "other": (64, 64)}, family.rules, 8)
domain = schema.parse(json.loads(data), "test.yaml")
pipe = Object(transformer=type("ToyTransformer", (), {"config": {}})(), components={})
facts = detect.Facts(few_steps.family(pipe), "ToyTransformer", (detect.File("my-toy-turbo.safetensors"),))
match = detect.detect(facts)
print(json.dumps({
    "detected": [family.id, prefix], "plan": {n: [p.scheme, p.reason] for n, p in plans.items()},
    "sizes": [domain.size("toy"), families.SIDES["toy"]], "loras": len(expand.loras(domain, "toy", {})),
    "called": few_steps.of_domain(pipe), "style": draw.style_of(pipe), "usual": few_steps.usual(pipe),
    "preset": match.preset.id, "visits": schedules.visits(match.preset), "page": "`toy_turbo`" in presets.page(),
}))
"""
DOMAIN = {
    "id": "test@1", "title": "Test", "description": "A test.", "example": "a cup",
    "prose": {"positive": ["A {subject}."], "negative": ["blurry"]},
    "tags": {"positive": ["{subject}"], "negative": ["lowres"]},
    "loras": [{"file": "ink.safetensors", "family": family, "link": "https://huggingface.co/a/ink"}
              for family in ("toy", "sdxl", "sd15")],
    "presets": {"toy": "toy_turbo"}, "resolution": {"sdxl": [512, 768]}, "calibration": ["a cup"],
}  # fmt: skip


def test_a_family_is_one_file(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(grown(tmp_path)), json.dumps(DOMAIN)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("visits") == [1.0, 2 / 3]
    assert found == {
        "detected": ["toy", "model.diffusion_model."],
        "plan": {"toy": ["svdquant_w4a4", "what toys are made of"], "other": ["keep", "the rest"]},
        "sizes": [[512, 768], 192], "loras": 2, "called": "toy", "style": "tags", "usual": [9, 2.0],
        "preset": "toy_turbo", "page": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "config", "id", "presets"),
    [
        (["FluxSchnell", "Flux", "BASE"], {}, "flux_schnell", "flux_schnell"),
        (["SomebodysFlux", "Flux", "BASE"], {}, "flux", "flux"),
        (["SD15"], {"context_dim": 768, "model_channels": 320}, "sd15", "sd15"),
        (["SD15"], {"context_dim": 128, "model_channels": 64}, "demo", "sd15"),
        (["UNet2DConditionModel"], parts.UNET, "demo", "sd15"),
        (["UNet2DConditionModel"], parts.UNET | {"block_out_channels": [64, 128, 192]}, "demo", "sd15"),
        (["UNet2DConditionModel"], {"cross_attention_dim": 1024}, "sd2", "sd2"),
        (["UNet2DConditionModel"], {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "sdxl", "sdxl"),
        (["FluxTransformer2DModel"], {"guidance_embeds": True}, "flux", "flux"),
        (["FluxTransformer2DModel"], {"guidance_embeds": False}, "flux_schnell", "flux_schnell"),
        (["WAN21_T2V", "BASE"], {}, None, None),
    ],
)
def test_variants_by_class_and_configuration(classes, config, id, presets):
    found = families.variant(classes, config)
    assert (found and found.id, families.presets_of(found)) == (id, presets)


def test_what_variants_name_is_there():
    for v in families.VARIANTS.values():
        for other in filter(None, (v.sized_like, v.presets_of, v.loras_of)):
            assert other in families.VARIANTS, v.id
        assert v.ordinary_preset in ("", *families.PRESETS) and v.style in MAX_TOKENS
