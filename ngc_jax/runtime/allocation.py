"""Memory of this process that is freed, and kept for what asks next.

For: CPUs, where each update asks for its memory anew. Not for: memory of accelerators.
"""

import ctypes

# Names of <malloc.h>. An int is what glibc takes, so at most 2 GiB of freed memory are kept.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MOST = 2**31 - 1  # bytes


def keep_freed() -> None:
    """Keeps freed memory in this process; before jax starts its threads, and of glibc alone.

    The machine else takes large pieces back, and clears each page when it is used again: a tenth of
    an update's time, and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_TRIM_THRESHOLD, MOST), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
            mallopt(option, value)
