"""Every literal of the dialect, once."""

DOMAIN = "lrq"
OPSET = 1
ONNX_OPSET = 21  # the first with INT4 DequantizeLinear
IR_VERSION = 10  # the first with INT4 tensors

# Carried by every lrq node: makes TensorRT prefer a loaded plugin over the function body (docs/graph.md).
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
