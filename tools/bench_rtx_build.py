"""How long TensorRT-RTX takes to build a package's engine on a CPU, from standard ops and with the plugins.

    python tools/bench_rtx_build.py OUT [--most SECONDS]

Each engine is built as `lrq-export build OUT --target tensorrt-rtx` does, in a copy of the package, by a process of its
own; the clock runs from the call until the finished package is swapped in. Without compiled plugins
(`lrq-export plugins build`, or LRQ_PLUGINS) only the first is built. Exits with 1 if a build takes more than --most
seconds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lrq_export.engine.built import BUILD, FOLDERS, RTX
from lrq_export.engine.targets import add_engines
from lrq_export.package import list_files
from lrq_export.plugins import LIBRARY, find_library


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--most", type=float, default=60, help="seconds that a build may take")
    options = parser.parse_args(arguments)
    kinds = ["never", "always"] if find_library() is not None else ["never"]
    builds = [timed_build(options.package, plugins) for plugins in kinds]
    print(json.dumps(builds, indent=2))
    if len(kinds) == 1:
        print(f"{LIBRARY} is not compiled: no engine with plugins was built", file=sys.stderr)
    slow = [each for each in builds if each["seconds"] > options.most]
    for each in slow:
        print(f"plugins {each['plugins']}: {each['seconds']} s, needed at most {options.most:g}", file=sys.stderr)
    return 1 if slow else 0


def timed_build(package: Path, plugins: str) -> dict[str, Any]:
    """Seconds of a build with engine.plugins as given, and what the engine is."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "package"
        for name in list_files(package):
            if not name.startswith(f"{FOLDERS[RTX]}/"):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes((package / name).read_bytes())
        started = time.perf_counter()
        missing = add_engines(copy, [RTX], changes={"plugins": plugins})
        seconds = time.perf_counter() - started
        if missing:
            raise missing[0]
        facts = json.loads((copy / FOLDERS[RTX] / BUILD).read_text())
    return {"plugins": plugins, "seconds": round(seconds, 1)} | {
        name: facts[name] for name in ("engine_bytes", "layers", "plugin_layers", "version")
    }


if __name__ == "__main__":
    sys.exit(main())
