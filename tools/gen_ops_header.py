"""Write plugins/core/generated/ops.h, what the C++ side knows of the ops, from graphs/ops. With --check, only compare.

python tools/gen_ops_header.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from graphs import names
from graphs.ops import OPS
from graphs.ops.spec import Attribute, OpSpec

HEADER = Path(__file__).resolve().parent.parent / "plugins" / "core" / "generated" / "ops.h"
ELEMENTS = {"T": "kActivation", "float": "kFloat", "int8": "kInt8", "C": "kCodes"}
KINDS = {int: "kInteger", float: "kReal", str: "kText"}
ACTIVATIONS, CODES = ("float", "float16", "bfloat16"), ("int4", "int8")  # what op_info.h says of T and C

TOP = """\
// Made by tools/gen_ops_header.py from graphs/ops. Do not edit: change the op, then run the script.
#pragma once

#include "../op_info.h"

namespace lrq::ops {
"""


def header() -> str:
    """The whole file."""
    parts = [TOP, _text("kPluginVersion", names.PLUGIN_VERSION), _text("kPluginNamespace", names.PLUGIN_NAMESPACE), ""]
    for spec in OPS.values():
        parts += [_op(spec), ""]
    listed = "".join(f"    &{_namespace(name)}::kOp,\n" for name in OPS)
    parts += [f"inline constexpr Op const* kOps[] = {{\n{listed}}};", "", "}  // namespace lrq::ops", ""]
    return "\n".join(parts)


def _op(spec: OpSpec) -> str:
    """One namespace: the op's inputs, attributes and record."""
    for variable, wanted in (("T", ACTIVATIONS), ("C", CODES)):
        if variable in spec.type_vars and spec.type_vars[variable] != wanted:
            raise ValueError(f"{spec.name}: {variable} is {spec.type_vars[variable]}, op_info.h says {wanted}")
    (output,) = spec.outputs
    inputs = "".join(f"    {_tensor(tensor)},\n" for tensor in spec.inputs)
    choices = "".join(_choices(attribute) for attribute in spec.attributes)
    attributes = "".join(f"    {_attribute(attribute)},\n" for attribute in spec.attributes)
    return (
        f"namespace {_namespace(spec.name)} {{\n"
        f"inline constexpr Tensor kInputs[] = {{\n{inputs}}};\n"
        f"{choices}"
        f"inline constexpr Attribute kAttributes[] = {{\n{attributes}}};\n"
        f"inline constexpr Op kOp = {{\n"
        f"    {_quoted(spec.name)}, kInputs, {len(spec.inputs)},\n"
        f"    {_tensor(output)}, kAttributes, {len(spec.attributes)}}};\n"
        f"}}  // namespace {_namespace(spec.name)}"
    )


def _tensor(tensor) -> str:
    return f"{{{_quoted(tensor.name)}, Element::{ELEMENTS[tensor.type]}}}"


def _attribute(attribute: Attribute) -> str:
    if attribute.kind is float and (attribute.default is not None or attribute.choices):
        raise ValueError(f"{attribute.name}: op_info.h has no defaults and choices of reals")
    integer = attribute.default if attribute.kind is int and attribute.default is not None else 0
    text = _quoted(attribute.default or "") if attribute.kind is str else "nullptr"
    listed = f"{_choices_name(attribute)}" if attribute.choices else "nullptr"
    of_kind = (listed, "nullptr") if attribute.kind is int else ("nullptr", listed)
    return (
        f"{{{_quoted(attribute.name)}, Kind::{KINDS[attribute.kind]}, {str(attribute.default is None).lower()}, "
        f"{integer}, {text},\n     {of_kind[0]}, {of_kind[1]}, {len(attribute.choices)}}}"
    )


def _choices(attribute: Attribute) -> str:
    if not attribute.choices:
        return ""
    kind = "int32_t" if attribute.kind is int else "char const* const"
    values = ", ".join(_quoted(value) if attribute.kind is str else str(value) for value in attribute.choices)
    return f"inline constexpr {kind} {_choices_name(attribute)}[] = {{{values}}};\n"


def _choices_name(attribute: Attribute) -> str:
    return "kChoicesOf" + "".join(part.capitalize() for part in attribute.name.split("_"))


def _namespace(name: str) -> str:
    """TwinLogLinear -> twin_log_linear, as its file is called."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _text(name: str, value: str) -> str:
    return f"inline constexpr char const* {name} = {_quoted(value)};"


def _quoted(text: str) -> str:
    return json.dumps(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is not up to date; write nothing")
    if parser.parse_args().check:
        if not HEADER.is_file() or HEADER.read_text() != header():
            sys.exit(f"{HEADER.name} does not say what graphs/ops says. Fix: python tools/gen_ops_header.py")
        return
    HEADER.parent.mkdir(exist_ok=True)
    HEADER.write_text(header())


if __name__ == "__main__":
    main()
