"""Adapters that PEFT itself trained and saved, against PEFT's own merge: alpha, patterns, rsLoRA, DoRA, LoHa, LoKr."""

import json

import peft
import pytest
import torch
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.peft import configs, parse
from comfyui_nibble.lora.read import read_file


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = torch.nn.ModuleDict({n: torch.nn.Linear(32, 48) for n in ("to_q", "to_k")})
        self.proj = torch.nn.Linear(96, 32)

    def forward(self, x):
        return self.proj(torch.cat([m(x) for m in self.attn.values()], -1))


TARGETS = ["to_q", "to_k", "proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, rank_pattern={"to_q": 2}, alpha_pattern={"attn.to_q": 3, "proj": 1}
    ),
    "rslora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, use_rslora=True),
    "bias": peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, lora_bias=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, use_dora=True),
    "loha": peft.LoHaConfig(r=4, alpha=2, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, alpha=2, target_modules=TARGETS),
}


def adapter(config, folder):
    """(module merged by PEFT, folder it was saved to): random factors, so that every part counts."""
    model = peft.get_peft_model(Block(), config)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=g)
            p.data = p.data * (1 + 0.1 * noise) if "magnitude" in name else 0.3 * noise
    model.save_pretrained(folder)
    return model.merge_and_unload(), folder


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_folder(name, tmp_path, sqnr):
    merged, folder = adapter(CONFIGS[name], tmp_path)
    ours, plain = Block(), Block()
    report = apply(ours, read_file(folder), 1.0)
    assert report.summary() == "3 applied"
    for (n, expected), got, before in zip(
        merged.state_dict().items(), ours.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        if n.endswith(".weight") or name == "bias":
            assert sqnr(expected - before, got - before) > 90, n


# What PEFT's other methods save -> what the report calls them
OTHERS = {
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["proj"]),
    "VeRA": peft.VeraConfig(target_modules=TARGETS, r=4),
    "HRA": peft.HRAConfig(target_modules=TARGETS, r=4),
    "FourierFT": peft.FourierFTConfig(target_modules=TARGETS, n_frequency=8),
    "PEFT's OFT": peft.OFTConfig(target_modules=TARGETS, oft_block_size=8, r=0),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "RandLoRA": peft.RandLoraConfig(target_modules=TARGETS, r=4),
    "LN Tuning": peft.LNTuningConfig(target_modules=TARGETS),
    "Poly": peft.PolyConfig(target_modules=TARGETS, r=4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_are_named(name, tmp_path):
    peft.get_peft_model(Block(), OTHERS[name]).save_pretrained(tmp_path)
    ours = Block()
    report = apply(ours, read_file(tmp_path), 1.0)
    assert set(report.status.values()) == {"unread"} and set(report.why.values()) == {name}
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), Block().parameters(), strict=True))


def test_diffusers_keeps_the_config_in_the_metadata(tmp_path, sqnr):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as mixin
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    def unet():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(32, 32), cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    model = unet()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=1, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    from diffusers.training_utils import _collate_lora_metadata

    mixin.save_lora_weights(tmp_path, unet_lora_layers=state, **_collate_lora_metadata({"unet": model}))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    ours = unet()
    report = apply(ours, read_file(path), 1.0)
    assert len(report.applied) == len(state) // 2 > 0 and not report.unknown
    model.fuse_lora()
    for name, expected in model.named_parameters():
        if name.endswith("base_layer.weight"):
            n = name.replace(".base_layer", "")
            before = unet().get_parameter(n)
            assert sqnr(expected - before, ours.get_parameter(n) - before) > 80, n


def test_patterns_are_names_and_never_expressions():
    with pytest.raises(ValueError, match=r"alpha_pattern '\(a\+\)\+b' is not a layer's name"):
        parse({"lora_alpha": 1, "alpha_pattern": {"(a+)+b": 2}}, "adapter_config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"lora_alpha": "high"}', "its alpha and rank are not numbers"),
        ('{"lora_alpha": 1, "alpha_pattern": [1]}', "its alpha and rank are not numbers"),
        ('{"lora_alpha": NaN}', "its alpha and rank are not numbers"),
        ('{"lora_alpha": 1, "alpha_pattern": {"a": -Infinity}}', "its alpha and rank are not numbers"),
        ('{"lora_alpha": 1, "r": Infinity}', "its alpha and rank are not numbers"),
        ("[" * 100_000, "is not JSON"),
        (b'{"lora_alpha": "\xff"}', "its alpha and rank are not numbers"),  # Windows-1252
        (b'{"lora_alpha": "\x00"}', "no text, it has the control character"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(text, message, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        configs(tmp_path / "adapter_model.safetensors", None)


def test_a_config_beside_another_file_is_not_its_own(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}))
    assert configs(tmp_path / "other.safetensors", None) == ()
