"""Options of the ONNX Runtime sessions that only check: they run a few times, so memory counts more than speed."""


def frugal_options():
    """`onnxruntime.SessionOptions` without the arena, which grows in powers of two and never shrinks."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options
