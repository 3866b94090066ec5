"""Packages whose hashes are right and whose contents are not: one line and exit code 3, wherever they are read."""

import json

import onnx
import pytest
import torch

from lrq_export.package import save_tensors_atomic
from lrq_export.saved_graphs import pass_files


@pytest.fixture
def spoilt(package, copy_of, reseal):
    """A copy of the package with one edit, sealed as its author would."""

    def make(edit):
        folder = copy_of(package)
        edit(folder)
        reseal(folder)
        return folder

    return make


def reference(**changes):
    """The answers of the model, with some tensors and metadata replaced or, by None, left out."""

    def edit(folder):
        from lrq_export.checkpoint import TensorFile

        file = TensorFile(folder / "reference.safetensors")
        held = {name: tensor.clone() for name, tensor in file.read_all().items()} | changes
        metadata = {"format": file.metadata["format"], "facts": changes.get("facts", file.metadata["facts"])}
        tensors = {name: tensor for name, tensor in held.items() if name != "facts" and tensor is not None}
        save_tensors_atomic(folder / file.path.name, tensors, {key: text for key, text in metadata.items() if text})

    return edit


def report(change):
    def edit(folder):
        facts = json.loads((folder / "report.json").read_text())
        change(facts)
        (folder / "report.json").write_text(json.dumps(facts))

    return edit


def conditions():
    """The answers of the model to no conditions at all."""

    def edit(folder):
        from lrq_export.checkpoint import TensorFile

        names = [
            name for name in TensorFile(folder / "reference.safetensors").entries if name.startswith("conditions.")
        ]
        reference(**dict.fromkeys(names))(folder)

    return edit


def without_samples(folder):
    from lrq_export.checkpoint import TensorFile

    file = TensorFile(folder / "reference.safetensors")
    reference(**{name: file.read(name)[:0].clone() for name in file.entries if name.startswith("inputs.")})(folder)


def record(**changes):
    """The first layer of quantized.safetensors that has a bias, with fields of its record replaced."""

    def edit(folder):
        from lrq_export.checkpoint import TensorFile

        file = TensorFile(folder / "quantized.safetensors")
        records = json.loads(file.metadata["layers"])
        next(each for each in records if each["bias"]).update(changes)
        tensors = {name: tensor.clone() for name, tensor in file.read_all().items()}
        save_tensors_atomic(file.path, tensors, file.metadata | {"layers": json.dumps(records)})

    return edit


def last_model(change):
    def edit(folder):
        path = pass_files(folder)[-1]
        model = onnx.load(path)
        change(model)
        path.write_bytes(model.SerializeToString())

    return edit


def tables(table, row):
    """The last graph, the first row of one of its tables replaced."""

    def change(model):
        (entry,) = (entry for entry in model.metadata_props if entry.key == "lrq.weights")
        held = json.loads(entry.value)
        held[table][next(iter(held[table]))] = row
        entry.value = json.dumps(held)

    return last_model(change)


def first_node(change):
    return last_model(lambda model: change(model.graph.node[0]))


def outcome(text):
    def change(model):
        (entry,) = (entry for entry in model.metadata_props if entry.key == "lrq.pass")
        entry.value = text

    return last_model(change)


def without_metadata(key):
    """What the last graph says of itself beside its nodes."""

    def edit(folder):
        path = pass_files(folder)[-1]
        model = onnx.load(path)
        for entry in [entry for entry in model.metadata_props if entry.key == key]:
            model.metadata_props.remove(entry)
        path.write_bytes(model.SerializeToString())

    return edit


def behind(name):
    """A file with the first half of an entry behind it, of a kind that is stepped over when a package is admitted."""

    def edit(folder):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\x42\x02\xff\xff")

    return edit


def opset(name):
    """A model that parses, of an opset that no runtime has."""

    def edit(folder):
        model = onnx.load(folder / name)
        for each in model.opset_import:
            each.version = 999
        (folder / name).write_bytes(model.SerializeToString())

    return edit


def last_graph(folder):
    return pass_files(folder)[-1].relative_to(folder)


def config(**changes):
    """The manifest's config of the model, of which the other files are not any more."""

    def edit(folder):
        facts = json.loads((folder / "manifest.json").read_text())
        facts["source"]["config"] |= changes
        (folder / "manifest.json").write_text(json.dumps(facts))

    return edit


def another_float(folder):
    """A weight in floating point under a name that the model does not have."""
    from lrq_export.checkpoint import TensorFile

    file = TensorFile(folder / "quantized.safetensors")
    tensors = {
        name.replace("proj_out.bias", "proj_out.bios"): tensor.clone() for name, tensor in file.read_all().items()
    }
    save_tensors_atomic(file.path, tensors, file.metadata)


def without_graphs(folder):
    for path in pass_files(folder):
        path.unlink()


ONES = torch.ones(1)
NO_LAYER = '{"adapter_nmse": 0, "statistics": {}}'
ADD_RTX = ("build", "--target", "tensorrt-rtx")
ADD, VERIFY = ("build", "--target", "tensorrt"), ("verify", "--against", "onnxruntime")
SAMPLE = ("sample", "-o", "not-written.png")
NONSENSE = {
    "a reference of no facts": (reference(facts=None), VERIFY, "reference.safetensors: not the answers of a model"),
    "facts that are no JSON": (reference(facts="{"), VERIFY, "reference.safetensors: not the answers of a model"),
    "facts that are a list": (reference(facts="[1]"), VERIFY, "reference.safetensors: not the answers of a model"),
    "facts of no statistics": (reference(facts='{"adapter_nmse": 0}'), ADD, "reference.safetensors: not the answers"),
    "a reference of no noise": (reference(noise=None), VERIFY, "reference.safetensors: not the answers of a model"),
    "a config of more layers": (config(num_layers=3), ("verify",), "quantized.safetensors: transformer_blocks.2"),
    "a config of larger images": (config(sample_size=99_998), ("verify",), "manifest.json: sample_size: got 99998"),
    "a config of empty patches": (config(patch_size=0), ("verify",), "manifest.json: patch_size: got 0"),
    "an engine of empty patches": (config(patch_size=0), SAMPLE, "manifest.json: not a config of PixArt"),
    "a target of empty patches": (config(patch_size=0), VERIFY, "manifest.json: not a config of PixArt"),
    "a plan of empty patches": (config(patch_size=0), ADD, "manifest.json: not a config of PixArt"),
    "a plan of more channels": (
        config(in_channels=100_000), ADD_RTX, "manifest.json: source: by its config hidden_states is"
    ),
    "no page": (lambda folder: (folder / "report.html").unlink(), ADD_RTX, "report.html: cannot be read"),
    "a repository of empty patches": (
        config(patch_size=0), ("serve-config", "--triton", "not-written"), "manifest.json: not a config of PixArt"
    ),
    "a config of fewer layers": (config(num_layers=1), ("verify",), "quantized.safetensors: transformer_blocks.1"),
    "a config of other widths": (config(in_channels=3), ("verify",), "pos_embed.proj.weight: got shape"),
    "a config of text": (config(num_layers="x"), ("verify",), "manifest.json: num_layers: got 'x'"),
    "a config of another class": (config(_class_name="DiTTransformer2DModel"), ("verify",), "manifest.json"),
    "an engine of another class": (config(_class_name="DiTTransformer2DModel"), SAMPLE, "its onnxruntime engine takes"),
    "a weight of no model": (another_float, ("verify",), "quantized.safetensors: proj_out.bias: got no such tensor"),
    "a reference of other inputs": (reference(**{"inputs.x": ONES}), ("verify",), "inputs.x is unknown"),
    "a reference of no timesteps": (reference(**{"inputs.timestep": None}), ("verify",), "inputs.timestep is missing"),
    "a reference of one timestep": (reference(**{"inputs.timestep": ONES}), ("verify",), "timestep: got shape (1,)"),
    "answers to fewer inputs": (reference(noise=ONES), ("verify",), "noise: got shape (1,)"),
    "a reference of no conditions": (conditions(), ("verify",), "conditions: needed a row of each at least"),
    "a reference of no latents": (reference(latents=torch.ones(0)), ("verify",), "latents: got shape (0,)"),
    "facts of no layer": (reference(facts=NO_LAYER), ("verify",), "statistics: "),
    "inputs of no samples": (without_samples, VERIFY, "with samples a positive multiple of 1"),
    "a bias of another shape": (record(bias="proj_out.weight"), ("verify",), "proj_out.weight has another shape"),
    "a stack of a number": (tables("stacks", 3), ("inspect", "--passes"), "no graph of a build"),
    "signs of text": (tables("signs", {"seed": "x"}), ADD, "no graph of a build"),
    "a node that reads nothing": (first_node(lambda node: node.ClearField("input")), ADD, "no graph of a build"),
    "a pass that is a list": (outcome("[1]"), ("inspect", "--passes"), "says not what its pass did"),
    "a report of no source": (report(lambda facts: facts.pop("source")), ADD, "report.json: not the report"),
    "a report of text": (lambda folder: (folder / "report.json").write_text("?"), ADD, "report.json: not valid JSON"),
    "a report without end": (
        lambda folder: (folder / "report.json").write_text('{"x": [' + "[]," * 400_000 + "[]]}"),
        ADD, "report.json: got up to"
    ),
    "no report": (lambda folder: (folder / "report.json").unlink(), ADD, "report.json: cannot be read"),
    "a pass that says nothing": (
        without_metadata("lrq.pass"), ("inspect", "--passes"), "says not what its pass did"
    ),
    "a graph of no weights": (without_metadata("lrq.weights"), ADD, "no graph of a build"),
    "half of an opset as portable model": (behind("model.onnx"), ("verify",), "model.onnx: no ONNX model"),
    "an opset of nowhere in the portable model": (opset("model.onnx"), ("verify",), "ONNX Runtime refuses it"),
    "half of an opset in a package that is shown": (behind("model.onnx"), ("inspect",), "model.onnx: no ONNX model"),
    "half of an opset as engine": (behind("engine/onnxruntime/model.onnx"), VERIFY, "model.onnx: no ONNX model"),
    "an engine of an opset of nowhere": (opset("engine/onnxruntime/model.onnx"), SAMPLE, "ONNX Runtime 1.31"),
    "half of an opset as last graph": (lambda folder: behind(last_graph(folder))(folder), ADD, "no ONNX model"),
    "no graphs": (without_graphs, ADD, "graphs: holds the graph of no pass"),
    "no trace": (lambda folder: (folder / "graphs/0-trace.onnx").unlink(), ("inspect", "--passes"), "0-trace.onnx"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "command", "part"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_behind_right_hashes_is_one_line_and_exit_code_3(spoilt, cli, edit, command, part):
    name, *options = command
    cli(name, spoilt(edit), *options).refused(3, part)
