"""Compiled programs are kept where that is sound, by processor; damaged ones are made again."""

import os
import pathlib
import re

import jax
import pytest
from conftest import python

from ngc_jax.runtime import compilation_cache
from ngc_jax.runtime.compilation_cache import HOME, keep_compiled, machine


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "_mend", lambda home: None)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("backend", "devices", "asked", "kept"),
    [
        ("cpu", 1, None, f"{HOME}/{machine()}"),
        ("cpu", 2, None, None),
        ("gpu", 1, None, HOME),
        ("gpu", 8, None, HOME),
        ("tpu", 8, None, HOME),
        ("cpu", 2, "/a", "/a"),
        ("gpu", 1, "/a", "/a"),
    ],
)
def test_where_programs_are_kept(monkeypatch, tmp_path, backend, devices, asked, kept):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.config.update("jax_compilation_cache_dir", asked)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == (kept and kept.replace("~", str(tmp_path)))


def test_other_processors_and_numbers_of_cores_have_programs_of_their_own(monkeypatch):
    assert re.fullmatch("cpu-[0-9a-f]{16}", machine())
    found = {machine(), machine()}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(97)))
    found.add(machine())
    cpuinfo = "model name\t: another\nflags\t\t: sse\ncpu MHz\t\t: {}\n"
    texts = iter([cpuinfo.format(1), cpuinfo.format(2)])
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: next(texts))
    found |= {machine(), machine()}
    assert len(found) == 3


def test_programs_that_others_may_write_are_not_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    home = tmp_path / ".cache" / "ngc_jax" / "compiled"
    home.mkdir(parents=True)
    home.chmod(0o777)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert "not kept: others may write" in capsys.readouterr().out
    home.chmod(0o700)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(home)


STARTS = """
import pathlib, jax, jax.numpy as jnp
from ngc_jax.runtime.compilation_cache import keep_compiled
keep_compiled()
home = pathlib.Path(jax.config.jax_compilation_cache_dir)

def wave(x):
    return jnp.sin(x @ x.T).sum(axis=0)

def start(spoil):
    found = list(home.glob("jit_wave-*-cache"))
    for path in found:
        path.write_bytes(spoil(path.read_bytes()))
    jax.clear_caches()
    made = jax.jit(wave)(jnp.linspace(0, 1, 64).reshape(8, 8)).tobytes()
    return made, [path.read_bytes() for path in home.glob("jit_wave-*-cache")]

first = start(None)
for spoil in (lambda x: x, lambda x: x[:len(x) // 2], lambda x: b"", lambda x: b"x" + x[1:]):
    again = start(spoil)
    print(again[0] == first[0], len(again[1]), len(again[1][0]) > 1000)
"""


def test_a_program_that_is_read_computes_the_same_and_a_damaged_one_is_made_again(tmp_path):
    where = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    done = python("-c", STARTS, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", **where)
    told = done.stdout.splitlines()
    assert [line for line in told if "damaged" not in line] == 4 * ["True 1 True"], done.stderr
    damaged = [line for line in told if "damaged" in line]
    assert len(damaged) == 3
    assert all(line.startswith("compiled program jit_wave is damaged") for line in damaged)
    assert done.stderr == ""
