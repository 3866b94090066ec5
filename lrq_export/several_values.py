"""Options of the command line that take several values after one flag: --bits 4 3 is --bits 4 --bits 3.

A further value is a word that looks like one, so that an argument may follow: --bits 4 3 SOURCE. Commas work, too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from typer.core import TyperCommand

from lrq_export.errors import UsageError

_NAMES, _NUMBERS = re.compile(r"\w+(,\w+)*,?"), re.compile(r"\d+(,\d+)*,?")
_ARCHITECTURES = re.compile(r"\d+a?(,\d+a?)*,?")


class Several(NamedTuple):
    """An option that takes several values."""

    is_value: Callable[[str], bool]  # asked of every word but the first after the flag
    example: str


def _is_number(word: str) -> bool:
    return _NUMBERS.fullmatch(word) is not None


def _is_architecture(word: str) -> bool:
    return _ARCHITECTURES.fullmatch(word) is not None


def _is_method(word: str) -> bool:
    """A word that names a folder is the source, unless a method has that name, too."""
    if not _NAMES.fullmatch(word) or not Path(word).is_dir():
        return _NAMES.fullmatch(word) is not None
    from lrq_export.comparison.treatments import TREATMENTS  # heavy, and hardly ever asked for here

    return word in TREATMENTS


SEVERAL: Mapping[str, Several] = {
    "--methods": Several(_is_method, "tlq rtn"),
    "--bits": Several(_is_number, "4 3"),
    "--acts": Several(_is_number, "8 6"),
    "--seeds": Several(_is_number, "0 1 2"),
    "--architectures": Several(_is_architecture, "89 90a"),
}


class SeveralValues(TyperCommand):
    """A command whose options that SEVERAL names take several values."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, flag_before_each_value(args))


def flag_before_each_value(words: Sequence[str]) -> list[str]:
    """The same command line as typer reads it. Raises UsageError for a flag without a value."""
    written: list[str] = []
    flag, empty = "", False  # whose values are being read, and whether it has none yet
    for position, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if empty and word.startswith("-"):
            raise _no_value(flag, word)
        if empty:  # what is no value after all will be refused by the flag's name
            written, empty = [*written, word], False
        elif word == "--":
            return [*written, *words[position:]]
        elif name in SEVERAL:
            written, flag, empty = [*written, word], name, not equals
        elif flag and SEVERAL[flag].is_value(word):
            written += [flag, word]
        else:
            written, flag = [*written, word], ""
    if empty:
        raise _no_value(flag, "nothing")
    return written


def _no_value(flag: str, got: str) -> UsageError:
    return UsageError(f"{flag}: got {got}, needed at least one value", hint=f"e.g. {flag} {SEVERAL[flag].example}")
