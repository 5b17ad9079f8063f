"""Compiled programs are kept on accelerators, and on CPUs only where one asks for it."""

import jax
import pytest

from ngc_jax.runtime.compilation_cache import HOME, keep_compiled


@pytest.mark.parametrize(
    ("backend", "asked", "kept"),
    [
        ("cpu", None, None),
        ("gpu", None, "HOME"),
        ("tpu", None, "HOME"),
        ("cpu", "/a", "/a"),
        ("gpu", "/a", "/a"),
    ],
)
def test_where_programs_are_kept(monkeypatch, tmp_path, backend, asked, kept):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", asked)
        keep_compiled()
        expected = HOME.replace("~", str(tmp_path)) if kept == "HOME" else kept
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
