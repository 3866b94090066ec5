"""A comparison that is interrupted loses nothing, and one that is asked for more measures only that."""

import json

import pytest

from lrq_export.comparison import run


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

    def compare(methods, bits=(4,), seeds=(0,), **changes):
        recipe = tiny.recipe(**{"sampling__images": "1", "sampling__steps": "2"} | changes)
        return run.compare(
            tiny.source, methods, bits=bits, act_bits=(8,), recipe=recipe, calibration=tiny.calibration, seeds=seeds,
            kept=tmp_path / "kept.json",
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


@pytest.mark.parametrize("change", [{"seeds": (1,)}, {"calibration__samples": "4"}])
def test_under_other_conditions_all_is_measured_again(measure, change):
    measured, compare = measure
    compare(["tlq"])
    assert names(compare(["rtn", "tlq"], **change)) == [("rtn", 4), ("tlq", 4)]
    assert measured == [("tlq", 4), ("rtn", 4), ("tlq", 4)]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"rows": []}', b"\xff"])
def test_what_is_no_report_is_replaced(measure, tmp_path, content):
    _, compare = measure
    (tmp_path / "kept.json").write_bytes(content)
    assert names(compare(["tlq"])) == [("tlq", 4)]
