"""How this process's memory is given back, which on a CPU is a part of a step's time."""

import ctypes
import os
import platform

# mallopt's parameters, of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, where JAX_PLATFORMS asks for the CPU.

    XLA's CPU backend allocates a program's temporaries anew for each call. By default glibc takes
    blocks of that size from the system and gives them back at once, so that each step has all of
    its pages zeroed and mapped again. It is for processes that do one thing, over and over; and for
    before there are threads (JAX starts them with its first device), which keep their own arenas.

    Returns:
      Whether it is so from now on; not where another C library, or a device, does the allocating.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena, since others cannot grow past 64 MB; no maps of their own for large blocks.
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
