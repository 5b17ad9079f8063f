"""Compiled programs, kept on disk for the next start of the same run.

For: where they are kept, and on which devices. Not for: what is compiled.
"""

import jax

from ngc_jax.runtime.files import expand, make_private

HOME = "~/.cache/ngc_jax/compiled"


def keep_compiled() -> None:
    """Keeps what this process compiles, and uses what an earlier one kept; jax has its devices.

    Under JAX_COMPILATION_CACHE_DIR, if that is set, and then on any device. Else on accelerators
    alone, in `HOME`, if that is its user's alone: what is kept is code that will be run. XLA's CPU
    backend forgets the order of collectives in a program that it reads, so that devices of one
    process wait for each other for ever; its code may not suit the next host (jax issue 38445).
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
