"""Loss spikes: the moving statistics, and an update that is not made because of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.training import monitors as spikes


def test_the_moving_mean_and_deviation_are_the_numpy_ones():
    losses = np.random.default_rng(0).normal(3.0, 0.5, 2 * spikes.LOSSES_HORIZON)
    (_, memory), mean, variance = spikes.begin(), 0.0, 0.0
    for i, loss in enumerate(losses):
        share = 1 / min(i + 1, spikes.LOSSES_HORIZON)
        variance = (1 - share) * variance + share * (1 - share) * (loss - mean) ** 2
        mean = (1 - share) * mean + share * loss
        memory = jax.jit(spikes.remember)(memory, jnp.float32(loss))
        if i + 1 == spikes.LOSSES_HORIZON:  # plain statistics until then
            np.testing.assert_allclose(
                (mean, variance), (losses[: i + 1].mean(), losses[: i + 1].var()), rtol=1e-6
            )
    assert int(memory.seen) == len(losses)
    np.testing.assert_allclose((memory.mean, memory.variance), (mean, variance), rtol=1e-4)


@pytest.mark.parametrize(
    ("seen", "loss", "verdict"), [(63, 99.0, False), (64, 5.9, False), (64, 6.1, True)]
)
def test_a_spike_is_so_many_deviations_above_the_mean_once_enough_was_seen(seen, loss, verdict):
    memory = spikes.Losses(jnp.float32(3.0), jnp.float32(0.25), jnp.int32(seen))
    assert bool(spikes.spiked(memory, jnp.float32(loss), 6.0)) is verdict
