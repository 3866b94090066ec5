"""session.json beside the ONNX Runtime engine: what its session is opened with, on every machine and everywhere.

    providers                      in order; the first that is installed computes what it can, the rest what is left
    options                        session options
    config_where_products_saturate more of them, where the processor's own uint8 x int8 product is wrong
    threads                        intra_op and inter_op; 0: as ONNX Runtime chooses

`lrq_export.admit` holds such a file to the options, providers and sizes that it knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrq_export.package import write_json_atomic
from lrq_export.untrusted_json import read_json_object

SESSION = "session.json"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
STOP_SPINNING = ("session.force_spinning_stop", "1")  # between two calls the cores belong to the rest of the pipeline
# Function bodies are folded into constants once, instead of decoding the weights anew in every run. The same numbers,
# 13 times as fast on the demo's model.onnx; the folded weights lie in memory as float32.
FOLD_BODIES = ("session.disable_quant_qdq", "1")
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}


@dataclass(frozen=True)
class SessionSettings:
    """What session.json holds. The defaults are those of packages that lack a key."""

    options: Mapping[str, str] = field(default_factory=lambda: dict([STOP_SPINNING]))
    where_products_saturate: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = (CUDA, CPU)
    intra_op_threads: int = 0
    inter_op_threads: int = 0

    @classmethod
    def read(cls, folder: Path) -> "SessionSettings":
        """Those of an engine's folder. Raises InputError for a file that is no JSON object."""
        held, default = read_json_object(folder / SESSION), cls()
        threads = held.get("threads", {})
        return cls(
            held.get("options", default.options), held.get("config_where_products_saturate", {}),
            tuple(held.get("providers", default.providers)), threads.get("intra_op", 0), threads.get("inter_op", 0),
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        held: dict[str, Any] = {
            "options": dict(self.options), "config_where_products_saturate": dict(self.where_products_saturate),
            "providers": list(self.providers),
            "threads": {"intra_op": self.intra_op_threads, "inter_op": self.inter_op_threads},
        }  # fmt: skip
        write_json_atomic(folder / SESSION, held)

    def session_options(self, saturate: bool, threads: int | None = None):
        """`onnxruntime.SessionOptions`, for a processor whose products saturate or not; `threads` override intra_op."""
        import onnxruntime

        made = onnxruntime.SessionOptions()
        for key, value in {**self.options, **(self.where_products_saturate if saturate else {})}.items():
            made.add_session_config_entry(key, value)
        made.intra_op_num_threads = self.intra_op_threads if threads is None else threads
        made.inter_op_num_threads = self.inter_op_threads
        return made
