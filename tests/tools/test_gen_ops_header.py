"""The C++ side knows exactly the ops of graphs/ops."""

import subprocess
import sys
from dataclasses import replace

import gen_ops_header
import pytest

from graphs.ops import OPS


def test_the_header_is_up_to_date():
    assert gen_ops_header.HEADER.read_text() == gen_ops_header.header(), "run `python tools/gen_ops_header.py`"
    checked = [sys.executable, gen_ops_header.__file__, "--check"]
    assert subprocess.run(checked, capture_output=True).returncode == 0


@pytest.mark.parametrize("change", [{"name": "Other"}, {"inputs": ()}, {"attributes": ()}])
def test_a_changed_op_is_seen(monkeypatch, change):
    monkeypatch.setitem(OPS, "TwinLogLinear", replace(OPS["TwinLogLinear"], **change))
    assert gen_ops_header.HEADER.read_text() != gen_ops_header.header()


def test_what_the_header_cannot_say_is_refused(monkeypatch):
    spec = OPS["TwinLogLinear"]
    monkeypatch.setitem(OPS, "TwinLogLinear", replace(spec, type_vars={**spec.type_vars, "T": ("float",)}))
    with pytest.raises(ValueError, match=r"op_info\.h says"):
        gen_ops_header.header()
