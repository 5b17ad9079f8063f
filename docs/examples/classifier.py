"""NGCDense in a Flax classifier of your own: python classifier.py"""

import flax.linen as nn
import jax
import optax

from ngc_jax.nn import NGCDense


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(NGCDense(64, groups=4, rule="addressed", ports=2)(x))
        return nn.Dense(2)(x)


def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


x = jax.random.normal(jax.random.key(0), (1000, 8))
y = (x[:, 0] * x[:, 1] > 0).astype(int)  # do the first two numbers have the same sign?
model, adam, gradient = Classifier(), optax.adam(0.01), jax.jit(jax.grad(loss))
params = model.init(jax.random.key(1), x)
state = adam.init(params)
for _ in range(200):
    updates, state = adam.update(gradient(params), state)
    params = optax.apply_updates(params, updates)
print(f"accuracy {(model.apply(params, x).argmax(-1) == y).mean():.3f}")
