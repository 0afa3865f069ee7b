"""ComfyUI operations whose Linear holds quantized weights that patches keep quantized; other layers are ComfyUI's own.

Extension point: ``model_options["custom_operations"]``. The loader (`load`) has put one QuantizedTensor under
``<layer>.weight`` for each layer in a format of this pack, so a module never sees files. Layers in ComfyUI's own
formats are loaded and run by ComfyUI's class, which is this one's base, until a patch changes them. Dense weights keep
the file's dtype when the compute dtype is wider (a 16-bit file on a CPU), so a loaded model takes the bytes its file
has.
"""

from __future__ import annotations

import dataclasses
import inspect

import comfy.model_management
import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...checkpoints.formats import comfy_quant, core_quant
from ...quant import core_low_rank, kernels
from .patches import dense, grown, on_the_fly, shift_of

# comfy-kitchen's suffixes of a weight's parts -> the on-disk names
ON_DISK = {"": "weight", "_scale": "weight_scale", "_zeros": "weight_zero"}
ON_DISK |= {f"_{name}": name for name in ("smooth_factor", "proj_down", "proj_up")}
NO_MEANING = "holds .+, and nothing says what its numbers mean"  # a pattern: `load` looks for it in ComfyUI's error
EMULATED = {id: f"supports_{id}_compute" for id in ("nvfp4", "mxfp8")}
EMULATED |= dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), "supports_fp8_compute")


def kernel_dtype(x: torch.Tensor) -> torch.dtype:
    """What the 4-bit kernels compute in: CUDA's take 16-bit floats only."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.float32 else x.dtype


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., K) -> (..., N) in x's dtype through the weight's own product, which wants one dtype, contiguous rows."""
    dtype = x.dtype if kernels.is_low_rank(weight._layout_cls) else kernel_dtype(x)
    if kernels.side_dtype(weight) != dtype:
        weight = kernels.cast(weight, dtype)
    y = torch.nn.functional.linear(x.to(dtype).contiguous(), weight, None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


def stored(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight under their on-disk names, without the bias."""
    layout = weight._layout_cls
    if not kernels.is_ours(weight):
        return {n.removeprefix("."): t for n, t in core_quant.write("", weight).items()}
    if layout in kernels.BUFFERED or kernels.is_low_rank(layout) or layout == kernels.AWQ_LOW_RANK_LAYOUT:
        return {n.removeprefix("."): t for n, t in comfy_quant.write("", kernels.unwrap(weight)).items()}
    out = {ON_DISK[suffix]: tensor for suffix, tensor in kernels.tensors(weight).items()}
    unsigned = getattr(weight._params, "act_unsigned", False)
    entry = comfy_quant.config(kernels.format_of(layout), unsigned, kernels.is_tiled(weight))
    return out | {"comfy_quant": comfy_quant.encode_config(entry)}


def emulated_formats(device: torch.device) -> frozenset[str]:
    """ComfyUI's formats that ``device`` has no instructions for: ComfyUI makes them dense there. Its own list where it
    has one (0.36), else the same questions that it asks.
    """
    theirs = getattr(comfy.ops, "get_disabled_quant_formats", None)
    if theirs is not None:
        return frozenset(theirs(device) if inspect.signature(theirs).parameters else theirs())
    asked = ((id, getattr(comfy.model_management, name, None)) for id, name in EMULATED.items())
    return frozenset(id for id, supports in asked if supports is not None and not supports(device))


class FourBitLinear:
    """What this pack adds to ComfyUI's mixed-precision Linear, in front of which it stands; see the file header.

    ``layout_type``, ``quant_format`` (ComfyUI's names) stay those of the file, also while a patched weight, dense or
    with a longer branch, stands in for it.
    """

    dense_shift = None  # (N,), while a dense weight stands in for an unsigned 4-bit one
    lora = None  # (down, up) beside a weight that must keep its size (dynamic VRAM); see patcher.py
    stored_bytes = 0  # of the quantized weight as it was loaded

    @property
    def is_quantized(self) -> bool:
        """Whether the file's weight is quantized."""
        return getattr(self, "layout_type", None) is not None

    def _load_from_state_dict(self, sd, prefix, local, strict, missing, unexpected, errors):
        weight = sd.get(f"{prefix}weight")
        if kernels.is_ours(weight):
            self._check_shape(weight, prefix, errors)
            self._load_ours(sd, prefix)
        else:
            self._load_theirs(sd, prefix, local, strict, missing, unexpected, errors)
        if kernels.is_quantized(self.weight):
            self.stored_bytes = kernels.nbytes(self.weight)

    def _load_theirs(self, sd, prefix, local, strict, missing, unexpected, errors):
        weight = sd.get(f"{prefix}weight")
        plain = isinstance(weight, torch.Tensor) and f"{prefix}comfy_quant" not in sd
        super()._load_from_state_dict(sd, prefix, local, strict, missing, unexpected, errors)
        if not plain:
            return
        self._check_shape(weight, prefix, errors)
        if not weight.is_floating_point():
            errors.append(f"{prefix}weight {NO_MEANING.replace('.+', str(weight.dtype))}")
        elif 2 <= weight.dtype.itemsize < self.factory_kwargs["dtype"].itemsize:  # a patch would drown in 8 bits
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
        if kernels.is_low_rank(weight._layout_cls):
            weight = self._on_this_machine(weight)
        have, want = kernels.side_dtype(weight), self.factory_kwargs["dtype"]
        if have != want and have.itemsize == want.itemsize:  # else each forward would cast them
            weight = kernels.cast(weight, want)
        self.layout_type = weight._layout_cls
        self.quant_format = kernels.format_of(weight._layout_cls)
        self.weight = _parameter(weight)
        self._keep_bias(sd, prefix)

    def _on_this_machine(self, weight):
        base = core_quant.BY_LAYOUT[kernels.unwrap(weight).base._layout_cls]
        params = dataclasses.replace(weight._params, emulate=base in self._disabled_formats)
        return QuantizedTensor(weight._qdata, weight._layout_cls, params)

    def _keep_bias(self, sd, prefix):
        """The file's bias in its own dtype, even where the model has none: unsigned layers need it."""
        bias = sd.pop(f"{prefix}bias", None)
        if bias is not None:
            self.bias = _parameter(bias)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        quantized = kernels.is_ours(self.weight)
        stands_in = self.is_quantized and self.weight is not None and not kernels.is_quantized(self.weight)
        if not (quantized or stands_in):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        sd = {} if destination is None else destination
        bias = self.bias if quantized else self.convert_bias(self.bias)
        if bias is not None:
            sd[f"{prefix}bias"] = bias
        parts = stored(self.weight) if quantized else {"weight": self.weight}
        sd.update({f"{prefix}{name}": t for name, t in parts.items()})
        return sd

    def whole(self, weight=None) -> QuantizedTensor:
        """The layer's quantized weight (or ``weight`` in its place) with all that its product needs: one of ComfyUI's
        formats with a branch of rank 0, one of this pack's as it is.
        """
        weight = self.weight if weight is None else weight
        if kernels.is_ours(weight):
            return weight
        full = bool(getattr(self, "_full_precision_mm_config", False))
        extras = {n: getattr(self, n, None) for n in core_quant.EXTRAS}
        extras = {n: None if t is None else t.to(weight._qdata.device) for n, t in extras.items()}
        emulate = self._full_precision_mm and not full
        return kernels.wrap(core_low_rank.beside(weight, **extras, emulate=emulate, full_precision=full))

    def forward(self, input, *args, **kwargs):
        if not self.is_quantized:
            return super().forward(input, *args, **kwargs)
        unchanged = not kernels.is_ours(self.weight) and kernels.is_quantized(self.weight)
        if unchanged and self.lora is None and not self.weight_function and not self.bias_function:
            return super().forward(input, *args, **kwargs)
        if args or kwargs:
            what = f"ComfyUI hands a 4-bit layer more than its input ({_named(args, kwargs)})"
            raise TypeError(f"{what}, which this version of Nibble does not know. Update ComfyUI-Nibble")
        comfy.ops.run_every_op()
        if not kernels.is_quantized(self.weight):
            return self._dense_forward(input)
        functions = self.weight_function
        with self._moved(input) as (weight, bias):
            if not kernels.is_quantized(weight):  # a layer of dynamic VRAM on the CPU: ComfyUI has made it dense
                weight = self.weight.to(input.device)
            if unchanged:
                weight = self.whole(weight)
            if self.lora is not None:
                weight = grown(weight, *self.lora)
            weight = on_the_fly(weight, functions)
            if kernels.is_ours(weight):
                return linear(input, weight, bias)
            return self._dense_linear(input, weight, bias)

    def _moved(self, input):
        """The context of (quantized weight, bias) on the input's device. Weight functions are left out: ComfyUI would
        dequantize for them, and then round again.
        """
        functions = self.weight_function
        if functions:
            self.weight_function = []
        try:
            return self._cast(input, kernel_dtype(input), True)
        finally:
            if functions:
                self.weight_function = functions

    def _cast(self, input, bias_dtype, quantized: bool):
        return comfy.ops.CastBiasWeightContext(
            self,
            input=None,
            dtype=self.weight.dtype,
            device=input.device,
            bias_dtype=bias_dtype,
            offloadable=True,
            compute_dtype=input.dtype,
            want_requant=quantized,
        )

    def _dense_forward(self, input):
        with self._cast(input, input.dtype, False) as (weight, bias):
            return self._dense_linear(input, weight, bias)

    def _dense_linear(self, input, weight, bias):
        """A dense matrix stands in for the quantized one; an unsigned layer's stored bias lacks its shift."""
        bias = self.convert_bias(_as(bias, input))
        return torch.nn.functional.linear(input, weight.to(input.dtype), _as(bias, input))

    def shift(self):
        return shift_of(self.weight) if kernels.is_quantized(self.weight) else self.dense_shift

    def convert_bias(self, bias, inplace=False, **kwargs):
        """The layer's true bias, from the stored one: what merges and patches work on."""
        shift = self.shift()
        if bias is None or shift is None:
            return shift if bias is None else bias
        return bias + shift.to(bias)

    def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Stores a true bias. The inverse of `convert_bias`, rounded to the stored dtype."""
        shift = self.shift()
        bias = (bias if shift is None else bias - shift.to(bias)).to(self.bias.dtype)
        if return_weight:
            return bias
        self.bias = _parameter(bias)
        return None

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The effective (N, K) matrix of a quantized weight of this layer, in its dtype; a dense one is it already."""
        return dense(self.whole(weight)).to(weight.dtype) if kernels.is_quantized(weight) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Takes a dense patched weight as it is: rounding it again would add more noise than a LoRA is."""
        if not self.is_quantized:
            return super().set_weight(weight, inplace_update, seed, return_weight, **kwargs)
        weight = weight.to(self.weight.dtype)
        if return_weight:
            return weight
        if kernels.is_quantized(self.weight):
            self.dense_shift = shift_of(self.weight)
        self.weight = _parameter(weight)
        return None

    def _apply(self, fn, recurse=True):
        if not kernels.is_ours(self.weight):
            return super()._apply(fn, recurse)
        for name, value in self._parameters.items():
            if name != "weight" and value is not None:
                setattr(self, name, _parameter(fn(value)))
        self.weight = _parameter(_rewrapped(fn(self.weight)))
        return self


def operations(compute_dtype: torch.dtype, disabled: frozenset[str] | None = None) -> type:
    """The operations class for a model that computes in ``compute_dtype``. ``disabled``: ComfyUI's formats to emulate,
    by default those that ComfyUI itself would on the device it samples on.
    """
    if disabled is None:
        disabled = emulated_formats(comfy.model_management.get_torch_device())
    base = comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype, disabled=set(disabled))
    return type("NibbleOperations", (base,), {"Linear": type("Linear", (FourBitLinear, base.Linear), {})})


def _named(args: tuple, kwargs: dict) -> str:
    return ", ".join([*(f"argument {i + 2}" for i in range(len(args))), *kwargs])


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    if tensor.is_inference() and not torch.is_inference_mode_enabled() and not isinstance(tensor, QuantizedTensor):
        tensor = tensor.clone()
    return torch.nn.Parameter(tensor, requires_grad=False)


def _rewrapped(weight: QuantizedTensor) -> QuantizedTensor:
    """A fresh wrapper: one made under inference mode cannot become a Parameter outside it, nor the other way round."""
    fresh, dtype = QuantizedTensor(weight._qdata, weight._layout_cls, weight._params), kernels.side_dtype(weight)
    return fresh if weight.dtype == dtype else kernels.cast(fresh, dtype)


def _as(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device=like.device, dtype=like.dtype)
