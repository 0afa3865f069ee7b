"""What the modules compute: against the formulas written out, and against diffusers' own processors."""

import image_prompt_files as small
import pytest
import torch
import torch.nn.functional as F
from adapter_shapes import uni
from comfyui_nibble import image_prompt
from transformers.activations import GELUActivation


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_uni_controlnets_formula_written_out():
    tensors = small.randomised(uni(96, 4), 0)
    e = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    w = {k.removeprefix("global_adapter."): v.double() for k, v in tensors.items()}
    x = e.double()
    for n in (1, 2):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * w[f"norm{n}.weight"] + w[f"norm{n}.bias"]
        a, gate = (x @ w[f"ff{n}.net.0.proj.weight"].T + w[f"ff{n}.net.0.proj.bias"]).chunk(2, -1)
        x = a * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
        x = x @ w[f"ff{n}.net.2.weight"].T + w[f"ff{n}.net.2.bias"]
    got = image_prompt.read(tensors)(e)
    assert got.shape == (3, 4, 96)
    assert (got.double().flatten(1) - x).abs().max() <= 1e-6 * max(1, x.abs().max())


def test_an_mlp_is_linears_with_gelu_cut_into_normalised_tokens():
    keys = {"proj.0.weight": (24, 8), "proj.0.bias": (24,), "proj.2.weight": (20, 24), "proj.2.bias": (20,),
            "proj.4.weight": (64, 20), "proj.4.bias": (64,), "norm.weight": (16,), "norm.bias": (16,)}  # fmt: skip
    w = small.randomised(keys, 3)
    built = image_prompt.projection.projection(keys)
    built.load_state_dict(w)
    x = e = torch.randn(2, 8)
    for n in (0, 2, 4):
        x = F.linear(x, w[f"proj.{n}.weight"], w[f"proj.{n}.bias"])
        x = GELUActivation()(x) if n < 4 else x
    expected = F.layer_norm(x.reshape(2, 4, 16), (16,), w["norm.weight"], w["norm.bias"])
    assert torch.allclose(built(e), expected, atol=1e-6) and built.tokens == 4


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_our_processor_is_diffusers_own(kind):
    x, clip = small.inputs("sd15"), small.tower()
    given = small.features(clip, torch.randn(1, 3, small.SIZE, small.SIZE), kind).repeat_interleave(2, 0)
    file = small.adapter_file(small.unet("sd15"), kind, 5)
    expected = small.drawn(small.unet("sd15"), x, [file], [given])
    got = small.drawn_by_ours(small.unet("sd15"), x, file, given)
    assert (got - expected).abs().max() <= 1e-5
    plain = small.unet("sd15")(x["x"], x["t"], x["text"]).sample
    assert (got - plain).abs().max() > 0.05


def test_a_lora_is_the_full_weight_it_adds_up_to():
    """K' = (to_k + up down) c, V' alike; the LoRA of q and out as its formula says."""
    torch.manual_seed(0)
    unet, x = small.unet("sd15"), small.inputs("sd15")
    file = small.adapter_file(unet, "lora", 7)
    thin = image_prompt.read(file)
    site = image_prompt.attention.sites(unet)[3]
    attn, layer = unet.get_submodule(site.name), thin.layers[3]
    h, text, tokens = torch.randn(2, 10, site.hidden), x["text"][:2], torch.randn(2, 4, small.CONTEXT)

    def merged(name: str, base: torch.nn.Linear) -> torch.Tensor:
        part = getattr(layer, name)
        return base.weight + part.up.weight @ part.down.weight

    q, k, v = (F.linear(y, merged(n, b)) for y, n, b in (
        (h, "to_q_ip", attn.to_q), (tokens, "to_k_ip", attn.to_k), (tokens, "to_v_ip", attn.to_v)))  # fmt: skip
    image = F.linear(image_prompt.projection.attend(q, k, v, attn.heads), merged("to_out_ip", attn.to_out[0]))
    words = image_prompt.projection.attend(attn.to_q(h), attn.to_k(text), attn.to_v(text), attn.heads)
    expected = attn.to_out[0](words) + 0.5 * image
    got = image_prompt.attention.Processor(layer)(attn, h, text, ip_hidden_states=tokens, ip_weight=0.5)
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"hidden": (32, 32)}], ids=["plain", "LoRA", "MLP"])
def test_a_new_adapter_can_be_trained_and_read_back(options):
    unet, x = small.unet("sd15"), small.inputs("sd15")
    plain = unet(x["x"], x["t"], x["text"]).sample
    torch.manual_seed(0)
    adapter = image_prompt.new(unet, small.EMBED, **options)
    image_prompt.attach(unet, adapter)
    assert torch.allclose(unet(x["x"], x["t"], x["text"]).sample, plain, atol=1e-5)  # without tokens: the same
    assert all(not p.requires_grad for p in unet.parameters())
    with torch.enable_grad():
        tokens = adapter(torch.randn(4, small.EMBED))
        out = unet(x["x"], x["t"], x["text"], cross_attention_kwargs={"ip_hidden_states": tokens}).sample
        out.square().mean().backward()
    # a LoRA's `down` starts to move once its `up` is no longer zero
    still = {n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max()}
    assert all(n.endswith(".down.weight") for n in still) and bool(still) == ("rank" in options)
    again = image_prompt.read(adapter.state_dict())
    assert torch.equal(again(torch.ones(1, small.EMBED)), adapter(torch.ones(1, small.EMBED)))


def test_a_model_of_another_kind_is_refused_with_what_goes_with_what():
    adapter = image_prompt.read(small.adapter_file(small.unet("sd15"), "plain", 1))
    sentence = (
        r"this IP-Adapter is for a model of its own \(16 cross-attentions, text width 64\), "
        r"and X has 70 cross-attentions and text width 64\. Load an IP-Adapter"
    )
    with pytest.raises(ValueError, match=sentence):
        image_prompt.sites_for(small.unet("sdxl"), adapter, "X")
    with pytest.raises(ValueError, match=r"Flux has no cross-attention to text \(attn2\).*Use a UNet"):
        image_prompt.sites_for(torch.nn.Linear(2, 2), adapter, "Flux")
    with pytest.raises(ValueError, match="the model has no cross-attention"):
        image_prompt.new(torch.nn.Linear(2, 2), 8)
