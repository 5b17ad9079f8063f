"""Compiled programs, kept on disk for the next start of the same run.

For: where they are kept, and on which devices that is sound. Not for: what is compiled.
"""

import jax

from ngc_jax.runtime.files import expand, make_private

HOME = "~/.cache/ngc_jax/compiled"


def keep_compiled() -> None:
    """Keeps what this process compiles, and uses what an earlier one kept; jax has its devices.

    Under JAX_COMPILATION_CACHE_DIR, if that is set, and then on any device. Else on accelerators
    alone, in `HOME`. XLA's CPU backend forgets the order of collectives in a program that it reads,
    so that several devices in one process wait for each other for ever; and its machine code may
    not suit the next host (jax issue 38445). On a GPU the algorithms that were found fastest are
    kept as well; another start might have found others. What is kept is code that will be run, so
    `HOME` must be its user's alone: else nothing is kept, which is said.
    """
    asked = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if asked is None and jax.default_backend() != "cpu":
        home = expand(HOME)
        try:
            make_private(home.parent)
            make_private(home)
        except OSError as error:
            print(f"compiled programs are not kept: {error}")
        else:
            jax.config.update("jax_compilation_cache_dir", str(home))
