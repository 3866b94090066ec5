"""Checks of what engines on GPUs need. All of it is optional."""

from pathlib import Path

from lrq_export.doctor.elf import SharedLibrary, read_library
from lrq_export.doctor.finding import Finding, absent, ok, wrong
from lrq_export.doctor.system import System, version_of

OLDEST_TENSORRT = (10, 7)  # its parser prefers a plugin to a function of the same name only since then
OLDEST_CAPABILITY, OLDEST_DRIVER = (7, 5), (12, 0)
DRIVER_OF_PROVIDER = (13, 0)  # onnxruntime-gpu has had no other CUDA since 1.27
DISTRIBUTIONS = {"tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt-rtx": ("tensorrt-rtx",)}
RTX_LIBRARY = "libtensorrt_rtx.so"
BUILD_ENGINE, BUILD_RTX = "build --target tensorrt", "build --target tensorrt-rtx"


def driver(system: System) -> Finding:
    found = system.driver()
    if found is None:
        return absent("CUDA driver", "anything on a GPU", "install NVIDIA's driver where a GPU is")
    if isinstance(found, str):
        return wrong("CUDA driver", f"does not work: {found}", "reboot, or install a driver that fits the kernel")
    if not found.gpus:
        return wrong("CUDA driver", "sees no GPU", "check nvidia-smi, CUDA_VISIBLE_DEVICES, and docker run --gpus all")
    version = ".".join(map(str, found.cuda))
    if found.cuda < OLDEST_DRIVER:
        return wrong("CUDA driver", f"runs CUDA up to {version}, needed 12.0", "install a newer driver")
    provider = system.version("onnxruntime-gpu")
    if provider is not None and found.cuda < DRIVER_OF_PROVIDER:
        return wrong(
            "CUDA driver", f"runs CUDA up to {version}, onnxruntime-gpu {provider} needs 13.0", "install a newer driver"
        )
    old = [name for name, capability in found.gpus if capability < OLDEST_CAPABILITY]
    if old:
        return wrong("CUDA driver", f"{old[0]} has a compute capability below 7.5", "use a GPU of Turing or newer")
    shown = ", ".join(f"{name} (compute capability {major}.{minor})" for name, (major, minor) in found.gpus)
    return ok("CUDA driver", f"CUDA {version}, {shown}")


def tensorrt(system: System) -> Finding:
    version, library = installed_tensorrt(system), _nvinfer(system)
    if version is None and library is None:
        return absent("TensorRT", BUILD_ENGINE, "pip install tensorrt-cu13, on the machine with the GPU")
    if version is None:
        return wrong("TensorRT", f"{library} is here, its Python package is not", "pip install tensorrt-cu13")
    if version_of(version) < OLDEST_TENSORRT:
        return wrong("TensorRT", f"got {version}, needed 10.7 or newer", "pip install -U tensorrt-cu13")
    if library is None:
        return wrong("TensorRT", f"{version} has no libnvinfer", f"pip install --force-reinstall tensorrt=={version}")
    if _major(library) != version_of(version)[0]:
        return wrong(
            "TensorRT", f"the Python package is {version}, the library {library}", "install both in one version"
        )
    return ok("TensorRT", version)


def pairing(system: System) -> Finding:
    """ONNX Runtime's TensorRT provider and TensorRT: one major version, which is that of libnvinfer.

    The wheels of ONNX Runtime 1.31 link libnvinfer.so.10, while `pip install tensorrt` brings TensorRT 11.
    """
    name = "TensorRT provider"
    needed = provider_needs(system)
    if needed is None:
        return absent(name, "serving TensorRT engines by ONNX Runtime", "pip install onnxruntime-gpu in its place")
    library, version = _nvinfer(system), installed_tensorrt(system)
    got = _major(library) if library else version_of(version)[0] if version else None
    if got == needed:
        return ok(name, f"needs libnvinfer.so.{needed}, which is here")
    here = "none is here" if got is None else f"TensorRT {version or got} is here, whose engines it cannot load"
    return wrong(
        name, f"needs libnvinfer.so.{needed}; {here}", f"pip install 'tensorrt-cu13>={needed},<{needed + 1}' and build "
        "the engine again with it",
    )  # fmt: skip


def tensorrt_rtx(system: System) -> Finding:
    version = installed_tensorrt(system, "tensorrt-rtx")
    if version is None:
        return absent("TensorRT-RTX", BUILD_RTX, "pip install 'lrq-export[rtx]'")
    libraries = [path for folder in system.folders("tensorrt_rtx_libs") for path in folder.glob(f"{RTX_LIBRARY}.*")]
    if not libraries:
        return wrong("TensorRT-RTX", f"{version} has no {RTX_LIBRARY}", "pip install --force-reinstall tensorrt-rtx")
    link = libraries[0].with_name(RTX_LIBRARY)
    if not link.exists():
        # Its parser asks for the name without version when it meets a plugin, and ends the process.
        return ok(
            "TensorRT-RTX", f"{version}; lrq-export links {RTX_LIBRARY} itself, other programs crash at plugins until "
            f"you run ln -s {libraries[0].name} {link}",
        )  # fmt: skip
    return ok("TensorRT-RTX", version)


def compiler(system: System) -> Finding:
    name = system.environment.get("CXX", "c++")
    if system.which(name) is None:
        if "CXX" in system.environment:
            return wrong("C++ compiler", f"CXX names {name}, which is not here", "correct CXX, or unset it")
        return absent("C++ compiler", "lrq-export plugins build", "install g++ 9 or newer")
    said = system.output(name, "-dumpfullversion", "-dumpversion")
    version = version_of((said or "").strip())
    if not version:
        return wrong("C++ compiler", f"{name} does not say its version", "install g++ 9 or newer")
    if version < (9,):  # clang 9 and g++ 9 have all of C++17
        return wrong("C++ compiler", f"got {said.strip()}, needed 9 or newer for C++17", "install a newer one, set CXX")
    if system.which("cmake") is None:
        return wrong("C++ compiler", f"{name} is here, cmake is not", "pip install cmake")
    return ok("C++ compiler", f"{name} {said.strip()}, with cmake")


def nvcc(system: System) -> Finding:
    places = [Path(root) / "bin" / "nvcc" for root in (system.environment.get("CUDA_HOME"), "/usr/local/cuda") if root]
    found = system.which("nvcc") or next((str(path) for path in places if path.is_file()), None)
    if found is None:
        return absent("nvcc", "lrq-export plugins build", "install the CUDA toolkit, 12.8 or newer")
    said = system.output(found, "--version") or ""
    version = said.partition("release ")[2].partition(",")[0]
    if version_of(version) < (12, 8):
        return wrong(
            "nvcc", f"{found}: got {version or 'no version'}, needed 12.8 or newer", "install a newer CUDA toolkit"
        )
    return ok("nvcc", version)


def cutlass(system: System) -> Finding:
    root = system.environment.get("CUTLASS_ROOT")
    places = [Path(root), Path(root) / "include"] if root else []
    places += [folder / "source" / "include" for folder in system.folders("cutlass_library")]
    if any((place / "cutlass" / "cutlass.h").is_file() for place in places):
        return ok("CUTLASS", f"{system.version('nvidia-cutlass') or 'of CUTLASS_ROOT'}")
    if root:
        return wrong("CUTLASS", f"CUTLASS_ROOT is {root}, which holds no cutlass/cutlass.h", "correct it, or unset it")
    return absent("CUTLASS", "lrq-export plugins build", "pip install nvidia-cutlass")


def headers(system: System) -> Finding:
    """TensorRT's headers, where the build of the plugins looks for them."""
    name, root = "TensorRT headers", system.environment.get("TENSORRT_ROOT")
    if root and not (Path(root) / "include" / "NvInfer.h").is_file():
        return wrong(name, f"TENSORRT_ROOT is {root}, which has no include/NvInfer.h", "correct it, or unset it")
    places = [Path(root) / "include"] if root else system.header_folders()
    found = next((place for place in places if (place / "NvInfer.h").is_file()), None)
    if found is None:
        return absent(name, "lrq-export plugins build", "nothing to do with a network: the build downloads them")
    version = _header_version(found / "NvInferVersion.h")
    if version < OLDEST_TENSORRT:
        shown = ".".join(map(str, version)) or "of no known version"
        return wrong(name, f"those in {found} are {shown}, needed 10.7 or newer", "set TENSORRT_ROOT to newer ones")
    return ok(name, ".".join(map(str, version)))


def plugins(system: System) -> Finding:
    """The compiled plugins: what TensorRT looks up in them, and that they are bound to no version of it."""
    from lrq_export.errors import MissingError

    try:
        path = system.plugin_library()
    except MissingError as error:
        return wrong("plugins", error.message, error.hint)
    if path is None:
        return absent("plugins", "engines that keep weights packed", "lrq-export plugins build")
    try:
        library = read_library(path)
    except ValueError as error:
        return wrong("plugins", f"{path} {error}", "lrq-export plugins build")
    missing = sorted({"getCreators", "setLoggerFinder"} - library.exported)
    if missing:
        return wrong("plugins", f"{path} does not export {missing[0]}", "name liblrq_plugins.so, or build it again")
    bound = [name for name in library.needed if name.startswith("libnvinfer")]
    if bound:
        fix = "name liblrq_plugins.so in LRQ_PLUGINS"
        return wrong("plugins", f"{path} is linked to {bound[0]}, of one TensorRT", fix)
    return ok("plugins", str(path))


def installed_tensorrt(system: System, target: str = "tensorrt", built: str | None = None) -> str | None:
    """The version of the library that builds and runs a target's engines.

    Several distributions may say one, the stale one of a library that is gone among them: that of `built` if any does.
    """
    said = list(filter(None, map(system.version, DISTRIBUTIONS[target])))
    alike = [version for version in said if built is not None and version_of(version) == version_of(built)]
    return next(iter(alike + said), None)


def provider_needs(system: System) -> int | None:
    """The major version of libnvinfer that ONNX Runtime's TensorRT provider is linked to; None without a provider."""
    for folder in system.folders("onnxruntime"):
        path = folder / "capi" / "libonnxruntime_providers_tensorrt.so"
        if path.is_file():
            return next((_major(name) for name in _needed(path) if name.startswith("libnvinfer.so.")), None)
    return None


def _needed(path: Path) -> tuple[str, ...]:
    try:
        library: SharedLibrary = read_library(path)
    except ValueError:
        return ()
    return library.needed


def _nvinfer(system: System) -> str | None:
    """File name of libnvinfer, of pip's package or where the dynamic linker looks."""
    of_pip = sorted(path.name for folder in system.folders("tensorrt_libs") for path in folder.glob("libnvinfer.so.*"))
    return of_pip[-1] if of_pip else system.system_library("nvinfer")


def _major(library: str) -> int | None:
    """10 of "libnvinfer.so.10.16.1"."""
    version = version_of(library.partition(".so.")[2])
    return version[0] if version else None


def _header_version(path: Path) -> tuple[int, ...]:
    """Major and minor version as the header defines them; some spell one through a macro of their own."""
    try:
        words = [line.split() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return ()
    defined = {each[1]: each[2] for each in words if len(each) > 2 and each[0] == "#define"}
    found = []
    for part in ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR"):
        value = defined.get(part, "")
        value = defined.get(value, value)
        if not value.isdigit():
            return ()
        found.append(int(value))
    return tuple(found)


CHECKS = (driver, tensorrt, pairing, tensorrt_rtx, compiler, nvcc, cutlass, headers, plugins)
