"""ComfyUI operations whose Linear holds 4-bit weights of this pack; every other layer is ComfyUI's own.

Extension point: ``model_options["custom_operations"]``. The loader (`load`) has put one QuantizedTensor under
``<layer>.weight``, so a module never sees files. Dense weights keep the file's dtype when the compute dtype is wider
(a 16-bit file on a CPU), so a loaded model takes the bytes its file has.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...checkpoints.formats import comfy_quant
from ...quant import kernels, runtime
from .patches import dense, grown, on_the_fly, shift_of

# comfy-kitchen's suffixes of a weight's parts -> the on-disk names
ON_DISK = {"": "weight", "_scale": "weight_scale", "_zeros": "weight_zero", "_smooth_factor": "smooth_factor",
           "_proj_down": "proj_down", "_proj_up": "proj_up"}  # fmt: skip


def kernel_dtype(x: torch.Tensor) -> torch.dtype:
    """What the 4-bit kernels compute in: CUDA's take 16-bit floats only."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.float32 else x.dtype


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., K) -> (..., N) in x's dtype through the 4-bit kernels, which want one dtype and contiguous rows."""
    dtype = kernel_dtype(x)
    if weight._params.scale.dtype != dtype:
        weight = kernels.cast(weight, dtype)
    y = torch.nn.functional.linear(x.to(dtype).contiguous(), weight, None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


def stored(weight: QuantizedTensor, quant_format: str) -> dict[str, torch.Tensor]:
    """The tensors of a 4-bit weight under their on-disk names, without the bias."""
    if weight._layout_cls in runtime.OURS:
        return {n.removeprefix("."): t for n, t in comfy_quant.write("", kernels.unwrap(weight)).items()}
    out = {ON_DISK[suffix]: tensor for suffix, tensor in kernels.tensors(weight).items()}
    unsigned = getattr(weight._params, "act_unsigned", False)
    out["comfy_quant"] = comfy_quant.encode_config(comfy_quant.config(quant_format, unsigned, kernels.is_tiled(weight)))
    return out


def operations(compute_dtype: torch.dtype, disabled: frozenset[str] = frozenset()):
    """The operations class for a model that computes in ``compute_dtype``; ``disabled``: ComfyUI formats to emulate."""
    base = comfy.ops.mixed_precision_ops({"mixed_ops": True}, compute_dtype, disabled=set(disabled))

    class NibbleOperations(base):
        class Linear(base.Linear):
            dense_shift = None  # (N,), while a dense weight stands in for an unsigned 4-bit one
            lora = None  # (down, up) beside a weight that must keep its size (dynamic VRAM); see patcher.py

            def _load_from_state_dict(self, sd, prefix, local, strict, missing, unexpected, errors):
                weight = sd.get(f"{prefix}weight")
                if kernels.is_ours(weight):
                    self._check_shape(weight, prefix, errors)
                    self._load_ours(sd, prefix)
                    return
                plain = isinstance(weight, torch.Tensor) and f"{prefix}comfy_quant" not in sd
                super()._load_from_state_dict(sd, prefix, local, strict, missing, unexpected, errors)
                if plain:
                    self._check_shape(weight, prefix, errors)
                    if weight.is_floating_point() and weight.dtype.itemsize < compute_dtype.itemsize:
                        self.weight = _parameter(weight)
                        self._keep_bias(sd, prefix)

            def _check_shape(self, weight, prefix, errors):
                """ComfyUI's mixed-precision Linear takes any shape and fails while sampling."""
                got, want = tuple(weight.shape), self._orig_shape
                if got != want:
                    errors.append(f"size mismatch for {prefix}weight: got {got}, expected {want}")

            def _load_ours(self, sd, prefix):
                weight = sd.pop(f"{prefix}weight")
                sd.pop(f"{prefix}comfy_quant", None)
                self.layout_type = weight._layout_cls
                self.quant_format = kernels.OURS[weight._layout_cls]
                self.weight = _parameter(weight)
                self._keep_bias(sd, prefix)

            def _keep_bias(self, sd, prefix):
                """The file's bias in its own dtype, even where the model has none: unsigned layers need it."""
                bias = sd.pop(f"{prefix}bias", None)
                if bias is not None:
                    self.bias = _parameter(bias)

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                if not kernels.is_ours(self.weight):
                    sd = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                    bias = self.convert_bias(self.bias)
                    if bias is not None:
                        sd[f"{prefix}bias"] = bias
                    return sd
                sd = {} if destination is None else destination
                if self.bias is not None:
                    sd[f"{prefix}bias"] = self.bias
                sd.update({f"{prefix}{name}": t for name, t in stored(self.weight, self.quant_format).items()})
                return sd

            def forward(self, input, *args, **kwargs):
                if getattr(self, "layout_type", None) not in kernels.OURS:
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                if not kernels.is_ours(self.weight):
                    return self._dense_forward(input)
                functions = self.weight_function
                with self._moved(input) as (weight, bias):
                    if self.lora is not None:
                        weight = grown(weight, *self.lora)
                    weight = on_the_fly(weight, functions)
                    if kernels.is_ours(weight):
                        return linear(input, weight, bias)
                    return self._dense_linear(input, weight, bias)

            def _moved(self, input):
                """The context of (4-bit weight, bias) on the input's device. Weight functions are left out: ComfyUI
                would dequantize for them, and then round again.
                """
                functions = self.weight_function
                if functions:
                    self.weight_function = []
                try:
                    return comfy.ops.CastBiasWeightContext(
                        self, input=None, dtype=self.weight.dtype, device=input.device, bias_dtype=kernel_dtype(input),
                        offloadable=True, compute_dtype=input.dtype, want_requant=True,
                    )  # fmt: skip
                finally:
                    if functions:
                        self.weight_function = functions

            def _dense_forward(self, input):
                with comfy.ops.CastBiasWeightContext(
                    self, input=None, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype,
                    offloadable=True, compute_dtype=input.dtype, want_requant=False,
                ) as (weight, bias):  # fmt: skip
                    return self._dense_linear(input, weight, bias)

            def _dense_linear(self, input, weight, bias):
                """A dense matrix stands in for the 4-bit one; an unsigned layer's stored bias lacks its shift."""
                bias = self.convert_bias(_as(bias, input))
                return torch.nn.functional.linear(input, weight.to(input.dtype), _as(bias, input))

            def _shift(self):
                return shift_of(self.weight) if kernels.is_ours(self.weight) else self.dense_shift

            def convert_bias(self, bias, inplace=False, **kwargs):
                """The layer's true bias, from the stored one: what merges and patches work on."""
                shift = self._shift()
                if bias is None or shift is None:
                    return shift if bias is None else bias
                return bias + shift.to(bias)

            def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **kwargs):
                """Stores a true bias. The inverse of `convert_bias`, rounded to the stored dtype."""
                shift = self._shift()
                bias = (bias if shift is None else bias - shift.to(bias)).to(self.bias.dtype)
                if return_weight:
                    return bias
                self.bias = _parameter(bias)
                return None

            def convert_weight(self, weight, inplace=False, **kwargs):
                return (
                    dense(weight).to(weight.dtype)
                    if kernels.is_ours(weight)
                    else super().convert_weight(weight, inplace, **kwargs)
                )

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                """Takes a dense patched weight as it is: rounding it to 4 bits again would add more noise than a LoRA
                is.
                """
                if getattr(self, "layout_type", None) not in kernels.OURS:
                    return super().set_weight(weight, inplace_update, seed, return_weight, **kwargs)
                weight = weight.to(self.weight.dtype)
                if return_weight:
                    return weight
                if kernels.is_ours(self.weight):
                    self.dense_shift = shift_of(self.weight)
                self.weight = _parameter(weight)
                return None

            def _apply(self, fn, recurse=True):
                if not kernels.is_ours(self.weight):
                    return super()._apply(fn, recurse)
                self.weight = _parameter(_rewrapped(fn(self.weight)))
                if self.bias is not None:
                    self.bias = _parameter(fn(self.bias))
                return self

    return NibbleOperations


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    if tensor.is_inference() and not torch.is_inference_mode_enabled() and not isinstance(tensor, QuantizedTensor):
        tensor = tensor.clone()
    return torch.nn.Parameter(tensor, requires_grad=False)


def _rewrapped(weight: QuantizedTensor) -> QuantizedTensor:
    """A fresh wrapper: one made under inference mode cannot become a Parameter outside it, nor the other way round."""
    fresh = QuantizedTensor(weight._qdata, weight._layout_cls, weight._params)
    return fresh if weight.dtype == weight._params.scale.dtype else kernels.cast(fresh, weight._params.scale.dtype)


def _as(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device=like.device, dtype=like.dtype)
