"""Decode every weight of a package in all the ways there are and require the same integers, bit for bit.

    python tools/check_decode.py PACKAGE

torch (`lrq_export.quant`), numpy (`graphs.ops`), the function body of the op in stock ONNX Runtime, and the C++ core of
plugins/ compiled here with g++: by shifts (Twin-Log), by table, and a word at a time as the GPU kernels do.
"""

import argparse
import ctypes
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from core_library import compile_core, packed_weight
from onnx import TensorProto, helper

from graphs import names
from graphs.ops import OPS, attach_bodies, packing
from lrq_export.package import QUANTIZED
from lrq_export.quant import twin_log
from lrq_export.quant.codebook_weight import CodebookWeight
from lrq_export.quantized import LayerTensors, QuantizedFile

DEQUANT = {names.TWIN_LOG: "TwinLogDequant", names.CODEBOOK: "CodebookDequant"}


def in_torch(layer: LayerTensors) -> np.ndarray:
    record = layer.record
    codes = torch.from_numpy(packing.unpack(layer.packed()))
    if record.method == names.CODEBOOK:
        return CodebookWeight(codes, layer.table.float()).dequantize().numpy()
    weight = twin_log.TwinLogWeight(codes, layer.exponents, layer.scale, record.bits, record.group_size)
    return twin_log.integer_weight(weight).numpy()


def in_onnxruntime(layer: LayerTensors) -> np.ndarray:
    """The op's body with a scale of ones, so that it returns the integers themselves."""
    record, spec = layer.record, OPS[DEQUANT[layer.record.method]]
    attributes = {"bits": record.bits, "group_size": record.group_size, "rows": record.rows, "cols": record.cols}
    weights = [each for each in layer.onnx_weights() if not each.name.endswith(".scale")]
    tensors = [
        TensorProto(name=each.name, data_type=each.onnx_type, dims=each.shape, raw_data=each.read()) for each in weights
    ]
    tensors.append(onnx.numpy_helper.from_array(np.ones(record.rows, np.float32), "ones"))
    node = spec.node([tensor.name for tensor in tensors], ["w"], **attributes)
    output = helper.make_tensor_value_info("w", TensorProto.FLOAT, [record.rows, record.cols])
    graph = helper.make_graph([node], "decode", [], [output], tensors)
    opsets = [helper.make_opsetid("", names.ONNX_OPSET), helper.make_opsetid(names.DOMAIN, names.OPSET)]
    model = attach_bodies(helper.make_model(graph, opset_imports=opsets))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def in_core(core: ctypes.CDLL, layer: LayerTensors) -> dict[str, np.ndarray]:
    record = layer.record
    is_codebook = record.method == names.CODEBOOK
    codes, levels = packing.unpack(layer.packed()), (layer.table if is_codebook else layer.exponents).numpy()
    form = {"bits": record.bits, "group_size": record.group_size}
    stored = packed_weight(codes, levels, **form)
    in_words = packed_weight(codes, levels, **form, layout=names.WORDS)
    decoded = {
        "C++ table": stored.decode(core, "lrqDecodeByTable"),
        "C++ words of storage": stored.decode(core, "lrqDecodeByWords"),
        "C++ words": in_words.decode(core, "lrqDecodeByWords"),
    }
    return decoded if is_codebook else decoded | {"C++ shifts": stored.decode(core, "lrqDecodeByShifts")}


def differences(layer: LayerTensors, core: ctypes.CDLL) -> dict[str, int]:
    """How many weights each decoder reads differently from numpy."""
    expected = layer.integer_weight().numpy()
    decoded = {"torch": in_torch(layer), "ONNX body": in_onnxruntime(layer), **in_core(core, layer)}
    return {name: int((values != expected).sum()) for name, values in decoded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    args = parser.parse_args()
    if shutil.which("g++") is None:
        sys.exit("check_decode needs a C++ compiler: install g++")
    quantized = QuantizedFile(args.package / QUANTIZED)
    layers = [name for name, record in quantized.records.items() if record.bits != names.INT8_BITS]
    weights, totals = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        core = compile_core(Path(folder))
        for name in layers:
            layer = quantized.layer(name)
            weights += layer.record.rows * layer.record.cols
            for decoder, count in differences(layer, core).items():
                totals[decoder] = totals.get(decoder, 0) + count
    print(f"{len(layers)} layers, {weights:,} weights; different from numpy: {totals}")
    sys.exit(1 if any(totals.values()) else 0)


if __name__ == "__main__":
    main()
