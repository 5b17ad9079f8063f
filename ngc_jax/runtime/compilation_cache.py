"""Compiled programs, kept on disk for the next start of the same run.

For: where they are kept, and on which devices. Not for: what is compiled.
"""

import jax

from ngc_jax.runtime.files import expand, make_private

HOME = "~/.cache/ngc_jax/compiled"


def keep_compiled() -> None:
    """Keeps what this process compiles, and uses what an earlier one kept; jax has its devices.

    Under JAX_COMPILATION_CACHE_DIR, if set, on any device. Else on accelerators alone, in `HOME`,
    if private: it is code that will be run. XLA's CPU backend loses the order of collectives in a
    program that it reads, so that devices wait for each other for ever (jax issue 38445).
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
