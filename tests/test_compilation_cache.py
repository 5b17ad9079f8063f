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


def test_programs_that_others_may_write_are_not_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    home = tmp_path / ".cache" / "ngc_jax" / "compiled"
    home.mkdir(parents=True)
    home.chmod(0o777)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
        assert "not kept: others may write" in capsys.readouterr().out
        home.chmod(0o700)
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(home)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
