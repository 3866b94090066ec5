"""Every literal of the dialect, once."""

DOMAIN = "lrq"
OPSET = 1
ONNX_OPSET = 21  # the first with INT4 DequantizeLinear
IR_VERSION = 10  # the first with INT4 tensors

FRACTION_BITS = 4  # F of the codebook: exponents are in units of 2^-F
INTEGER_BITS = 6  # I of the codebook: mantissas carry I bits before they are shifted
INT8_BITS = 8  # weights of so many bits are plain integers, not codes
TWIN_LOG, CODEBOOK = "tlq", "codebook"  # what codes mean: levels that exponents give, or a free table
FLOATING_POINT = 16  # act_bits of a layer whose activations are not quantized

# What holds a quantized weight: inputs of lrq nodes, each a tensor `<layer>.<role>`. A format has some of them.
WEIGHT_ROLES = ("codes", "exponents", "table", "scale")
STORAGE, WORDS = "storage", "words"  # how the codes of a node lie: as files keep them, or as kernels read them

# Carried by every lrq node: makes TensorRT prefer a loaded plugin over the function body (docs/graph.md).
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
TRT_PLUGINS = "trt.plugins"  # the domain in which ONNX Runtime's TensorRT provider looks for plugins
