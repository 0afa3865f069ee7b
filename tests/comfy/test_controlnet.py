"""ControlNets on 4-bit models: ComfyUI's own nodes, nothing of ours between."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_tiny_models import installed, nibble, stock, workflow  # noqa: F401


def controlled(loader: dict, name: str, strength: float) -> dict:
    """The workflow of the tiny models with a ControlNet on both conditions; its hint is half white, half black."""
    graph = workflow("sd15", loader)
    apply = dict(positive=["pos", 0], negative=["neg", 0], control_net=["net", 0], image=["hint", 0], strength=strength,
                 start_percent=0.0, end_percent=1.0)  # fmt: skip
    graph |= {
        "net": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": name}},
        "white": {"class_type": "EmptyImage", "inputs": dict(width=64, height=128, batch_size=1, color=0xFFFFFF)},
        "black": {"class_type": "EmptyImage", "inputs": dict(width=64, height=128, batch_size=1, color=0)},
        "hint": {"class_type": "ImageStitch", "inputs": dict(
            image1=["white", 0], image2=["black", 0], direction="right", match_image_size=True, spacing_width=0,
            spacing_color="white")},
        "apply": {"class_type": "ControlNetApplyAdvanced", "inputs": apply},
    }  # fmt: skip
    graph["sample"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1], "cfg": 1.0}
    return graph


@pytest.fixture
def net(server, tiny):
    path = tiny("controlnet_sd15")
    target = server.models("controlnet") / path.name
    if not target.exists():
        target.symlink_to(path)
    return path.name


def test_a_controlnet_steers_the_4_bit_model_as_the_float_one(server, installed, net):  # noqa: F811
    float_name, name = installed("sd15")

    def run(loader: dict, strength: float) -> torch.Tensor:
        return server.latent(server.done(controlled(loader, net, strength)), "save").double()

    change = [run(loader, 1.0) - run(loader, 0.0) for loader in (stock(float_name), nibble(name))]
    expected, got = (c.flatten() for c in change)
    cosine = torch.nn.functional.cosine_similarity(expected, got, dim=0).item()
    print(f"size of the change {expected.norm() / run(stock(float_name), 0.0).norm():.3f}, cosine {cosine:.4f}")
    assert expected.norm() > 0.05 * run(stock(float_name), 0.0).norm()
    assert cosine > 0.9
    graph = workflow("sd15", nibble(name))
    graph["sample"]["inputs"]["cfg"] = 1.0
    plain = server.latent(server.done(graph), "save").double()
    assert torch.equal(plain, run(nibble(name), 0.0))
