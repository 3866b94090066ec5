import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lrq_export.checkpoint import (
    Checkpoint,
    TensorFile,
    check_finite,
    check_tensors,
    is_plain_relative,
    open_checkpoint,
)
from lrq_export.errors import InputError

NAME = "diffusion_pytorch_model.safetensors"
TENSORS = {
    "blocks.0.weight": torch.arange(12, dtype=torch.float16).reshape(3, 4),
    "blocks.0.bias": torch.linspace(-1, 1, 3, dtype=torch.bfloat16),
    "scale": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def _folder(path, tensors=None, config=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel", **(config or {})}))
    save_file(TENSORS if tensors is None else tensors, path / NAME)
    return path


def _sharded(path):
    path = _folder(path)
    (path / NAME).unlink()
    shards = {"a.safetensors": ["blocks.0.weight", "scale"], "b.safetensors": ["blocks.0.bias", "empty"]}
    for shard, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, path / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (path / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def _reindex(path, **changes):
    index = path / f"{NAME}.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"].update(changes)
    index.write_text(json.dumps(tree))


def _refused(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert caught.value.hint
    for part in parts:
        assert part in message
    return message


def _raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _assert_reads(checkpoint: Checkpoint):
    assert checkpoint.class_name == "PixArtTransformer2DModel"
    assert checkpoint.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype == checkpoint.read(name).dtype
        assert torch.equal(checkpoint.read(name), tensor)


def test_a_transformer_folder_reads_back(tmp_path):
    checkpoint = open_checkpoint(_folder(tmp_path / "model"))
    _assert_reads(checkpoint)
    assert checkpoint.pipeline_path is None
    assert [path.name for path in checkpoint.files] == [NAME]


def test_a_pipeline_folder_opens_its_transformer(tmp_path):
    _folder(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    _assert_reads(checkpoint)
    assert (checkpoint.pipeline_path, checkpoint.path) == (tmp_path, tmp_path / "transformer")


def test_a_sharded_folder_reads_back(tmp_path):
    _assert_reads(open_checkpoint(_sharded(tmp_path)))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_are_found_and_full_precision_is_preferred(tmp_path, variant):
    _folder(tmp_path)
    (tmp_path / NAME).rename(tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    _assert_reads(open_checkpoint(tmp_path))
    _folder(tmp_path, {"other": torch.zeros(1)})
    assert open_checkpoint(tmp_path).names() == ["other"]


def test_the_fingerprint_follows_every_byte_and_nothing_else(tmp_path):
    one, two = _folder(tmp_path / "one"), _folder(tmp_path / "two")
    first = open_checkpoint(one).fingerprint()
    assert first == open_checkpoint(two).fingerprint()
    data = bytearray((two / NAME).read_bytes())
    data[-1] ^= 1
    (two / NAME).write_bytes(data)
    assert first != open_checkpoint(two).fingerprint()
    _folder(two, config={"a": 1})
    assert first != open_checkpoint(two).fingerprint()


def test_a_huggingface_cache_is_followed_into_its_blobs(tmp_path):
    source = _folder(tmp_path / "source")
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", NAME):
        (source / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    _assert_reads(open_checkpoint(snapshot))


def test_links_out_of_the_folder_are_refused(tmp_path):
    outside, model = _folder(tmp_path / "outside"), _folder(tmp_path / "model")
    for name in (NAME, "config.json"):
        content = (model / name).read_bytes()
        (model / name).unlink()
        (model / name).symlink_to(outside / name)
        _refused(lambda: open_checkpoint(model), name, "link", str(outside))
        (model / name).unlink()
        (model / name).write_bytes(content)
    (model / NAME).unlink()
    (model / NAME).symlink_to(model / "gone")
    _refused(lambda: open_checkpoint(model), "broken link")


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "x/a.safetensors", "..\\a", "", 3, "C:a"])
def test_an_index_entry_outside_the_folder_is_refused(tmp_path, shard):
    _sharded(tmp_path)
    _reindex(tmp_path, scale=shard)
    _refused(lambda: open_checkpoint(tmp_path), "scale", repr(shard), "same folder")


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    _sharded(tmp_path)
    _reindex(tmp_path, scale="b.safetensors")
    _refused(lambda: open_checkpoint(tmp_path), "scale", "b.safetensors", "holds it too")
    _reindex(tmp_path, scale="a.safetensors", ghost="b.safetensors")
    _refused(lambda: open_checkpoint(tmp_path), "ghost", "does not hold it")
    _reindex(tmp_path, ghost="c.safetensors")
    _refused(lambda: open_checkpoint(tmp_path), "c.safetensors: is missing")
    (tmp_path / f"{NAME}.index.json").write_text('{"weight_map": []}')
    _refused(lambda: open_checkpoint(tmp_path), "weight_map: got list")


def test_what_is_missing_is_named(tmp_path):
    _refused(lambda: open_checkpoint(tmp_path / "none"), "does not exist")
    _refused(lambda: open_checkpoint(tmp_path), "config.json: is missing")
    file = tmp_path / "model.safetensors"
    file.touch()
    _refused(lambda: open_checkpoint(file), "is a file")
    _folder(tmp_path)
    (tmp_path / NAME).rename(tmp_path / "pixart.safetensors")
    file.unlink()
    _refused(lambda: open_checkpoint(tmp_path), "got pixart.safetensors", f"rename pixart.safetensors to {NAME}")
    (tmp_path / "pixart.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    _refused(lambda: open_checkpoint(tmp_path), "pickle", "safe_serialization=True")
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    _refused(lambda: open_checkpoint(tmp_path), "got nothing else")


def test_a_pipeline_without_a_transformer_says_what_it_has(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    _refused(lambda: open_checkpoint(tmp_path), "a pipeline with unet", "transformer/")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not valid JSON"),
        ('{"_class_name": "A", "norm_eps": NaN}', "norm_eps: got nan, needed a finite number"),
        ('{"_class_name": "A", "norm_eps": 1e999}', "norm_eps: got inf, needed a finite number"),
        ("[]", "a JSON list"),
        ("{}", "_class_name: got nothing"),
        ('{"_class_name": 3}', "_class_name: got 3"),
        ('{"_class_name": "os.system"}', "'os.system'"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, text, part):
    (_folder(tmp_path) / "config.json").write_text(text)
    _refused(lambda: open_checkpoint(tmp_path), "config.json", part)


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1, -10])
def test_a_truncated_file_says_got_and_needed_bytes(tmp_path, keep):
    whole = (_folder(tmp_path) / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:keep])
    size = len(whole[:keep])
    message = _refused(lambda: open_checkpoint(tmp_path), NAME, f"got {size} bytes, needed")
    assert keep >= 0 or str(len(whole)) in message


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\xff" * 99, "pickled torch file"),
        (b"<!doctype html><html>", "web page"),
        (b"\xff" * 1000, "fetch the file again"),
    ],
)
def test_a_file_of_another_kind_says_what_it_is(tmp_path, content, hint):
    (_folder(tmp_path) / NAME).write_bytes(content)
    _refused(lambda: open_checkpoint(tmp_path), NAME, "not a safetensors file", hint)


def _one(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "data", "part"),
    [
        (b"{nonsense", b"", "header: not valid JSON"),
        (b"\xff\xff\xff", b"", "header: not valid JSON"),
        (b'{"a":1,"a":2}', b"", "appears twice"),
        (b"[1]", b"", "needed an object"),
        (_one(dtype="F4"), b"1234", "got dtype 'F4'"),
        (_one(dtype=["F32"]), b"1234", "got dtype ['F32']"),
        (_one(shape=[-1]), b"1234", "needed lists of sizes"),
        (_one(shape=[True]), b"1234", "needed lists of sizes"),
        (_one(shape=[2**70]), b"1234", "needed lists of sizes"),
        (_one(shape=None), b"1234", "needed lists of sizes"),
        (_one(offsets=[0]), b"1234", "needed lists of sizes"),
        (_one(shape=[2]), b"1234", "got 4 bytes, needed 8 for F32"),
        (_one(offsets=[4, 0]), b"1234", "got -4 bytes, needed 4"),
        (_one(offsets=[4, 8]), b"12345678", "offset 4, needed 0"),
        (_one(), b"123", "truncated"),
        (_one(), b"12345", "got 1 bytes after the last tensor"),
        ({"a": 3}, b"", "got dtype None"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header, data, part):
    _refused(lambda: TensorFile(_raw(tmp_path / "x.safetensors", header, data)), "x.safetensors", part)


def test_overlapping_tensors_and_long_headers_are_refused(tmp_path):
    twice = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}
    _refused(lambda: TensorFile(_raw(tmp_path / "x", twice, b"1234")), "b: got data at offset 0, needed 4")
    _refused(lambda: TensorFile(_raw(tmp_path / "x", b"{}", length=2**62)), f"header of {2**62} bytes")
    _refused(lambda: TensorFile(_raw(tmp_path / "x", b"{}", length=99)), "truncated: got 10 bytes, needed 107")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_of_a_header_gets_past_the_check_into_a_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        ours = TensorFile(path).read_all()
    except InputError:
        return
    theirs = load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)


def test_check_tensors_names_the_nearest(tmp_path):
    checkpoint = open_checkpoint(_folder(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    check_tensors(checkpoint, {name: list(shape) for name, shape in shapes.items()})
    renamed = {("blocks.0.wieght" if name == "blocks.0.weight" else name): shape for name, shape in shapes.items()}
    _refused(lambda: check_tensors(checkpoint, renamed), "blocks.0.wieght is missing (1 of 4", "is blocks.0.weight")
    fewer = {name: shape for name, shape in shapes.items() if name != "scale"}
    _refused(lambda: check_tensors(checkpoint, fewer), "scale is unknown to PixArtTransformer2DModel (1 are)")
    wrong = {**shapes, "blocks.0.weight": (4, 3)}
    _refused(lambda: check_tensors(checkpoint, wrong), "blocks.0.weight: got shape (3, 4), needed (4, 3)")


def test_an_unknown_tensor_names_the_nearest(tmp_path):
    _refused(lambda: open_checkpoint(_folder(tmp_path)).read("blocks.0.bais"), "nearest name is blocks.0.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_check_finite_says_how_many_and_where(dtype):
    tensor = torch.zeros(2, 3)
    tensor[1, 2], tensor[1, 0] = float("nan"), float("inf")
    check_finite("w", torch.zeros(2, 3).to(dtype))
    _refused(lambda: check_finite("w", tensor.to(dtype)), "w: got 2 NaN or Inf among 6 values, the first Inf at [1, 0]")
    check_finite("codes", torch.ones(3, dtype=torch.int8))


@pytest.mark.parametrize(
    ("name", "plain"), [("a", True), ("a/b", True), ("../a", False), ("/a", False), ("a/..", False), ("a\0", False)]
)
def test_is_plain_relative(name, plain):
    assert is_plain_relative(name) == plain
