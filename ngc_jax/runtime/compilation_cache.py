"""Compiled programs, kept on disk for the next start of the same run.

For: where they are kept, on which devices, and that damaged ones are made again. Not for: what is
compiled.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import warnings
from typing import Any

import jax

from ngc_jax.runtime.files import Path, expand, make_private, place, remove

HOME = "~/.cache/ngc_jax/compiled"
WORTH = 0.1  # seconds of compiling on a CPU from which a program is kept
WRONG = r"Error (?:reading|writing) persistent compilation cache entry for '([\w.<>-]+)': (.*)"


def keep_compiled() -> None:
    """Keeps what this process compiles, and uses what an earlier one kept; jax has its devices.

    Under JAX_COMPILATION_CACHE_DIR, if set, on any device. Else in `HOME`, if private: it is code
    that will be run; of a CPU in a part for each kind of processor, and for one device in one
    process alone: XLA's CPU backend loses the order of collectives in a program that it reads, so
    that devices wait for each other for ever (jax issue 38445).
    """
    asked = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    cpu, alone = jax.default_backend() == "cpu", jax.device_count() == 1
    if asked is None and (alone or not cpu):
        home = expand(HOME)
        kept = home / machine() if cpu else home
        try:
            for folder in dict.fromkeys((home.parent, home, kept)):
                make_private(folder)
        except OSError as error:
            print(f"compiled programs are not kept: {error}")
            return
        asked = str(kept)
        jax.config.update("jax_compilation_cache_dir", asked)
        if cpu:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    if asked:
        _mend(place(asked))


def machine() -> str:
    """A digest of what a CPU's machine code depends on: its kind, features and number of cores."""
    told = {platform.machine(), str(len(os.sched_getaffinity(0)))}
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n")
        told |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    told |= set() if len(told) > 2 else {platform.node()}
    return "cpu-" + hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()[:16]


@functools.cache  # once
def _mend(home: Path) -> None:
    """Removes a program that cannot be read, or was written in part, so that it is kept anew."""
    shown = warnings.showwarning

    def show(message: Any, *where: Any, **more: Any) -> None:
        found = re.match(WRONG, str(message), re.DOTALL)
        if not found:
            shown(message, *where, **more)
            return
        print(f"compiled program {found[1]} is damaged, or not kept: {found[2]:.200}")
        for path in home.glob(f"{found[1]}-*"):
            remove(path)

    warnings.filterwarnings("always", "Error .* persistent compilation cache entry")
    warnings.showwarning = show
