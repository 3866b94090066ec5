"""A table of hostile packages, and the ways in which each is made of a sound one."""

import json
import os
import random

import onnx

from lrq_export import package as packages

MODEL, ENGINE, QUANTIZED = "model.onnx", "engine/onnxruntime/model.onnx", "quantized.safetensors"


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


def plan_and_facts(plan, **facts):
    """A plan of TensorRT-RTX, and what its build.json says of it."""
    told = {"target": "tensorrt-rtx", "version": "1.7.1.116", "plugins": False} | facts

    def edit(folder):
        put("engine/tensorrt-rtx/model.plan", plan)(folder)
        put("engine/tensorrt-rtx/build.json", json.dumps(told).encode())(folder)

    return resealed(edit)


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


def many(pattern, count, content, then=None):
    """Files that are each within what one may hold, and then one that is none."""

    def edit(folder):
        for index in range(count):
            put(pattern.format(index), content)(folder)
        if then is not None:
            put(pattern.format("z"), then)(folder)

    return resealed(edit)


EMPTY = onnx.TensorProto(data_type=1, dims=[0]).SerializeToString()
GRAPH = (b"\x2a" + varint(len(EMPTY)) + EMPTY) * 60_000  # its initializers
TENSORS = onnx.ModelProto(ir_version=10).SerializeToString() + b"\x3a" + varint(len(GRAPH)) + GRAPH
HEADER = json.dumps({f"t{index}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(27_000)})
METADATA = json.dumps({"__metadata__": {f"k{index}": "" for index in range(149_000)}})

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
    "a pipe as manifest": (
        lambda folder: ((folder / "manifest.json").unlink(), os.mkfifo(folder / "manifest.json")),
        "manifest.json: needed a plain file",
    ),
    "a zip as manifest": (put("manifest.json", ZIP), "manifest.json: not valid JSON"),
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
    "a plan from another version than its facts tell": (
        plan_and_facts(TENSORRT_RTX, version="1.6.1.120"), "an engine of version 1.7.1.116, and build.json says 1.6.1"
    ),
    "a plan from another patch": (plan_and_facts(TENSORRT_RTX, version="1.7.2.116"), "an engine of version 1.7.1.116"),
    "the beginning of a plan": (plan_and_facts(TENSORRT_RTX[:27]), "model.plan: got no engine"),
    "a plan of other sizes": (plan_and_facts(TENSORRT_RTX, engine_bytes=7), "engine_bytes: got 7"),
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
    "the options of no engine": (many("engine/{}/session.json", 60, b"{}"), "does not belong there"),
    "the facts of no engine": (many("graphs/{}/tensorrt/build.json", 60, b"{}"), "does not belong there"),
    "tensors without end": (many("graphs/{}.safetensors", 60, header(HEADER.encode())), "more tensors and metadata"),
    "a tensor of further keys": (
        resealed(put("x.safetensors", tensor_file({"x": [{}] * 1000}))), "needed dtype, shape and data_offsets alone"
    ),
    "an engine of many attributes": (
        onnx_edit(
            lambda model: model.graph.node.add(op_type="EPContext").attribute.extend(
                onnx.helper.make_attribute(f"a{index}", 1) for index in range(40_000)
            )
        ),
        "more than 32 attributes",
    ),
    "metadata without end": (many("graphs/{}.safetensors", 60, header(METADATA.encode())), "more tensors and metadata"),
    "models without end": (many("graphs/{}.onnx", 9000, b"\x3a\x00", then=b"?"), "graphs/z.onnx: not an ONNX model"),
    "models of tensors without end": (many("graphs/y{}.onnx", 9, TENSORS), "fields"),
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
