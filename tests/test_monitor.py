"""The early warning: its arithmetic, what it stays silent on, and what a user reads of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import launch

from ngc_jax.training import monitors as monitor


def feed(values):
    (memory, _), warnings = monitor.begin(), []
    for value in values:
        memory, warning = jax.jit(monitor.warn)(memory, jnp.float32(value))
        warnings.append(float(warning))
    return warnings


def test_the_warning_is_the_moving_geometric_mean_over_the_threshold():
    values = np.random.default_rng(0).uniform(0.001, 0.1, 50)
    level, expected = 0.0, []
    for i, value in enumerate(values):
        level += (np.log(value) - level) / min(i + 1, monitor.HORIZON)
        expected.append(level - np.log(monitor.THRESHOLD))
    np.testing.assert_allclose(feed(values), expected, atol=1e-5)


def test_skipped_updates_change_nothing():
    assert feed([0.01, 0.0, float("nan"), float("inf")])[1:] == [feed([0.01])[0]] * 3
    assert feed([0.0])[0] == -np.inf


@pytest.mark.slow
def test_a_run_that_will_not_end_well_is_told_so_once_and_a_sound_one_is_not(tiny_flags, tmp_path):
    sound = launch(*tiny_flags, f"--workdir={tmp_path / 'sound'}")
    assert sound.returncode == 0, sound.stderr
    assert "divergence likely" not in sound.stdout
    rate = "--config.train.learning_rate=2.0", "--config.train.state_learning_rate=2.0"
    wild = launch(*tiny_flags, *rate, f"--workdir={tmp_path / 'wild'}")
    assert wild.stdout.count("divergence likely: the parameters change by") == 1
