"""Files written a piece at a time: the bytes of a plain route that holds everything, in a memory that does not grow
with the file, and no file at all where reading fails.
"""

import gc
import json
import warnings

import pytest
import torch
from comfyui_nibble import families
from comfyui_nibble.checkpoints import convert, folder, header, lazy, repack, save
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import comfy_quant, core_quant, nunchaku
from comfyui_nibble.checkpoints.formats.stored import StoredLayer
from comfyui_nibble.checkpoints.load import Checkpoint, load
from comfyui_nibble.checkpoints.pieces import opened
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.profiling.work import LiveBytes
from comfyui_nibble.quant import core_formats, packing, parts
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import KEEP
from comfyui_nibble.quant.svdquant import SVDQuantWeight
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import flux_tensors
from .fixtures import DATA, blocks, raw
from .test_comfy_quant import KINDS, made
from .test_fuzz import OPTIONS, models
from .test_weight_only import BNB

FLUX = DATA / "d_mini_flux_int4.safetensors"
BF16 = torch.bfloat16


def whole_conversion(path, options: repack.Options) -> dict[str, torch.Tensor]:
    """What `repack` writes, with everything in memory at once."""
    found = load(path)
    repack._check(found, path.name)
    family, prefix = families.detect(repack._shapes(found, path.name))
    plans = repack._plans(found.layers, family, prefix, options)
    out = dict(found.dense)
    for name, layer in found.layers.items():
        weight, bias = layer.weight, found.dense.get(f"{name}.bias")
        if name in plans:
            dtype = bias.dtype if bias is not None and bias.dtype in (torch.float16, BF16) else BF16
            done = quantize_weight(parts.dequantize(weight), bias, plans[name], dtype, options.seed)
            weight = done.weight
            out |= {} if done.bias is None else {f"{name}.bias": done.bias}
        tiled = (options.tiled or layer.tiled) and isinstance(weight, SVDQuantWeight)
        out |= comfy_quant.write(name, weight, tiled and packing.tiles_fit(*weight.shape))
    if path.suffix == ".gguf":
        return out
    names = [n for f in folder.files(path) for n in header.read(f).tensors]
    return out if header.names(names)[names[0]] == names[0] else {n.removeprefix("layer."): t for n, t in out.items()}


def same_file(path, tensors: dict[str, torch.Tensor], folder) -> None:
    """``path`` is, byte for byte, what the library-like writer makes of ``tensors`` and the file's own metadata."""
    with safe_open(path, "pt") as f:
        info = f.metadata()
    twin = save.save(folder / "twin.safetensors", tensors, info, overwrite=True)
    assert header.read(path).tensors == header.read(twin).tensors
    assert path.read_bytes() == twin.read_bytes()


def fp4(shared: bool) -> dict[str, torch.Tensor]:
    """The small FLUX.1 with nvfp4 layers; the two that become one may share their smoothing and their branch."""
    out = {n: t.clone() for n, t in raw(FLUX).items()}
    g = torch.Generator().manual_seed(0)
    for layer in [n.removesuffix(".qweight") for n, t in raw(FLUX).items() if n.endswith(".qweight")]:
        codes = out[f"{layer}.qweight"]
        if codes.dtype == torch.int8:
            n, k = codes.shape[0], codes.shape[1] * 2
            out[f"{layer}.wscales"] = torch.rand(k // 16, n, generator=g).to(torch.float8_e4m3fn)
            out[f"{layer}.wtscale"] = torch.rand(1, generator=g).to(BF16)
            out[f"{layer}.wcscales"] = torch.rand(n, generator=g).to(BF16)
    one, other = "single_transformer_blocks.0.qkv_proj.", "single_transformer_blocks.0.mlp_fc1."
    for name in (n for n in raw(FLUX) if n.startswith(one) and n.endswith((".smooth", ".lora_down"))):
        value = out[name].clone() if shared else out[name] + 1
        out[other + name.removeprefix(one)] = value
    return out


def contract(weight) -> dict[str, torch.Tensor]:
    """A layer of every kind in this pack's own contract, and what ComfyUI loads by itself."""
    out = {"pos": torch.arange(5.0)}
    for i, kind in enumerate(KINDS):
        out |= comfy_quant.write(f"blocks.{i}.proj", made(kind, weight))
        out[f"blocks.{i}.proj.bias"] = torch.full((128,), float(i))
    out |= comfy_quant.write("blocks.0.tiled", made("svdquant", weight), tiled=True)
    for fmt in core_formats.FORMATS:
        out |= core_quant.write(f"core.{fmt}", core_formats.quantize(weight(128, 256), fmt, BF16))
    return out


def spellings(weight) -> dict[str, torch.Tensor]:
    """What other programs write of the same contract."""
    svd = comfy_quant.write("a.one", made("svdquant", weight))
    for n in ("smooth_factor", "proj_down", "proj_up"):
        svd[f"a.one.weight_{n}"] = svd.pop(f"a.one.{n}")
    after = comfy_quant.write("a.two", made("svdquant", weight))
    config = {"format": "svdquant_w4a4", "lowrank_branch_input_basis": "post_smoothing", "act_unsigned": True}
    after["a.two.comfy_quant"] = comfy_quant.encode_config(config)
    awq = comfy_quant.write("a.three", made("awq", weight))
    awq["a.three.weight_scale"] = awq["a.three.weight_scale"][::2].contiguous()
    awq["a.three.weight_zeros"] = awq.pop("a.three.weight_zero")[::2].contiguous()
    core = core_quant.write("a.four", core_formats.quantize(weight(128, 256), "nvfp4", BF16))
    branch = {"a.four.svdq_l1": torch.ones(128, 4, dtype=BF16), "a.four.svdq_l2": torch.ones(4, 256, dtype=BF16)}
    empty = {"a.five.weight": torch.ones(8, 8), "a.five.comfy_quant": torch.empty(0, dtype=torch.uint8)}
    return svd | after | awq | core | branch | empty


def bnb_flux() -> dict[str, torch.Tensor]:
    """A FLUX.1 of diffusers in NF4, whose q, k and v become one layer; nested ones, and one with a bias."""
    source = load_file(BNB / "layers.safetensors")
    plain, nested = ({n.split(".weight")[1]: t for n, t in source.items() if n.startswith(f"blocks.0.{kind}.weight")}
                     for kind in ("nf4_320", "nf4_nested_320"))  # fmt: skip
    out = {"single_transformer_blocks.0.norm.linear.bias": torch.ones(2)}
    for stem, names, layer in (
        ("transformer_blocks.0.attn.", ("add_q_proj", "add_k_proj", "add_v_proj"), nested),
        ("single_transformer_blocks.0.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), plain),
    ):
        out |= {f"{stem}{n}.weight{end}": t.clone() for n in names for end, t in layer.items()}
    return out | {"single_transformer_blocks.0.proj_mlp.bias": torch.arange(320.0)}


def sharded(at, tensors: dict) -> None:
    """Tensors dealt out over three files, those of one layer among them."""
    at.mkdir()
    names = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    where = {n: names[i % 3] for i, n in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, at / file)
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def older(at) -> None:
    """nunchaku's folders of two files."""
    at.mkdir()
    block = {n: t for n, t in raw(FLUX).items() if "transformer_blocks." in n}
    save_file(block, at / "transformer_blocks.safetensors")
    save_file({n: t for n, t in raw(FLUX).items() if n not in block}, at / "unquantized_layers.safetensors")


def gguf_flux(path, names: dict[str, str]) -> None:
    from .test_gguf import written

    tensors = {f"{n}.weight": (codec, blocks(codec, 256, 512, seed=i)) for i, (n, codec) in enumerate(names.items())}
    written(path, tensors | {"pos": ("q4_0", blocks("q4_0", 4, 64))})


NATIVE_GGUF = {"double_blocks.0.img_attn.qkv": "q4_k", "double_blocks.0.img_mlp.0": "q8_0", "img_in": "q6_k"}
DIFFUSERS_GGUF = {
    f"transformer_blocks.0.attn.{n}": "q4_k" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
}


def from_fixture(name: str):
    return lambda _weight, _at: DATA / f"{name}.safetensors"


def from_tensors(make, info: dict | None = None):
    def write(weight, at):
        tensors = make(weight) if make in (contract, spellings) else make()
        save_file({n: t.contiguous() for n, t in tensors.items()}, at / "in.safetensors", info)
        return at / "in.safetensors"

    return write


def from_folder(write):
    def make(_weight, at):
        write(at / "model")
        return at / "model"

    return make


def from_gguf(names):
    def make(_weight, at):
        pytest.importorskip("gguf")
        gguf_flux(at / "in.gguf", names)
        return at / "in.gguf"

    return make


def old_marks():
    return {"a.weight": torch.zeros(64, 64, dtype=torch.int8), "a.weight_scale": torch.ones(64, 1)}


LISTED = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "int8_tensorwise"}}})}
SOURCES = {
    **{p.stem: from_fixture(p.stem) for p in sorted(DATA.glob("*.safetensors")) if "expected" not in p.name},
    "nunchaku lite, a folder": lambda _weight, _at: DATA / "f_lite_int4",
    "nvfp4, joined": from_tensors(lambda: fp4(shared=True)),
    "nvfp4, layers of two": from_tensors(lambda: fp4(shared=False)),
    "every layer by its own contract": from_tensors(contract),
    "other spellings of the contract": from_tensors(spellings),
    "marks in the metadata": from_tensors(old_marks, LISTED),
    "bitsandbytes": lambda _weight, _at: BNB / "layers.safetensors",
    "bitsandbytes of diffusers": from_tensors(bnb_flux),
    "gguf": from_gguf(NATIVE_GGUF),
    "gguf of diffusers": from_gguf(DIFFUSERS_GGUF),
    "shards": from_folder(lambda at: sharded(at, raw(FLUX))),
    "shards of bitsandbytes": from_folder(lambda at: sharded(at, bnb_flux())),
    "two files": from_folder(older),
}
OPTIONS_OF = {
    "as it is": repack.Options(),
    "tiled": repack.Options(tiled=True),
    "requantized": repack.Options(requantize=True, rank=16, seed=3),
}


class TestTheSameBytes:
    @pytest.mark.parametrize("options", OPTIONS_OF)
    @pytest.mark.parametrize("source", SOURCES)
    def test_converted(self, source, options, weight, tmp_path):
        path = SOURCES[source](weight, tmp_path)
        with opened(path) as model:
            outline = model.outline
        layers = load(path).layers
        assert {n: (x.weight.shape, x.form) for n, x in outline.layers.items()} == {
            n: (x.weight.shape, x.form) for n, x in layers.items()
        }
        done = repack.repack(path, tmp_path / "out.safetensors", OPTIONS_OF[options])
        if options == "requantized" and source.startswith(("gguf", "nvfp4", "bitsandbytes of", "shards of")):
            assert done.requantized
        same_file(done.path, whole_conversion(path, OPTIONS_OF[options]), tmp_path)

    @pytest.mark.parametrize("target", ["svdquant_w4a4", *core_formats.FORMATS])
    @pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
    def test_quantized(self, target, dtype, tmp_path):
        path = tmp_path / "in.safetensors"
        tensors = {f"model.diffusion_model.{n}": t for n, t in flux_tensors(256, dtype).items()} | {
            "vae.x": torch.ones(3)
        }
        save_file(tensors, path)
        options = convert.Options(rank=16, seed=3, target=target)
        with open_source(path) as source:
            done = convert.quantize(source, tmp_path / "out.safetensors", options)
            side, shrink = convert.side_dtype(source)
            out = {n: t.to(side) if shrink and t.dtype == torch.float32 else t for n, t in tensors.items()}
            for row in done.layers:
                full = source.prefix + row.name
                weight, bias = tensors[f"{full}.weight"], tensors[f"{full}.bias"]
                if row.plan.scheme in core_formats.FORMATS:
                    q = core_formats.quantize(weight, row.plan.scheme, side)
                else:
                    solved = quantize_weight(weight, bias, row.plan, side, 3)
                    q, bias = solved.weight, solved.bias
                del out[f"{full}.weight"]
                out |= convert.stored_layer(full, q, side) | {f"{full}.bias": bias.to(side)}
        assert done.layers and all(row.plan.scheme != KEEP for row in done.layers)
        same_file(done.path, out, tmp_path)

    def test_whatever_is_wrong_with_a_file(self, tmp_path):
        """Hostile files: the same bytes, or a refusal by both routes; never another exception."""

        @settings(max_examples=300, **OPTIONS)
        @given(models())
        def run(data):
            path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
            path.write_bytes(data)
            out.unlink(missing_ok=True)
            for options in (repack.Options(), repack.Options(requantize=True, rank=16)):
                try:
                    want = whole_conversion(path, options)
                except CheckpointError:
                    want = None
                try:
                    repack.repack(path, out, options)
                except CheckpointError:
                    assert not out.exists()
                    continue
                assert want is not None
                same_file(out, want, tmp_path)
                out.unlink()

        run()

    def test_a_name_that_a_part_needs_is_not_replaced(self, weight):
        found = Checkpoint("x", {"a.parts.0.weight": torch.ones(3)}, {"a": StoredLayer(made("parts", weight))}, {})
        with pytest.raises(CheckpointError, match=r"layer a: the tensor a.parts.0.weight has a name that it needs"):
            repack._announced(found, {}, repack.Options())


class Peak(LiveBytes):
    """Tensors without values take nothing."""

    def _add(self, storage):
        if storage.device.type != "meta":
            super()._add(storage)


def peak(work) -> int:
    gc.collect()
    with Peak() as live:
        work()
    return live.peak


N, K, R = 256, 512, 16
ONE = N * K  # weights of a layer


def some(form: str, count: int, weight, path):
    """A file of ``count`` equal layers in ``form``."""
    blank = [f"blocks.{i}.attn.proj" for i in range(count)]
    if form == "gguf":
        gguf_flux(path.with_suffix(".gguf"), dict.fromkeys(blank, "q4_k"))
        return path.with_suffix(".gguf")
    if form == "float":
        tensors = {f"{n}.weight": weight(N, K).to(BF16) for n in blank}
    elif form == "nf4":
        state = comfy_quant.encode_config({"shape": [N, K], "blocksize": 64})
        layer = {"": torch.zeros(ONE // 2, 1, dtype=torch.uint8), ".absmax": torch.ones(ONE // 64)}
        layer |= {".quant_map": torch.linspace(-1, 1, 16), ".quant_state.bitsandbytes__nf4": state}
        tensors = {f"{n}.weight{end}": t.clone() for n in blank for end, t in layer.items()}
    else:
        q = quantize_weight(weight(N, K), None, LayerPlan(form.split()[-1], "", R), BF16).weight
        write = nunchaku.write if form.startswith("nunchaku") else comfy_quant.write
        tensors = {n: t.clone() for layer in blank for n, t in write(layer, q).items()}
    save_file(tensors, path)
    return path


@pytest.fixture
def counted(monkeypatch):
    """Big tensors come from torch's allocator, where they are seen."""
    monkeypatch.setattr(lazy, "SMALL", 2**62)


FORMS = ("svdquant_w4a4", "awq_w4a16", "nunchaku svdquant_w4a4", "nunchaku awq_w4a16", "gguf", "nf4")


class TestMemory:
    @pytest.mark.parametrize("requantize", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_converting_more_layers_takes_no_more(self, form, requantize, weight, tmp_path, counted):
        if form == "gguf":
            pytest.importorskip("gguf")
        found = []
        for count in (4, 24):
            path = some(form, count, weight, tmp_path / f"{count}.safetensors")
            out = tmp_path / f"{count}-out.safetensors"
            options = repack.Options(requantize=requantize, rank=R)
            found.append(peak(lambda: repack.repack(path, out, options)))  # noqa: B023
        assert found[1] <= 1.01 * found[0] + 24 * 400, found  # JSON and tables of all layers are held

    def test_joined_layers_are_held_one_place_at_a_time(self, tmp_path, counted):
        found = []
        for count in (2, 12):
            tensors = {n: t for n, t in raw(FLUX).items() if "single_transformer_blocks" not in n}
            for i in range(count):
                tensors |= {
                    n.replace("single_transformer_blocks.0", f"single_transformer_blocks.{i}"): t.clone()
                    for n, t in raw(FLUX).items()
                    if n.startswith("single_transformer_blocks.0")
                }
            path = tmp_path / f"{count}.safetensors"
            save_file(tensors, path)
            found.append(peak(lambda: repack.repack(path, path.with_name("out.safetensors"))))  # noqa: B023
            path.with_name("out.safetensors").unlink()
        shared = sum(tensors[f"single_transformer_blocks.0.{n}.{end}"].nbytes
                     for n in ("qkv_proj", "mlp_fc1") for end in ("smooth", "lora_down"))  # fmt: skip
        assert found[1] <= found[0] + 10 * shared + 24 * 400, (found, shared)

    @pytest.mark.parametrize("target", ["svdquant_w4a4", *core_formats.FORMATS])
    def test_quantizing_more_layers_takes_no_more(self, target, weight, tmp_path, counted):
        found = []
        for count in (4, 24):
            path = some("float", count, weight, tmp_path / f"{count}.safetensors")

            def work(path=path, out=tmp_path / f"{count}-out.safetensors"):
                with open_source(path) as source:
                    convert.quantize(source, out, convert.Options(rank=R, target=target))

            found.append(peak(work))
        assert found[1] <= 1.01 * found[0] + 24 * 400, found


class Interrupted(Exception):
    pass


def nan_scale(tensors: dict) -> dict:
    name = [n for n in tensors if n.endswith(".wscales")][-1]
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


def cut(path):
    """A progress that cuts the file short once the work has begun."""

    def update(done: int, _total: int, _name: str) -> None:
        if done == 2:
            with path.open("r+b") as f:
                f.truncate(path.stat().st_size // 8)

    return update


def interrupt(done: int, _total: int, _name: str) -> None:
    if done == 2:
        raise Interrupted


class TestNothingIsLeft:
    def check(self, work, error, match, path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with pytest.raises(error, match=match) as caught:
                work()
            assert str(path.parent) not in str(caught.value)
            del caught
            gc.collect()
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize("wrong", ["values", "cut short", "interrupted", "disk"])
    def test_of_a_conversion(self, wrong, tmp_path, monkeypatch):
        path = tmp_path / "in.safetensors"
        save_file(nan_scale(raw(FLUX)) if wrong == "values" else raw(FLUX), path)
        progress = {"cut short": cut(path), "interrupted": interrupt}.get(wrong)
        if wrong == "disk":
            progress = failing_disk(monkeypatch)
        error, match = {
            "values": (CheckpointError, r"layer \S+: wscales holds NaN or infinity"),
            "cut short": (CheckpointError, "truncated"),
            "interrupted": (Interrupted, None),
            "disk": (CheckpointError, r"it cannot be read \(gone\)"),
        }[wrong]
        self.check(lambda: repack.repack(path, tmp_path / "out.safetensors", None, progress), error, match, path)

    @pytest.mark.parametrize("wrong", ["values", "cut short", "interrupted", "disk"])
    def test_of_quantizing(self, wrong, tmp_path, monkeypatch):
        path, tensors = tmp_path / "in.safetensors", flux_tensors(256)
        if wrong == "values":
            tensors["single_blocks.0.linear1.weight"][5, 5] = torch.inf
        save_file(tensors, path)
        progress = {"cut short": cut(path), "interrupted": interrupt}.get(wrong)
        if wrong == "disk":
            progress = failing_disk(monkeypatch)
        error, match = {
            "values": (CheckpointError, r"layer single_blocks.0.linear1: the weight holds NaN or infinity"),
            "cut short": (CheckpointError, "truncated"),
            "interrupted": (Interrupted, None),
            "disk": (CheckpointError, r"it cannot be read \(gone\)"),
        }[wrong]

        def work():
            with open_source(path) as source:
                convert.quantize(source, tmp_path / "out.safetensors", convert.Options(rank=16), progress)

        self.check(work, error, match, path)

    def test_of_a_gguf_file_that_is_cut_short(self, tmp_path):
        pytest.importorskip("gguf")
        path = tmp_path / "in.gguf"
        gguf_flux(path, {f"blocks.{i}.attn.proj": "q4_k" for i in range(6)})
        self.check(
            lambda: repack.repack(path, tmp_path / "out.safetensors", None, cut(path)), CheckpointError, "ends", path
        )


def failing_disk(monkeypatch):
    """A progress after which nothing can be read."""

    class Lost:
        def seek(self, _at):
            raise OSError(5, "gone")

    def update(done: int, _total: int, _name: str) -> None:
        if done == 2:
            read = lazy.LazyTensors.__getitem__

            def get(self, name):
                if name in self._places:
                    _, *rest = self._places[name]
                    self._places[name] = (Lost(), *rest)
                return read(self, name)

            monkeypatch.setattr(lazy.LazyTensors, "__getitem__", get)

    return update


class TestOpenFiles:
    def test_two_uses_of_one_source(self, flux_file, tmp_path):
        """One inside the other, and one after the other."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            source = open_source(flux_file)
            with source:
                files = list(source._tensors._files)
                with source:
                    first = source.get("img_in.weight")
                assert torch.equal(source.get("img_in.weight"), first) and files == source._tensors._files
            assert all(f.closed for f in files)
            with source:
                convert.quantize(source, tmp_path / "out.safetensors", convert.Options(rank=16))
                files = list(source._tensors._files)
            assert all(f.closed for f in files)
            del source
            gc.collect()

    def test_a_folder_that_cannot_be_opened_whole(self, flux_file, tmp_path):
        head = header.read(flux_file)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with pytest.raises(CheckpointError, match="two files of the folder hold this tensor"):
                lazy.LazyTensors([(flux_file, head), (flux_file, head)])
            gc.collect()

    def test_after_a_piece_that_is_not_asked_for(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with opened(FLUX) as model:
                next(iter(model))
            gc.collect()
