"""The names that README promises are what they say, however the package was imported before."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("before", ["", "import lrq_export.compiler, lrq_export.verify.run, lrq_export.cli"])
def test_public_names_are_callables_not_modules(before):
    code = f"{before}\nimport lrq_export\nassert all(callable(getattr(lrq_export, n)) for n in lrq_export.__all__)"
    code += "\nassert all(callable(getattr(lrq_export, n)) for n in lrq_export.__all__)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
