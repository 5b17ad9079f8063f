"""Compiled programs, kept on disk for the next start of the same run.

For: where they are kept, and on which devices that is sound. Not for: what is compiled.
"""

import jax

from ngc_jax.runtime.files import expand

HOME = "~/.cache/ngc_jax/compiled"


def keep_compiled() -> None:
    """Keeps what this process compiles, and uses what an earlier one kept; jax has its devices.

    Under JAX_COMPILATION_CACHE_DIR, if that is set, and then on any device. Else on accelerators
    alone, in `HOME`. XLA's CPU backend forgets the order of collectives in a program that it reads,
    so that several devices in one process wait for each other for ever; and its machine code may
    not suit the next host (jax issue 38445). On a GPU the algorithms that were found fastest are
    kept as well; another start might have found others.
    """
    asked = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if asked is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(expand(HOME)))
