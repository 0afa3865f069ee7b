"""ComfyUI's model patcher for models with quantized layers: every stock LoRA, hook, merge and save node works on them.

A LoRA lengthens the low-rank branch of a layer (patches.py), whose codes stay the same tensor; a layer in one of
ComfyUI's own formats gets a branch first. ComfyUI's own bookkeeping (backups, clones, uuids, partial loading) is
untouched: the unpatched weight goes into ``backup`` as always. `claim` gives an already loaded patcher its new class,
so ComfyUI's loaders build the model.

What is different from ComfyUI's own class, and why:
    patch_weight_to_device        ComfyUI would dequantize, add and quantize again
    get_key_patches               ComfyUI reads every state-dict key as an attribute; ours has keys that are none
    hook functions                ComfyUI copies into the weight in place; a longer branch has another size
    model_state_dict_for_saving   ComfyUI writes a not yet loaded layer without the patched branch
    model_size, load              ComfyUI counts the bytes of unpatched weights
    load (dynamic VRAM)           the weight must keep its size there: the LoRA stands beside it
"""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Iterator

import comfy.hooks
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import (
    LazyCastingParam,
    LowVramPatch,
    ModelPatcher,
    ModelPatcherDynamic,
    get_key_weight,
)

from ...lora.report import listed
from ...quant import kernels, machine
from . import patches as p
from .operations import FourBitLinear, stored

log = logging.getLogger(__name__)
Backup = namedtuple("Dimension", ["weight", "inplace_update"])  # what ComfyUI keeps
OTHER_MODEL = "most of its layers have another shape than this model's. Use a LoRA made for this model"
FUSED_ACTIVATION = "TensorWiseINT8Layout"  # ComfyUI multiplies by these past their layer's forward


def claim(patcher):
    """``patcher`` itself, as this pack's class when its model has quantized layers of this pack's operations. A class
    of another pack is left alone.

    (Instances are re-classed rather than made: ComfyUI's loaders and its ``clone`` choose classes by themselves.)
    """
    mine = {ModelPatcher: NibblePatcher, ModelPatcherDynamic: NibblePatcherDynamic}.get(type(patcher))
    if mine is not None and any(_is_layer(m) for m in patcher.model.modules()):
        patcher.__class__ = mine
    return patcher


def _is_layer(module) -> bool:
    """Whether ``module`` is a quantized layer, also while a dense weight stands in for it."""
    return isinstance(module, FourBitLinear) and module.is_quantized


def _layer_of(model, key: str):
    """The quantized layer whose weight ``key`` names, or None."""
    name, _, end = key.rpartition(".")
    if end != "weight":
        return None
    try:
        module = comfy.utils.get_attr(model, name)
    except AttributeError:
        return None
    return module if _is_layer(module) else None


class BiasPatch(LowVramPatch):
    """A bias patch of an unsigned layer that is not loaded: it is meant for the true bias, not for the stored one."""

    def __init__(self, patch: LowVramPatch, module):
        super().__init__(patch.key, patch.patches)
        self.module = module
        self._pin_state = getattr(patch, "_pin_state", None)

    def __call__(self, bias):
        shift = self.module.convert_bias(torch.zeros_like(bias))
        return super().__call__(bias + shift) - shift


class _FourBit:
    """What the static and the dynamic patcher share."""

    def clone(self, *args, **kwargs):
        out = claim(super().clone(*args, **kwargs))
        out.size = self.size  # ComfyUI hands over `model_size`, which counts this patcher's LoRAs
        return out

    def layers(self) -> Iterator[tuple[str, FourBitLinear]]:
        """(key of its weight, layer) of every quantized layer."""
        return ((f"{n}.weight", m) for n, m in self.model.named_modules() if _is_layer(m))

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        layer = _layer_of(self.model, key)
        if layer is None or not kernels.is_quantized(layer.weight):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        weight = layer.weight
        pending = p.live(self.patches.get(key, ()))
        if not pending and not force_cast:
            return weight
        moved = weight if device_to is None else weight.to(device=device_to)
        out = p.patched(layer.whole(moved), pending, key) if pending else moved
        if return_weight:
            return out
        if key not in self.backup:
            self.backup[key] = Backup(weight.to(device=self.offload_device), False)
        self._install(key, out)
        return None

    def _install(self, key: str, weight) -> None:
        if kernels.is_quantized(weight):
            comfy.utils.set_attr_param(self.model, key, weight)
        else:  # the layer notes the shift that a dense weight needs
            comfy.utils.get_attr(self.model, key.rpartition(".")[0]).set_weight(weight)

    def detach(self, unpatch_all=True):
        machine.free_workspaces()
        return super().detach(unpatch_all)

    def get_key_patches(self, filter_prefix=None):
        out = {}
        for key in self.model_state_dict(filter_prefix):
            try:
                weight, _, convert = get_key_weight(self.model, key)
            except AttributeError:
                continue  # a part of a quantized weight (scales, branch): it goes with its ".weight"
            if not isinstance(weight, torch.Tensor):
                continue  # what a module keeps beside its weights (an attention's settings) is nobody's to merge
            if key in self.backup:
                weight = self.backup[key].weight
            if key in self.hook_backup:
                weight = self.hook_backup[key][0]
            out[key] = [(weight, convert or _same), *self.patches.get(key, [])]
        return out

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return super().add_patches(self._checked(patches), strength_patch, strength_model)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        return super().add_hook_patches(hook, self._checked(patches), strength_patch, strength_model)

    def _checked(self, patches: dict) -> dict:
        """``patches`` without those of another shape, which are logged by name. Raises ValueError when most are, or
        when any holds NaN: ComfyUI would log each failure while it samples, and go on without it.
        """
        broken, unfit, fit, mine = [], [], {}, 0
        for target, value in patches.items():
            key, offset = (target, None) if isinstance(target, str) else target[:2]
            weight = None if isinstance(value, list) else _weight_at(self.model, key)
            if weight is None or p.fits(value, tuple(weight.shape), offset):
                fit[target] = value
                mine += weight is not None
                if weight is not None and not p.finite(value):
                    broken.append(key)
            else:
                unfit.append(key)
        if broken:
            raise ValueError(f"The LoRA holds NaN or infinity for {listed(broken)}. Train or download it again")
        if len(unfit) > mine:
            raise ValueError(f"The LoRA does not fit ({listed(unfit)}): {OTHER_MODEL}")
        if unfit:
            log.warning("LoRA patches of another shape were left out: %s", listed(unfit))
        if not fit:
            log.warning("A LoRA changed nothing: this model has none of its keys. Inspect LoRA (Nibble) says why.")
        return fit

    def model_size(self):
        """Bytes of the model as this patcher loads it, with what its LoRAs add."""
        grown = sum(kernels.nbytes(m.weight) - m.stored_bytes for _, m in self.layers())
        if self.size <= 0:
            self.size = comfy.model_management.module_size(self.model) - grown
        return self.size + sum(self.added_bytes(key, m, self.patches.get(key, ())) for key, m in self.layers())

    def added_bytes(self, key: str, layer: FourBitLinear, patches) -> int:
        """Bytes that ``patches`` add to a layer as it was loaded."""
        weight = self.backup[key].weight if key in self.backup else layer.weight
        return p.growth(weight, layer.stored_bytes, patches) if kernels.is_quantized(weight) else 0

    def model_state_dict_for_saving(self, model=None, prefix=""):
        named = (self.model if model is None else model).named_modules()
        waiting = {n: m for n, m in named if _is_layer(m) and kernels.is_quantized(m.weight) and not _loaded(m)}
        for module in waiting.values():
            module.comfy_patched_weights = True  # ComfyUI's own lazy pieces cannot hold integers, and know no branch
        try:
            out = super().model_state_dict_for_saving(model, prefix)
        finally:
            for module in waiting.values():
                module.comfy_patched_weights = False
        for name, module in waiting.items():
            self._put_patched(out, name, module, prefix)
        return out

    def _put_patched(self, out: dict, name: str, module, prefix: str) -> None:
        """Replaces the entries of a layer that is not loaded by those with its patches."""
        key = f"{prefix}{name}.weight"
        pending = p.live(self.patches.get(key, ()))
        bias = self.patch_weight_to_device(f"{prefix}{name}.bias", return_weight=True)
        for part in [part for part in out if pending and part.startswith(f"{name}.")]:
            del out[part]
        if pending and p.rank_of(pending, tuple(module.weight.shape)) is not None:
            weight = p.patched(module.whole(), pending, key)
            out.update({f"{name}.{part}": t for part, t in stored(weight).items()})
        elif pending:
            template = torch.empty(1, dtype=module.weight.dtype).expand(module._orig_shape)
            out[f"{name}.weight"] = LazyDense(self, key, template)
            bias = module.convert_bias(bias)
        if bias is not None:
            out[f"{name}.bias"] = bias

    def _patch_biases(self) -> None:
        """Bias patches of layers that are not loaded get the true bias to work on."""
        for module in filter(_is_layer, self.model.modules()):
            functions = getattr(module, "bias_function", [])
            dynamic = getattr(module, "bias_lowvram_function", None)
            if LowVramPatch not in map(type, [*functions, dynamic]) or module.shift() is None:
                continue
            module.bias_function = [BiasPatch(f, module) if type(f) is LowVramPatch else f for f in functions]
            if type(dynamic) is LowVramPatch:
                module.bias_lowvram_function = BiasPatch(dynamic, module)


class NibblePatcher(_FourBit, ModelPatcher):
    """ComfyUI's static patcher (CPU, ``--disable-dynamic-vram``, hooks) for models with quantized layers."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        before = set(self.backup)
        out = super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
        self._patch_biases()
        if not full_load:  # a whole load is counted by `model_size`
            new = ((key, m) for key, m in self.layers() if key in self.backup and key not in before)
            self.model.model_loaded_weight_memory += sum(
                self.added_bytes(key, m, self.patches.get(key, ())) for key, m in new
            )
        return out

    def partially_unload(self, *args, **kwargs):
        out = super().partially_unload(*args, **kwargs)
        self._patch_biases()
        return out

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        layer = _layer_of(self.model, key)
        if key not in combined_patches or layer is None or not kernels.is_quantized(layer.weight):
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        weight = layer.weight
        out = p.patched(layer.whole(), combined_patches[key], key, original_weights)
        del original_weights[key]
        self.hook_backup.setdefault(key, (weight, weight.device))
        self._install(key, out)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:  # shares the codes: costs the branch only
            self.cached_hook_patches.setdefault(hooks, {})[key] = (out, weight.device)
        return None

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        weight, cached = _weight_at(self.model, key), cached_weights[key][0]
        if _layer_of(self.model, key) is None:
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        self.hook_backup.setdefault(key, (weight, weight.device))
        self._install(key, cached.to(device=cached_weights[key][1]))
        return None

    def unpatch_hooks(self, whitelist_keys_set=None):
        with self.use_ejected():
            for key in list(self.hook_backup):
                weight, device = self.hook_backup[key]
                if kernels.is_quantized(weight) and (not whitelist_keys_set or key in whitelist_keys_set):
                    comfy.utils.set_attr_param(self.model, key, weight.to(device=device))
                    self.hook_backup.pop(key)
            super().unpatch_hooks(whitelist_keys_set)


class NibblePatcherDynamic(_FourBit, ModelPatcherDynamic):
    """ComfyUI's dynamic-VRAM patcher for 4-bit models.

    There a weight's place in VRAM is reserved once, at its unpatched size, and ComfyUI quantizes patched weights
    again. So after each load a LoRA's factors stand beside the layer (``Linear.lora``), and patches without such a
    form become weight functions, which the layer applies to a dense copy on every forward.
    """

    def load(self, device_to=None, *args, **kwargs):
        super().load(device_to, *args, **kwargs)
        for key, module in self.layers():
            self._stand_beside(key, module, device_to)
        self._patch_biases()

    def _stand_beside(self, key: str, module, device) -> None:
        patch, module.lora = getattr(module, "weight_lowvram_function", None), None
        module.weight_lowvram_function = None
        if patch is None or key in self.backup:  # in backup: small, and already patched in place
            return
        pending = p.live(self.patches.get(key, ()))
        fused = module.weight._layout_cls == FUSED_ACTIVATION
        low_rank = p.factors(pending, tuple(module.weight.shape)) if pending and not fused else None
        if low_rank is not None:
            dtype = kernels.side_dtype(module.whole())
            low_rank = p.padded(module.whole(), *low_rank)
            module.lora = tuple(t.to(device=device, dtype=dtype).contiguous() for t in low_rank)
            self.model.model_loaded_weight_memory += sum(t.numel() * t.element_size() for t in module.lora)
        elif pending:
            module.weight_function = [patch, *module.weight_function]

    def restore_loaded_backups(self):
        freed = super().restore_loaded_backups()
        for _, module in self.layers():
            if module.lora is not None:
                module.lora = tuple(t.to(device=self.offload_device) for t in module.lora)
        return freed


class LazyDense(LazyCastingParam):
    """A patched layer that is made dense only while the file is written: ComfyUI's way, for a shape of its own."""

    def is_contiguous(self, *args, **kwargs):
        return True

    def contiguous(self, *args, **kwargs):
        return self


def _same(weight, **kwargs):
    return weight


def _loaded(module) -> bool:
    return getattr(module, "comfy_patched_weights", False)


def _weight_at(model, key: str):
    """The tensor at ``key``, or None when no layer has it."""
    try:
        value = comfy.utils.get_attr(model, key)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None
