"""A tiny real model in diffusers layout, one package built from it, and the command line called in this process.

The model is 24 = 2 x 12 wide, so both the width and the heads have a Hadamard matrix that is no power of two. A build
takes half a minute, so tests share `package`, build with `until` where a stage will do, and trace a model once.
"""

import gc
import hashlib
import json
import resource
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

CONFIG = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 12, "num_attention_heads": 2,
    "in_channels": 1, "out_channels": 1, "cross_attention_dim": 24, "caption_channels": 16,
    "use_additional_conditions": False,
}  # fmt: skip
# What keeps a build of the tiny model short.
SETTINGS = {
    "rotation.kind": "hadamard",  # the same rotations whatever the numbers; `auto` has tests of its own
    "calibration.samples": "8",
    "sampling.images": "2",
    "sampling.steps": "3",
}


@dataclass(frozen=True)
class Tiny:
    """What a build starts from: folder, recorded inputs, recipe, and the same as arguments of the command line."""

    source: Path
    calibration: Path

    def recipe(self, **changes):
        from lrq_export.recipe import load_recipe

        return load_recipe(overrides=SETTINGS | {key.replace("__", "."): value for key, value in changes.items()})

    @property
    def arguments(self) -> list[str]:
        return ["--calibration", str(self.calibration), *_set_flags(SETTINGS)]


@dataclass(frozen=True)
class Outcome:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *parts: str) -> None:
        """It ended with `code` and one line on standard error that holds every part and no traceback."""
        assert self.code == code, self
        assert self.err.endswith("\n"), self.err
        assert len(self.err.splitlines()) == 1, self.err
        (line,) = self.err.splitlines()
        assert line.startswith("lrq-export: "), line
        for part in parts:
            assert str(part) in line


def _set_flags(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def write_transformer(folder: Path, **changes) -> Path:
    """A PixArt transformer of truncated normal weights in fp16, wide enough for its layers to matter."""
    from diffusers import PixArtTransformer2DModel

    generator = torch.Generator().manual_seed(0)
    model = PixArtTransformer2DModel(**CONFIG | changes)
    for name, parameter in model.named_parameters():
        std = 0.02 if name.endswith("bias") else 0.2
        torch.nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
    model.half().save_pretrained(folder)
    return folder


def write_calibration(path: Path, rows: int = 16, text: int = 6, **extra: torch.Tensor) -> Path:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, text, dtype=torch.int64)
    mask[::3, text // 2 :] = 0
    tensors = {
        "hidden_states": torch.randn(rows, 1, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(rows, text, 16, generator=generator),
        "timestep": torch.arange(rows).remainder(4).mul(300),
        "encoder_attention_mask": mask,
    }
    save_file(tensors | extra, path)
    return path


def pytest_collection_modifyitems(items):
    """The long files first, so that workers which take one after the other end together.

    One file that needs the package begins: while it is built, the others take those that do not.
    """
    waits = {item.path for item in items if "built" in item.fixturenames}
    builds = next((item.path for item in items if item.path in waits), None)

    def turn(item) -> int:
        if item.path == builds:
            return 0
        return 3 if "graphs" in item.path.parts else 1 + (item.path in waits)

    items.sort(key=turn)


def pytest_collection_finish():
    """What is imported by now stays: without it a full garbage collection takes 0.4 s and not 0.1."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run that all workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session", autouse=True)
def export_afresh(shared_folder):
    """A model is exported to ONNX once for all tests, a quarter of a build; gives what does so each time.

    `test_trace` shows that exports repeat.
    """
    from filelock import FileLock

    from lrq_export import trace
    from lrq_export.models import FAMILIES

    export, folder = trace.export_model, shared_folder / "exported"
    folder.mkdir(exist_ok=True)

    def export_or_read(family, config, layers):
        if family not in FAMILIES.values():
            return export(family, config, layers)
        model = {key: value for key, value in config.items() if not key.startswith("_")}  # not where it comes from
        told = json.dumps([family.class_name, model, layers], sort_keys=True)
        path = folder / f"{hashlib.sha256(told.encode()).hexdigest()}.onnx"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(export(family, config, layers).SerializeToString())
        return onnx.load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "export_model", export_or_read)
        yield export


@pytest.fixture(scope="session", autouse=True)
def no_full_collections():
    """A build collects garbage 15 times to keep its peak memory down, for 0.2 s each among all that tests import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrq_export.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny")
    source = write_transformer(folder / "model")
    DDIMScheduler(clip_sample=False).save_pretrained(source)
    generator = torch.Generator().manual_seed(2)
    save_file({"encoder_hidden_states": torch.randn(4, 6, 16, generator=generator)}, source / "conditions.safetensors")
    return Tiny(source, write_calibration(folder / "calibration.safetensors"))


@pytest.fixture(scope="session")
def built(tiny, shared_folder):
    """The result of one undisturbed build; of several workers the first one builds, to the others it is up to date."""
    from filelock import FileLock

    from lrq_export.compiler import build

    out = shared_folder / "built" / "package"
    out.parent.mkdir(exist_ok=True)
    with FileLock(f"{out.parent}.lock"):
        return build(tiny.source, out, recipe=tiny.recipe(), calibration=tiny.calibration)


@pytest.fixture(scope="session")
def package(built) -> Path:
    """A package, not to be edited."""
    return built.out


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a folder or file, free to be spoilt."""

    def copy(path: Path, name: str | None = None) -> Path:
        target = tmp_path / (name or path.name)
        return Path(shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target))

    return copy


@pytest.fixture
def cli(capsys, monkeypatch):
    """Call the command line in this process."""
    from lrq_export.cli import main

    def run(*arguments) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["lrq-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(stopped.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def digests():
    """SHA-256 of every file below a folder, by relative path."""

    def measure(folder: Path) -> dict[str, str]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    return measure


@pytest.fixture(scope="session")
def reseal():
    """Write a package's manifest anew over edited files, as someone would who wants the edit to go unnoticed."""
    from lrq_export.package import write_manifest

    own = {"format", "schema", "files", "content_sha256", "manifest_sha256"}

    def seal(folder: Path) -> None:
        facts = json.loads((folder / "manifest.json").read_text())
        write_manifest(folder, {key: value for key, value in facts.items() if key not in own})

    return seal


@pytest.fixture(scope="session")
def tiny_transformer():
    return write_transformer


@pytest.fixture(scope="session")
def tiny_calibration():
    return write_calibration


@pytest.fixture(scope="session")
def file_size_limit():
    """Within its block, files beyond so many bytes cannot be written: what a full disk does, without root."""

    @contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
