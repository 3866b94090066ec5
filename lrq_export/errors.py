"""What a user can get wrong, each kind with its exit code. Anything else that escapes is a bug and keeps its traceback.

A message says what, where, got and needed; the hint says how to fix it:

>>> print(InputError("weights.safetensors: got 12 bytes, needed at least 16", hint="download it again"))
weights.safetensors: got 12 bytes, needed at least 16. Fix: download it again
"""

MOST_CHARACTERS = 2000  # of a message, which may quote names from a hostile file


def one_line(text: str) -> str:
    """`text` on one line that a terminal takes for nothing but text; of a very long one its two ends."""
    text = " ".join(text.split())
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 2 :]}"
    return printable(text)


def printable(text: str, kept: str = "") -> str:
    """`text` with all that is not, but for characters in `kept`, spelled out: what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class LrqError(Exception):
    """Base of every error a user can cause; never raised itself."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message, self.hint = one_line(message), hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}. Fix: {self.hint}"


class CheckFailed(LrqError):
    """A parity rung, a quality gate or a promise of the recipe did not hold."""

    exit_code = 1


class UsageError(LrqError):
    """A wrong flag, recipe or output folder."""

    exit_code = 2


class InputError(LrqError):
    """A bad, damaged or hostile input file."""

    exit_code = 3


class MissingError(LrqError):
    """Something required is not here: a library, a compiler, disk space."""

    exit_code = 4


class Interrupted(LrqError):
    """The user stopped the build; the same command resumes it."""

    exit_code = 5
