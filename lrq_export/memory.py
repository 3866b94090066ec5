"""Hand freed memory back to the operating system between stages.

glibc keeps freed blocks below 32 MiB, which is every weight of a 1152-wide model: the next stage's memory would come on
top of the last one's.
"""

import ctypes
import gc


def give_back() -> None:
    """Collect garbage, then `trim`."""
    gc.collect()
    trim()


def trim() -> None:
    """Trim the C heap; does nothing on systems whose C library has no malloc_trim."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
