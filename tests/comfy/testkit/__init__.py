"""Nodes for the tests only: what the tiny models need and stock ComfyUI does not make."""

import json

import torch
from comfy_api.latest import ComfyExtension, io


class NibbleTestConditioning(io.ComfyNode):
    """Random text features, as no text encoder is small enough to ship."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleTestConditioning",
            category="Nibble/tests",
            inputs=[
                io.Int.Input("tokens", default=20, max=4096),
                io.Int.Input("width", default=768, max=8192),
                io.Int.Input("pooled", default=0, max=8192),
                io.Int.Input("seed", default=0, max=2**32),
            ],
            outputs=[io.Conditioning.Output("conditioning")],
        )

    @classmethod
    def execute(cls, tokens, width, pooled, seed) -> io.NodeOutput:
        g = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, width, generator=g)
        extra = {"pooled_output": torch.randn(1, pooled, generator=g)} if pooled else {}
        return io.NodeOutput([[text, extra]])


class NibbleTestModelSize(io.ComfyNode):
    """Bytes that ComfyUI counts for a MODEL, as text."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleTestModelSize",
            category="Nibble/tests",
            inputs=[io.Model.Input("model")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        import comfy.model_management

        size = comfy.model_management.module_size(model.model.diffusion_model)
        return io.NodeOutput(ui={"text": [str(size)]})


class NibbleTestHooks(io.ComfyNode):
    """How many forward hooks are left on a MODEL's modules, as text."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleTestHooks",
            category="Nibble/tests",
            inputs=[io.Model.Input("model")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None):
        return float("nan")

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.model.modules())
        return io.NodeOutput(ui={"text": [str(left)]})


class NibbleTestAny(io.ComfyNode):
    """A value that a JSON text says, of no declared type."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleTestAny",
            category="Nibble/tests",
            inputs=[io.String.Input("value")],
            outputs=[io.AnyType.Output("any")],
        )

    @classmethod
    def execute(cls, value) -> io.NodeOutput:
        return io.NodeOutput(json.loads(value))


class TestKit(ComfyExtension):
    async def get_node_list(self):
        return [NibbleTestConditioning, NibbleTestModelSize, NibbleTestHooks, NibbleTestAny]


async def comfy_entrypoint():
    return TestKit()
