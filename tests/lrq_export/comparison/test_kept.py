"""A comparison that is interrupted loses nothing, and one that is asked for more measures only that."""

import json

import pytest
from safetensors.torch import load_file, save_file

from lrq_export.comparison import run
from lrq_export.errors import UsageError


@pytest.fixture
def measure(tiny, tmp_path, monkeypatch):
    """Compares with rows that are made up; (measured, compare): the list of what was measured, and the call."""
    measured = []

    def row(bench, fitted, treatment, bits, act_bits):
        if treatment.name == "ptq4dit":
            raise KeyboardInterrupt
        measured.append((treatment.name, bits))
        return {"method": treatment.name, "bits": bits, "act_bits": act_bits, "psnr_db": float(len(measured))}

    monkeypatch.setattr(run, "_row", row)

    def compare(methods, bits=(4,), seeds=(0,), files=None, **changes):
        recipe = tiny.recipe(**{"sampling__images": "1", "sampling__steps": "2"} | changes)
        files = {"calibration": tiny.calibration} | (files or {})
        return run.compare(
            tiny.source, methods, bits=bits, act_bits=(8,), recipe=recipe, seeds=seeds, kept=tmp_path / "kept.json",
            **files,
        )  # fmt: skip

    return measured, compare


def names(report):
    return [(row["method"], row["bits"]) for row in report["rows"]]


def test_only_what_is_new_is_measured(measure, tmp_path):
    measured, compare = measure
    first = compare(["tlq", "rtn"])
    assert measured == names(first) == [("tlq", 4), ("rtn", 4)]
    more = compare(["rtn", "quarot"], bits=(4, 3))
    assert measured[2:] == [("quarot", 4), ("rtn", 3), ("quarot", 3)]
    assert names(more) == measured
    assert more["rows"][:2] == first["rows"]
    assert json.loads((tmp_path / "kept.json").read_text()) == more
    assert compare(["tlq"]) == more
    assert len(measured) == 5


def test_an_interrupted_comparison_keeps_its_rows(measure, tmp_path):
    measured, compare = measure
    with pytest.raises(KeyboardInterrupt):
        compare(["tlq", "rtn", "ptq4dit"])
    assert names(json.loads((tmp_path / "kept.json").read_text())) == [("tlq", 4), ("rtn", 4)]
    compare(["tlq", "rtn", "quarot"])
    assert measured == [("tlq", 4), ("rtn", 4), ("quarot", 4)]


def other(name, tiny, tmp_path, write_calibration):
    """What changes the conditions: settings, or a file of the same kind."""
    if name == "calibration":
        return {"files": {name: write_calibration(tmp_path / "other.safetensors", rows=12)}}
    if name == "conditions":
        rows = load_file(tiny.source / "conditions.safetensors")
        save_file({key: tensor[:2] for key, tensor in rows.items()}, tmp_path / "other.safetensors")
        return {"files": {name: tmp_path / "other.safetensors"}}
    return {"seeds": {"seeds": (1,)}, "settings": {"calibration__samples": "4"}}[name]


@pytest.mark.parametrize("name", ["seeds", "settings", "calibration", "conditions"])
def test_what_was_measured_under_other_conditions_is_not_lost(measure, tiny, tmp_path, tiny_calibration, name):
    measured, compare = measure
    compare(["tlq"])
    before = (tmp_path / "kept.json").read_bytes()
    with pytest.raises(UsageError, match="holds a comparison of another model, or of other inputs"):
        compare(["rtn", "tlq"], **other(name, tiny, tmp_path, tiny_calibration))
    assert measured == [("tlq", 4)]
    assert (tmp_path / "kept.json").read_bytes() == before


def test_a_list_of_seeds_is_as_good_as_a_tuple(measure):
    measured, compare = measure
    compare(["tlq"], seeds=(0,))
    compare(["tlq"], seeds=[0])
    assert measured == [("tlq", 4)]


ROWLESS = b'{"conditions": "", "reference": {}, "seeds": [], "source": {}, "rows": [{"method": "tlq", "bits": 4}]}'


@pytest.mark.parametrize("content", [b"", b"[]", b'{"rows": []}', b"\xff", ROWLESS])
def test_what_is_no_report_is_not_lost_either(measure, tmp_path, content):
    _, compare = measure
    (tmp_path / "kept.json").write_bytes(content)
    with pytest.raises(UsageError, match="is no report of a comparison, and would be overwritten"):
        compare(["tlq"])
    assert (tmp_path / "kept.json").read_bytes() == content
