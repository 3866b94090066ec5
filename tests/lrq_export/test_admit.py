"""Hostile packages: a table of them, each refused with one line, quickly, in little memory, before torch is loaded."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from lrq_export import admit as admission
from lrq_export import package as packages
from lrq_export.admit import _check_file, admit
from lrq_export.engine.onnxruntime import open_session
from lrq_export.errors import InputError
from lrq_export.onnx_scan import check_model_file
from lrq_export.tensor_header import read_header

ROOT = Path(packages.__file__).parents[1]
MODEL, ENGINE, QUANTIZED = "model.onnx", "engine/onnxruntime/model.onnx", "quantized.safetensors"
MOST_SECONDS, MOST_BYTES = 5.0, 256 << 20


# --- ways to edit a package, and to hide it


def edit_manifest(folder, change, spell=packages.json_bytes):
    """Change the manifest's facts, then seal it as its author would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("manifest_sha256")
    change(manifest)
    manifest["manifest_sha256"] = packages._seal(manifest)
    (folder / "manifest.json").write_bytes(spell(manifest))


def resealed(edit):
    """An edit whose author computed all hashes anew."""

    def whole(folder):
        edit(folder)
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
        facts = json.loads((folder / "manifest.json").read_text())
        own = {"format", "schema", "files", "content_sha256", "manifest_sha256"}
        packages.write_manifest(folder, {key: value for key, value in facts.items() if key not in own})

    return whole


def put(name, content):
    def edit(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return edit


def change_bytes(name, change):
    def edit(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return edit


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def link(name, target):
    def edit(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return edit


def link_folder(folder):
    outside = folder.with_name(folder.name + ".outside")
    (folder / "engine").rename(outside)
    (folder / "engine").symlink_to(outside)


def mode(name, bits):
    return lambda folder: (folder / name).chmod(bits)


def manifest(**changes):
    return lambda folder: edit_manifest(folder, lambda facts: facts.update(changes))


def listed(name, **facts):
    """An entry of the manifest that no file stands for."""
    entry = {"sha256": "0" * 64, "bytes": 3} | facts
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def sized(name, size):
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["files"][name].update(bytes=size))


def nothing_stored(folder):
    """A terabyte that takes no disk, and hours to read."""
    with open(folder / "model.onnx.data", "wb") as file:
        file.truncate(1 << 40)
    listed("model.onnx.data", bytes=1 << 40)(folder)


def config(**changes):
    return lambda folder: edit_manifest(folder, lambda facts: facts["source"]["config"].update(changes))


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


def tensor_file(entry):
    return header(json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode(), bytes(4))


def onnx_edit(change, name=MODEL):
    def edit(folder):
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())

    return resealed(edit)


def first_weight(**fields):
    """The model with one weight's fields replaced; lists of pairs become external data."""

    def change(model):
        tensor = next(each for each in model.graph.initializer if len(each.raw_data) > 64)
        for key, value in fields.items():
            if key == "external":
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for name, text in value:
                    tensor.external_data.add(key=name, value=text)
            elif isinstance(value, list):
                del getattr(tensor, key)[:]
                getattr(tensor, key).extend(value)
            else:
                setattr(tensor, key, value)

    return onnx_edit(change)


def external(location, *more):
    return first_weight(external=[("location", location), *more])


def bomb():
    tensor = onnx.helper.make_tensor("bomb", onnx.TensorProto.FLOAT, [1], [1.0])
    tensor.dims[0] = 1 << 50
    return tensor


def in_node_of(graph):
    graph.node.append(onnx.helper.make_node("Constant", [], ["bomb"], value=bomb()))


def in_node(model):
    in_node_of(model.graph)


def in_body(model):
    tensor = onnx.helper.make_tensor("bomb", onnx.TensorProto.INT8, [4], b"1234", raw=True)
    tensor.dims[0] = 1 << 50
    model.functions[0].node.append(onnx.helper.make_node("Constant", [], ["bomb"], value=tensor))


def in_subgraph(model):
    graph = onnx.GraphProto(name="then")
    in_node_of(graph)
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=graph))


def in_subgraphs(model):
    graph = onnx.GraphProto(name="one of several")
    in_node_of(graph)
    model.graph.node.append(onnx.helper.make_node("Many", [], ["y"], branches=[graph]))


def in_tensors(model):
    model.graph.node.append(onnx.helper.make_node("Many", [], ["y"], tensors=[bomb()]))


def one_by_one(model):
    tensor = onnx.helper.make_tensor("typed", onnx.TensorProto.INT32, [5_000_000], [1] * 5_000_000)
    model.graph.initializer.append(tensor)


def sparse(model):
    sparse = model.graph.sparse_initializer.add(dims=[1 << 40])
    sparse.values.CopyFrom(onnx.helper.make_tensor("values", onnx.TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(onnx.helper.make_tensor("indices", onnx.TensorProto.INT64, [1], [5]))


def cached_engine(location, **more):
    def change(model):
        node = onnx.helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context=location, **more)
        model.graph.node.append(node)

    return onnx_edit(change, ENGINE)


def given_engine(model):
    """A node in a function that takes the engine from whoever calls it."""
    node = onnx.helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="x", embed_mode=0)
    for attribute in node.attribute:
        attribute.ref_attr_name = attribute.name
    names = [attribute.name for attribute in node.attribute]
    opset = [onnx.helper.make_opsetid("com.microsoft", 1)]
    model.functions.append(onnx.helper.make_function("other", "Runs", [], ["y"], [node], opset, names))


def type_as_bytes(model):
    """The first type of a weight: to protobuf, which knows it as a number alone, there is none."""
    return model + varint(0x3A) + varint(5) + b"\x2a\x03\x12\x01\x01"


def built(**facts):
    """What an engine says of itself; all that is not in `facts` is right."""
    told = {"target": "tensorrt", "version": "11.4.0", "plugins": False, "profiles": [], "options": {}} | facts
    return resealed(put("engine/tensorrt/build.json", json.dumps(told).encode()))


def varint(number):
    """As protobuf writes it."""
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


EVIL = onnx.GraphProto(  # what a reader that keeps the lower half of a tag merges into the model's graph
    initializer=[
        onnx.TensorProto(
            name="evil", data_type=1, dims=[1 << 38], data_location=onnx.TensorProto.EXTERNAL,
            external_data=[onnx.StringStringEntryProto(key="location", value="../../../../etc/passwd")],
        )
    ]
).SerializeToString()  # fmt: skip
ZIP = b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + random.Random(0).randbytes(5000)
NOISE = random.Random(1).randbytes(50_000)
TENSORRT_RTX = b"vtrt" + bytes(20) + bytes([1, 7, 1, 0x74]) + bytes(100)
OPTIONS = {"providers": [], "options": {"session.model_external_initializers_file_folder_path": "/etc"}}

# name: (what is done to the package, what the message says)
HOSTILE = {
    "a flipped byte": (change_bytes(ENGINE, flip), "engine/onnxruntime/model.onnx: was edited"),
    "a flipped byte of the manifest": (change_bytes("manifest.json", flip), "manifest.json"),
    "a truncated file": (change_bytes(QUANTIZED, lambda content: content[:-1]), "quantized.safetensors: was edited"),
    "an empty file": (put(MODEL, b""), "model.onnx: was edited: got 0 bytes"),
    "a missing file": (lambda folder: (folder / "stats.safetensors").unlink(), "stats.safetensors: is missing"),
    "an added file": (put("engine/onnxruntime/run.py", b"import os"), "run.py: does not belong"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "not an lrq-export package"),
    "a folder as manifest": (
        lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()),
        "manifest.json: needed a plain file",
    ),
    "a link as manifest": (link("manifest.json", "/etc/passwd"), "manifest.json: needed a plain file"),
    # what everyone may write
    "a file that everyone may write": (mode(MODEL, 0o666), "chmod -R o-w"),
    "a folder that everyone may write": (mode("engine", 0o777), "chmod -R o-w"),
    "a package that everyone may write": (mode(".", 0o777), "chmod -R o-w"),
    "a manifest that everyone may write": (mode("manifest.json", 0o646), "chmod -R o-w"),
    # links and special files
    "a link out of the package": (link("report.html", "/etc/passwd"), "report.html: got a link"),
    "a link inside the package": (link("report.html", "report.json"), "report.html: got a link"),
    "a broken link": (link("report.html", "nowhere"), "report.html: got a link"),
    "a linked folder": (link_folder, "engine: got a link"),
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe: got a link or a device"),
    "a name of two lines": (put("a\nb", b""), r"named 'a\nb'"),
    "folders without end": (lambda folder: (folder / "/".join("d" * 40)).mkdir(parents=True), "nested more than"),
    # the manifest
    "a file above the package": (listed("../outside"), "needed one inside the package"),
    "a file below and above": (listed("graphs/../../outside"), "needed one inside the package"),
    "an absolute path": (listed("/etc/passwd"), "needed one inside the package"),
    "a drive": (listed("C:/windows"), "needed one inside the package"),
    "a second spelling": (listed("./model.onnx"), "needed one inside the package"),
    "an entry with nothing behind it": (listed("model.onnx.data"), "model.onnx.data: is missing"),
    "the manifest in itself": (listed("manifest.json"), "take for one file"),
    "a name in capitals": (resealed(put("Model.ONNX", b"x")), "take for one file"),
    "an accent in two ways": (
        resealed(lambda folder: (put("\u00e9", b"x")(folder), put("e\u0301", b"x")(folder))), "take for one file"
    ),
    "a negative size": (sized(MODEL, -1), "needed sha256 and bytes"),
    "an enormous size": (sized(MODEL, 10**30), f"needed {10**30}"),
    "a size as text": (sized(MODEL, "3"), "needed sha256 and bytes"),
    "a manifest from the future": (manifest(schema=2), "got schema 2, needed 1"),
    "a manifest whose version is a truth": (manifest(schema=True), "got schema True, needed 1"),
    "a manifest of no version": (manifest(schema="1"), "got schema '1', needed 1"),
    "another format": (manifest(format="zip"), "another format"),
    "another spelling": (
        lambda folder: edit_manifest(folder, lambda facts: None, lambda facts: json.dumps(facts).encode()), "was edited"
    ),
    "an entry twice": (
        change_bytes("manifest.json", lambda text: text.replace(b'  "schema": 1', b'  "schema": 1,\n  "schema": 1')),
        "'schema' appears twice",
    ),
    "not a number": (
        change_bytes("manifest.json", lambda text: text.replace(b'"schema": 1', b'"schema": NaN')), "got schema nan"
    ),
    "a manifest of brackets": (put("manifest.json", b"[" * 1_000_000), "manifest.json"),
    "a manifest of nested objects": (put("manifest.json", b'{"a":' * 100_000), "not valid JSON"),
    "a manifest of a million lists": (put("manifest.json", b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"), "values"),
    "as many values as are read": (manifest(source=[], more=[{"a": 1}] * 97_000), "source: got list"),
    "a manifest of spaces": (put("manifest.json", b" " * 20_000_000), "20000000 bytes, needed at most"),
    "a number of a million digits": (put("manifest.json", b'{"schema":' + b"9" * 1_000_000 + b"}"), "not valid JSON"),
    "a manifest in another encoding": (put("manifest.json", "{}".encode("utf-16")), "not valid JSON"),
    "a manifest that is a zip": (put("manifest.json", ZIP), "not valid JSON"),
    "a recipe of another tool": (manifest(recipe={"bits": 4}), "manifest.json: recipe"),
    "a recipe without end": (manifest(recipe={"weights": {"x" * 100_000: 1}}), "manifest.json: recipe"),
    "no source": (manifest(source=[]), "source: got list"),
    "a config of no class": (manifest(source={"config": {"_class_name": 3}}), "needed the config of a model"),
    "no scheduler": (lambda folder: edit_manifest(folder, lambda facts: facts.pop("scheduler")), "scheduler: needed"),
    "a config of a million layers": (config(num_layers=10**6), "num_layers: got 1000000, needed 0 to"),
    "a config of more layers than any model has": (config(num_layers=501), "num_layers: got 501, needed 0 to"),
    "a config of fewer layers than none": (config(num_layers=-1), "num_layers: got -1, needed 0 to"),
    "a config of enormous images": (config(sample_size=10**9), "sample_size: got 1000000000, needed 0 to 100000"),
    "a config of enormous patches": (config(patch_size=[1, 10**30]), "patch_size: got 1000"),
    "a source of no fingerprint": (
        lambda folder: edit_manifest(folder, lambda facts: facts["source"].pop("fingerprint")), "source: needed"
    ),
    "no layers": (manifest(layers=None), "layers: got NoneType"),
    "nothing stored": (nothing_stored, "which 0 are stored"),
    # files that are not what their name says, their hashes computed anew
    "a zip as model": (resealed(put(MODEL, ZIP)), "model.onnx: not an ONNX model"),
    "noise as model": (resealed(put(MODEL, NOISE)), "model.onnx: not an ONNX model"),
    "nothing as model": (resealed(put(ENGINE, b"")), "model.onnx: cannot be read"),
    "half a model": (resealed(change_bytes(MODEL, lambda content: content[: len(content) // 2])), "not an ONNX model"),
    "no model": (resealed(lambda folder: (folder / MODEL).unlink()), "model.onnx: is missing"),
    "an engine as model": (resealed(put(ENGINE, TENSORRT_RTX)), "not an ONNX model"),
    "noise as codes": (resealed(put(QUANTIZED, NOISE)), "not a safetensors file"),
    "a zip as codes": (resealed(put(QUANTIZED, ZIP)), "it is a pickled torch file"),
    "an engine of another target": (
        resealed(put("engine/tensorrt/model.plan", TENSORRT_RTX)), "an engine of TensorRT-RTX, needed one of TensorRT"
    ),
    "an engine of TensorRT for TensorRT-RTX": (
        resealed(put("engine/tensorrt-rtx/model.engine", b"ftrt" + bytes(200))), "got an engine of TensorRT, needed"
    ),
    "facts of another target": (built(target="tensorrt-rtx"), "got the target 'tensorrt-rtx'"),
    "an engine of no version": (built(version=None), "build.json: version: "),
    "an engine of a version without end": (built(version="9" * 5000 + ".1"), "build.json: version: "),
    "an engine whose facts are a list": (resealed(put("engine/tensorrt/build.json", b"[]")), "needed an object"),
    "an engine whose options are a list": (built(options=[1]), "build.json: options: "),
    "an engine of an unknown option": (built(options={"speed": 9}), "build.json: options.speed: "),
    "an engine of half a profile": (built(profiles=[{"samples": [1, 2]}]), "build.json: profiles.0.samples"),
    "an engine of half a layer": (built(layers=0.5), "build.json: layers: "),
    "an engine that may have plugins": (built(plugins="perhaps"), "build.json: plugins: "),
    "noise as engine": (resealed(put("engine/tensorrt/model.plan", NOISE)), "got no engine"),
    "an engine of no target": (resealed(put("engine/other/model.plan", TENSORRT_RTX)), "unknown target other"),
    "an option that names a path": (
        resealed(put("engine/onnxruntime/session.json", packages.json_bytes(OPTIONS))), "external_initializers"
    ),
    "no providers": (resealed(put("engine/onnxruntime/session.json", b"{}")), "providers: needed a list"),
    # shapes and places that tensors claim
    "an enormous shape": (first_weight(dims=[1 << 40, 1 << 20]), "its shape"),
    "a negative shape": (first_weight(dims=[-4]), "has the shape"),
    "a shape that overflows": (first_weight(dims=[1 << 62, 1 << 62, 4]), "its shape"),
    "a shape of ten thousand axes": (first_weight(dims=[2] * 10_000), "has the shape"),
    "a type from nowhere": (first_weight(data_type=99), "has the type 99"),
    "an enormous constant": (onnx_edit(in_node), "'bomb' has 1 values"),
    "an enormous constant in a body": (onnx_edit(in_body), "'bomb' has 4 bytes"),
    "an enormous constant in a graph of a node": (onnx_edit(in_subgraph), "'bomb' has 1 values"),
    "an enormous constant in one of its graphs": (onnx_edit(in_subgraphs), "'bomb' has 1 values"),
    "an enormous tensor of several": (onnx_edit(in_tensors), "'bomb' has 1 values"),
    "millions of values one by one": (onnx_edit(one_by_one), "are stored one by one"),
    "a sparse tensor": (onnx_edit(sparse), "sparse tensor"),
    "data above the package": (external("../../../../etc/passwd"), "no file of the package beside it"),
    "data at an absolute path": (external("/etc/passwd"), "no file of the package beside it"),
    "data in another folder": (external(ENGINE), "no file of the package beside it"),
    "data in memory": (external("*/_ORT_MEM_ADDR_/*", ("offset", "4096")), "no file of the package beside it"),
    "data behind the end": (external("report.json", ("offset", str(1 << 40))), "of report.json, which has"),
    "data before the start": (external("report.json", ("offset", "-8")), "lies at"),
    "data of another length": (external("report.json", ("length", "3")), "and has 3 at 0"),
    "data that was packed before": (
        external("report.json", ("length", "64"), ("prepacked_0", "x|0;64;y")), "has 'prepacked_0'"
    ),
    "data in two places": (external("report.json", ("location", "report.html")), "lies in two places"),
    "data without a place": (first_weight(external=[]), "no file of the package beside it"),
    "two graphs": (resealed(change_bytes(MODEL, lambda model: model + b"\x3a\x00")), "field 7 of a model occurs twice"),
    "a second graph that half of a tag hides": (
        resealed(change_bytes(MODEL, lambda model: model + varint(1 << 32 | 0x3A) + varint(len(EVIL)) + EVIL)),
        "has more than 32 bits",
    ),
    "a graph of four bytes": (
        resealed(change_bytes(MODEL, lambda model: model + b"\x3d" + bytes(4))), "field 7 of a model is of another kind"
    ),
    "two million nodes": (resealed(put(MODEL, b"\x3a\x84\x84\xbd\x01" + b"\x0a\x00" * 1_548_546)), "more than 500000"),
    "an engine above the package": (cached_engine("../../evil.plan", embed_mode=0), "'../../evil.plan'"),
    "an engine that a function is given": (onnx_edit(given_engine, ENGINE), "refers to another"),
    "a type written as bytes": (resealed(change_bytes(MODEL, type_as_bytes)), "field 2 of a tensor is of another kind"),
    "an engine in the model": (cached_engine("ftrt"), "holds an engine itself"),
    "a header without end": (resealed(put(QUANTIZED, b"\xff" * 7 + b"\x7f" + b"{}")), "got a header of"),
    "a tensor of exabytes": (resealed(put(QUANTIZED, tensor_file({"shape": [1 << 60]}))), "got 4 bytes, needed"),
    "hundreds of thousands of axes": (
        resealed(put(QUANTIZED, tensor_file({"shape": [2] * 290_000}))), "needed lists of sizes"
    ),
    "tensors that overlap": (
        resealed(put(QUANTIZED, header(
            b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
            bytes(6),
        ))), "needed 4",
    ),
    "a header of objects": (
        resealed(put(QUANTIZED, header(b"{" + b",".join(b'"%d":{}' % i for i in range(90_000)) + b"}"))),
        "got dtype None",
    ),
}  # fmt: skip

CHILD = """
import json, sys, time
from lrq_export.admit import _check_file, admit
from lrq_export.errors import LrqError
def peak(): # of this program alone: what getrusage says, a child has from its parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"imports": peak()}))
for path in sys.stdin.read().split("\\0"):
    began, outcome = time.process_time(), (0, "admitted")  # of this process: the tests share the machine
    try:
        admit(path)
    except LrqError as error:
        outcome = error.exit_code, str(error)
    print(json.dumps({"code": outcome[0], "line": outcome[1], "seconds": time.process_time() - began, "peak": peak()}))
print(json.dumps({"heavy": [name for name in ("torch", "onnx", "onnxruntime", "numpy") if name in sys.modules]}))
"""


@pytest.fixture(scope="module")
def judged(package, tmp_path_factory):
    """Every hostile package, and the sound one, before the same check in a process of its own."""
    import shutil

    folder = tmp_path_factory.mktemp("hostile")
    paths = {"sound": package}
    for index, (name, (edit, _)) in enumerate(HOSTILE.items()):
        paths[name] = Path(shutil.copytree(package, folder / str(index)))
        edit(paths[name])
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\0".join(map(str, paths.values())),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *verdicts, last = map(json.loads, done.stdout.splitlines())
    return first | last | {"verdicts": dict(zip(paths, verdicts, strict=True)), "paths": paths}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_package_is_refused(judged, name):
    verdict = judged["verdicts"][name]
    assert verdict["code"] == 3, verdict
    assert HOSTILE[name][1] in verdict["line"], verdict["line"]
    assert "Fix: " in verdict["line"]
    assert verdict["line"].isprintable()
    assert len(verdict["line"]) < 4500
    assert verdict["seconds"] < MOST_SECONDS


def test_the_memory_of_a_scan_does_not_grow_with_the_file(tmp_path):
    """A hundred thousand weights, 800 MB of holes."""
    path, size, count = tmp_path / "model.onnx", 8000, 100_000
    weight = b"\x08" + varint(size) + b"\x10\x03\x4a" + varint(size)  # dims, INT8, raw data
    entry = b"\x2a" + varint(len(weight) + size) + weight
    with open(path, "wb") as file:
        file.write(b"\x3a" + varint((len(entry) + size) * count))
        for _ in range(count):
            file.write(entry)
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell())
    code = (
        "import sys; from pathlib import Path; from lrq_export.onnx_scan import check_model_file\n"
        "check_model_file(Path(sys.argv[1]), ())\n"
        'print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))'
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < MOST_BYTES


def test_fields_are_counted_over_all_files(package, copy_of, monkeypatch):
    folder = copy_of(package)
    whole = sum(
        check_model_file(path, {each.name for each in path.parent.iterdir()}) for path in folder.rglob("*.onnx")
    )
    monkeypatch.setattr(admission, "MOST_OF_ALL", whole)
    admit(folder)
    monkeypatch.setattr(admission, "_admitted", set())
    monkeypatch.setattr(admission, "MOST_OF_ALL", whole - 1)
    with pytest.raises(InputError, match="fields"):
        admit(folder)


def test_a_sound_package_is_admitted(judged):
    assert judged["verdicts"]["sound"]["code"] == 0


def test_refusing_takes_little_memory_and_no_heavy_import(judged):
    peak = max(verdict["peak"] for verdict in judged["verdicts"].values())
    assert peak < MOST_BYTES, f"{peak:,} bytes, {judged['imports']:,} of them for imports"
    assert judged["heavy"] == []


COMMANDS = [
    ["verify"], ["verify", "--against", "onnxruntime"], ["inspect", "--layers"], ["sample", "-o", "x.safetensors"],
    ["report", "-o", "x.html"], ["serve"], ["serve-config", "--triton", "x"], ["bench"],
    ["build", "--target", "tensorrt"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", ["a flipped byte", "data above the package"])
def test_every_command_refuses_it_with_exit_code_3(judged, cli, command, name):
    cli(command[0], judged["paths"][name], *command[1:]).refused(3, HOSTILE[name][1])


REFUSE = """
import json, sys
from lrq_export.cli import main
for words in json.load(sys.stdin):
    sys.argv = ["lrq-export", *words]
    try:
        main()
    except SystemExit as stopped:
        print(json.dumps({"code": stopped.code, "torch": "torch" in sys.modules}))
"""


def test_commands_refuse_before_they_import_torch(judged):
    path = str(judged["paths"]["a shape that overflows"])
    asked = json.dumps([[name, path, *rest] for name, *rest in COMMANDS])
    done = subprocess.run([sys.executable, "-c", REFUSE], input=asked, cwd=ROOT, capture_output=True, text=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == [{"code": 3, "torch": False}] * len(COMMANDS)
    assert len(done.stderr.splitlines()) == len(COMMANDS)


def test_random_flips_of_every_file_are_refused(package, copy_of):
    folder, dice = copy_of(package), random.Random(5)
    for name in packages.list_files(folder):
        content = (folder / name).read_bytes()
        for _ in range(6):
            edited = bytearray(content)
            edited[dice.randrange(len(edited))] ^= 1 << dice.randrange(8)
            (folder / name).write_bytes(edited)
            with pytest.raises(InputError) as caught:
                admit(folder)
            assert Path(name).name in str(caught.value)
        (folder / name).write_bytes(content)
    admit(folder)


@pytest.mark.parametrize("name", [MODEL, ENGINE, "graphs/0-trace.onnx", QUANTIZED, "engine/onnxruntime/session.json"])
def test_random_damage_behind_right_hashes_ends_in_one_line_or_in_a_working_session(package, copy_of, name):
    folder, dice, files = copy_of(package), random.Random(6), packages.load_manifest(package)["files"]
    content = (folder / name).read_bytes()
    refused = []
    for _ in range(25):
        edited = bytearray(content)
        for _ in range(dice.choice((1, 1, 4))):  # the structure lies at both ends of a model, weights between
            edited[dice.randrange(dice.choice((len(edited), min(2000, len(edited)))))] ^= dice.randrange(1, 256)
        (folder / name).write_bytes(edited)
        try:
            _check_file(folder, name, files)
            if name.startswith("engine"):
                open_session(folder / "engine/onnxruntime")
        except InputError as error:
            refused.append(str(error))
    assert refused
    assert all(line.isprintable() for line in refused)


def test_a_package_is_hashed_again_only_when_a_file_changed(package, copy_of, monkeypatch):
    folder, hashed, digest = copy_of(package), [], packages.sha256_file
    monkeypatch.setattr(packages, "sha256_file", lambda path: hashed.append(path) or digest(path))
    admit(folder)
    once = len(hashed)
    admit(folder)
    assert once == len(hashed) > 10
    facts = (folder / MODEL).stat()
    (folder / MODEL).write_bytes(flip((folder / MODEL).read_bytes()))
    os.utime(folder / MODEL, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the time of its change cannot be set back
    with pytest.raises(InputError, match=r"model\.onnx: was edited"):
        admit(folder)


def test_a_build_leaves_nothing_that_everyone_may_write(package, tmp_path):
    mask = os.umask(0)
    try:
        (tmp_path / "out").mkdir()
        put("engine/x/file", b"x")(tmp_path / "out")
        packages.write_manifest(tmp_path / "out", {})
    finally:
        os.umask(mask)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(paths) == 5
    assert not [path for path in paths if path.stat().st_mode & 0o002]
    packages.verify_hashes(tmp_path / "out")


def test_the_header_of_a_sound_file_is_what_safetensors_reads(package):
    from safetensors import safe_open

    metadata, entries = read_header(package / QUANTIZED)
    with safe_open(package / QUANTIZED, framework="np") as file:
        assert set(file.keys()) == entries.keys()
        assert file.metadata() == metadata
        assert all(tuple(file.get_slice(name).get_shape()) == entry.shape for name, entry in entries.items())


ENTRIES = {
    "load": "import lrq_export; lrq_export.load(sys.argv[1])",
    "doctor": "from lrq_export.cli import main; sys.argv[:] = ['lrq-export', 'doctor', sys.argv[1]]; main()",
    "verify": "from lrq_export.cli import main; sys.argv[:] = ['lrq-export', 'verify', sys.argv[1]]; main()",
    "serve": "from lrq_export.cli import main; sys.argv[:] = ['lrq-export', 'serve', sys.argv[1]]; main()",
}
WHOLE_PROGRAM = """
import json, sys, time
from lrq_export.errors import LrqError
code = 0
try:
    {entry}
except LrqError as error:
    code = error.exit_code
except SystemExit as stopped:
    code = stopped.code
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"code": code, "peak": peak, "seconds": time.process_time(), "torch": "torch" in sys.modules}}))
"""


def program(entry, package):
    """What a whole program made of a package: exit code, bytes at most, processor seconds, whether torch was there."""
    command = [sys.executable, "-c", WHOLE_PROGRAM.format(entry=ENTRIES.get(entry, entry)), str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_whole_program_refuses_within_the_bounds(judged, entry):
    """The dearest of them to refuse, by memory, and a byte that flipped: imports are counted, too."""
    dearest = max(HOSTILE, key=lambda name: judged["verdicts"][name]["peak"])  # the first after which it is no more
    for name in dict.fromkeys((dearest, "as many values as are read", "a flipped byte")):
        found = program(entry, judged["paths"][name])
        assert found["code"] == 3, name
        assert found["peak"] < MOST_BYTES, name
        assert found["seconds"] < MOST_SECONDS, name
        assert not found["torch"], name


OTHER_VERSION = """from lrq_export.engine import run_obstacle
    run_obstacle.installed_tensorrt = lambda *_: "{here}"
    import lrq_export; lrq_export.load(sys.argv[1], target="tensorrt-rtx")"""


def test_a_plan_from_another_version_is_refused_within_the_bounds(package, copy_of, reseal):
    """As its build.json tells; without a GPU one of the same version is exit code 4, which torch is asked for."""
    folder = copy_of(package)
    put("engine/tensorrt-rtx/model.plan", TENSORRT_RTX)(folder)
    facts = {"target": "tensorrt-rtx", "version": "1.6.0.5", "plugins": False}
    put("engine/tensorrt-rtx/build.json", json.dumps(facts).encode())(folder)
    reseal(folder)
    found = program(OTHER_VERSION.format(here="1.7.1.116"), folder)
    assert found["code"] == 3
    assert found["peak"] < MOST_BYTES
    assert found["seconds"] < MOST_SECONDS
    assert not found["torch"]
    same = program(OTHER_VERSION.format(here="1.6.0.5"), folder)
    assert (same["code"], same["torch"]) == (4, True)


def test_a_program_that_loads_torch_would_be_seen(judged):
    """The twin: doctor of a sound package asks torch for its version."""
    assert program("doctor", judged["paths"]["sound"])["torch"]
