"""What machine this is: a timing means nothing without it."""

import os
from typing import Any


def describe_machine() -> dict[str, Any]:
    """The processor and the features that decide how fast integer products are."""
    processor, features = "unknown", []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        processor = fields.get("model name", processor)
        known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
        features = [name for name in known if name in fields.get("flags", "").split()]
    return {"processor": processor, "cores": os.cpu_count(), "features": features}
