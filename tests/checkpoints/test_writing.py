"""What is written can be read again, takes no other tensor's name, is noticed to exist before the work, and comes from
a whole model.
"""

import json
import logging

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.calibration import run as runs
from comfyui_nibble.checkpoints import convert, folder, header, save
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.repack import repack
from comfyui_nibble.checkpoints.source import Source, open_source
from comfyui_nibble.families import GENERIC
from comfyui_nibble.headless import calibrate, pipeline
from comfyui_nibble.headless.cli import main
from comfyui_nibble.writing import whole
from safetensors.torch import load_file, save_file

from .conftest import flux_tensors
from .fixtures import DATA

LAYER = "double_blocks.0.img_attn.proj"


class TestNames:
    """A tensor of the source that a 4-bit layer's tensors would replace."""

    @pytest.mark.parametrize("name", ["proj_down", "proj_up", "weight_scale", "smooth_factor"])
    def test_beside_a_weight_it_is_refused(self, name, tmp_path):
        save_file(flux_tensors() | {f"{LAYER}.{name}": torch.ones(3)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=rf"x\.safetensors, layer {LAYER}: .*{name}"):
            open_source(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("name", convert.NAMES)
    def test_a_source_of_any_other_making_too(self, name, tmp_path):
        """Before the first layer is read: this source has no tensor to give."""
        shapes = {"blocks.0.attn.q.weight": (64, 64), f"blocks.0.attn.q.{name}": (3,)}
        source = Source("x", GENERIC, "", [], shapes, dict.fromkeys(shapes, "F16"), {})
        with pytest.raises(CheckpointError, match=rf"x, layer blocks\.0\.attn\.q: the tensor {name} beside its weight"):
            convert.quantize(source, tmp_path / "out.safetensors")

    def test_layers_that_stay_may_have_any(self, tmp_path):
        more = {"img_in.norm.smooth_factor": torch.ones(3), "mlp.proj_down.weight": torch.ones(4, 4)}
        save_file(flux_tensors() | more, tmp_path / "x.safetensors")
        with open_source(tmp_path / "x.safetensors") as source:
            convert.quantize(source, tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors").keys() >= more.keys()

    @pytest.mark.parametrize("name", ["weight_scale", "proj_up", "comfy_quant"])
    def test_conversion_replaces_nothing(self, name, tmp_path):
        tensors = load_file(DATA / "e_mini_qwenimage_int4.safetensors")
        layer = "transformer_blocks.0.attn.to_out.0"
        assert f"{layer}.qweight" in tensors
        renamed = {n.replace("lora_up", "proj_up"): t for n, t in tensors.items()} if name != "proj_up" else tensors
        extra = {f"{layer}.{name}": torch.ones(5, dtype=torch.uint8 if name == "comfy_quant" else torch.float32)}
        save_file({**renamed, **extra}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=rf"layer {layer}"):
            repack(tmp_path / "x.safetensors", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()


NAMINGS = {
    "transformers": ("model-0000{}-of-00002.safetensors", "model.safetensors.index.json"),
    "diffusers": ("diffusion_pytorch_model-0000{}-of-00002.safetensors",
                  "diffusion_pytorch_model.safetensors.index.json"),
    "a variant of diffusers": ("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
                               "diffusion_pytorch_model.safetensors.index.fp16.json"),
    "any stem": ("my.flux-v1-0000{}-of-00002.safetensors", "my.flux-v1.safetensors.index.json"),
    "sft": ("flux-0000{}-of-00002.sft", "flux.sft.index.json"),
    "sft with the usual index": ("flux-0000{}-of-00002.sft", "flux.safetensors.index.json"),
    "upper case": ("FLUX-0000{}-of-00002.SAFETENSORS", "FLUX.safetensors.index.json"),
}  # fmt: skip
WAYS = {
    "quantize": open_source,
    "load": load,
    "inspect": inspect,
    "files": folder.files,
    "convert": lambda path: repack(path, path.with_name("converted.safetensors")),
}


def sharded(at, naming: str, tensors: dict, count: int = 2) -> list:
    """The two shards of ``tensors`` and their index in ``at``."""
    pattern, index = NAMINGS[naming]
    names = [pattern.format(i + 1) for i in range(count)]
    where = {n: names[i % count] for i, n in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, at / file)
    (at / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [at / n for n in names]


@pytest.mark.parametrize("naming", NAMINGS)
class TestShards:
    @pytest.mark.parametrize("which", [0, 1])
    def test_one_stands_for_the_whole_model(self, naming, which, tmp_path, flux_4bit):
        float_folder, packed = tmp_path / "float", tmp_path / "packed"
        for at in (float_folder, packed):
            at.mkdir()
        one = sharded(float_folder, naming, flux_tensors())[which]
        with open_source(one) as source:
            done = convert.quantize(source, tmp_path / "out.safetensors", convert.Options(rank=16))
        assert done.source_bytes == sum(f.stat().st_size for f in folder.files(one))
        whole, again = load(flux_4bit), load(tmp_path / "out.safetensors")
        assert again.layers.keys() == whole.layers.keys() and again.dense.keys() == whole.dense.keys()
        assert load(one).dense.keys() == flux_tensors().keys() == load(float_folder).dense.keys()
        assert len(inspect(one).rows) == len(inspect(flux_4bit).rows)
        two = sharded(packed, naming, load_file(flux_4bit))[which]
        repack(two, tmp_path / "again.safetensors")
        assert load(two).layers.keys() == load(tmp_path / "again.safetensors").layers.keys() == whole.layers.keys()

    @pytest.mark.parametrize("way", WAYS)
    def test_without_its_index_it_is_refused(self, naming, way, tmp_path):
        first, _ = sharded(tmp_path, naming, flux_tensors())
        (tmp_path / NAMINGS[naming][1]).unlink()
        with pytest.raises(
            CheckpointError, match=r"^(?i:.*00001-of-00002\.s\w+): it is part 1 of 2 of a model, and .*ind"
        ):
            WAYS[way](first)

    @pytest.mark.parametrize("way", WAYS)
    def test_without_its_other_part_it_is_refused(self, naming, way, tmp_path):
        first, second = sharded(tmp_path, naming, flux_tensors())
        second.unlink()
        with pytest.raises(
            CheckpointError, match=r"^(?i:.*00002-of-00002\.s\w+): this part of the folder is not there"
        ):
            WAYS[way](first)

    @pytest.mark.parametrize("way", WAYS)
    def test_with_a_part_of_another_model_it_is_refused(self, naming, way, tmp_path):
        first, second = sharded(tmp_path, naming, flux_tensors())
        save_file({"something.else": torch.ones(3)}, second)
        with pytest.raises(CheckpointError, match=r"says that it holds .*, and it does not"):
            WAYS[way](first)
        save_file(flux_tensors(), second)
        with pytest.raises(CheckpointError, match=r"00001-of-00002.* holds this tensor too"):
            WAYS[way](first)


def test_shards_that_no_index_lists_and_files_that_are_only_named_like_them(tmp_path):
    first, _ = sharded(tmp_path, "transformers", flux_tensors())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json beside it does not list it"):
        open_source(first)
    for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}', "{"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
            load(first)
    alone = tmp_path / "whole-00001-of-00001.safetensors"
    save_file(flux_tensors(), alone)
    assert folder.files(alone) == [alone]


def test_a_diffusers_folder_without_one_of_its_shards_is_refused(tmp_path):
    """Its names alone would have let it pass: parts that a variant lacks are left out."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "transformer", max_shard_size="1MB")
    shards = sorted((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    with open_source(tmp_path / "transformer") as source:
        assert source.family.id == "flux" and "double_blocks.1.img_attn.qkv.weight" in source.shapes
    with open_source(shards[0]) as source:
        assert source.family.id == "flux" and "double_blocks.1.img_attn.qkv.weight" in source.shapes
    save_file({n: t.half() for n, t in model.state_dict().items()},
              tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
    with open_source(tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors") as source:
        assert source.family.id == "flux" and set(source.dtypes.values()) == {"F16"}, "the file that was asked for"
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name}: this part of the folder is not there"):
        open_source(tmp_path / "transformer")


class TestAnExistingOutput:
    """Noticed before anything else is done."""

    @pytest.fixture
    def there(self, tmp_path):
        path = tmp_path / "there.safetensors"
        path.write_text("mine")
        yield path
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("command", [["quantize"], ["quantize", "--preset", "fast"], ["convert"]])
    def test_on_the_command_line_before_the_source_is_opened(self, command, there, capsys, monkeypatch):
        monkeypatch.setattr(pipeline, "load_pipeline", lambda *_: pytest.fail("the pipeline was loaded"))
        assert main([*command, str(there.with_name("gone.safetensors")), "--out", str(there)]) == 1
        assert "there.safetensors: there is a file of this name already" in capsys.readouterr().err

    def test_in_what_nodes_and_commands_share(self, there, flux_file, monkeypatch):
        monkeypatch.setattr(Source, "get", lambda *_: pytest.fail("a tensor was read"))
        with open_source(flux_file) as source, pytest.raises(CheckpointError, match="of this name already"):
            convert.quantize(source, there)
        with pytest.raises(CheckpointError, match="of this name already"):
            repack(flux_file.with_name("gone.safetensors"), there)
        monkeypatch.setattr(runs, "plans_of", lambda *_: pytest.fail("the calibration began"))
        with open_source(demo.MODEL) as source, pytest.raises(CheckpointError, match="of this name already"):
            calibrate.run(source, None, None, there)

    def test_one_that_appears_meanwhile_is_not_overwritten(self, tmp_path, monkeypatch):
        path = tmp_path / "x.safetensors"
        monkeypatch.setattr(whole, "_give_to_disk", lambda _: path.write_text("another's"))
        with pytest.raises(whole.WriteError, match="of this name already"):
            save.save(path, {"a": torch.ones(2)}, {})
        assert path.read_text() == "another's" and list(tmp_path.iterdir()) == [path]


MUCH = header.MAX_METADATA
TENSORS = {"a.weight": torch.ones(4, 4)}


class TestMetadata:
    def test_what_just_fits_is_read_back(self, tmp_path):
        info = save.record(scheme="x")
        room = MUCH - header.metadata_size({"format": "pt", **info}) - len("note")
        save.save(tmp_path / "x.safetensors", TENSORS, {**info, "note": "n" * room})
        assert header.read(tmp_path / "x.safetensors").metadata.keys() == {"format", "note", save.RECORD}
        with pytest.raises(
            CheckpointError, match=r"y\.safetensors: its metadata would take 4\.0 MiB, most of it 'note'"
        ):
            save.save(tmp_path / "y.safetensors", TENSORS, {**info, "note": "n" * (room + 1)})
        assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]

    def test_a_workflow_that_is_too_large_is_left_out_and_the_record_stays(self, tmp_path, caplog):
        info = save.record(scheme="x") | {"workflow": "w" * MUCH, "prompt": "p" * 1000}
        with caplog.at_level(logging.WARNING):
            path = save.save(tmp_path / "x.safetensors", TENSORS, info, optional=("prompt", "workflow"))
        kept = header.read(path).metadata
        assert kept.keys() == {"format", "prompt", save.RECORD} and kept["prompt"] == info["prompt"]
        assert "x.safetensors: its metadata entry workflow (4.0 MiB) is left out" in caplog.text
        assert "prompt" not in caplog.text.replace("prompts", "")

    def test_a_source_whose_metadata_would_not_fit_is_refused_before_the_work(self, tmp_path, monkeypatch):
        """Its own 4 MiB are read; with the record they are too many."""
        save_file(flux_tensors(), tmp_path / "x.safetensors", {"modelspec.thumbnail": "x" * (MUCH - 30)})
        with open_source(tmp_path / "x.safetensors") as source:
            monkeypatch.setattr(Source, "get", lambda *_: pytest.fail("a tensor was read"))
            with pytest.raises(CheckpointError, match=r"out\.safetensors: its metadata would .*'modelspec\.thumbnail'"):
                convert.quantize(source, tmp_path / "out.safetensors")

    def test_too_many_tensors_are_refused_before_they_are_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(header, "MAX_TENSORS", 20)
        many = {f"t{i}": torch.ones(1) for i in range(21)}
        with pytest.raises(CheckpointError, match=r"x\.safetensors: it would hold 21 tensors, and 20 are the most"):
            save.save(tmp_path / "x.safetensors", many, {})
        path = save.save(tmp_path / "y.safetensors", dict(list(many.items())[:20]), {})
        assert len(header.read(path).tensors) == 20 and [f.name for f in tmp_path.iterdir()] == ["y.safetensors"]

    @pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64])
    def test_every_type_that_passes_through_is_read_back(self, dtype, tmp_path):
        value = torch.ones(7).to(dtype)
        path = save.save(tmp_path / "x.safetensors", {"a.buffer": value, **TENSORS}, {})
        assert torch.equal(load(path).dense["a.buffer"], value)
