"""A small NGC model on Fashion-MNIST: 60,000 images to train on and 10,000 held out, 28 x 28.

    apt-get install dataset-fashion-mnist
    python launch.py --config=configs/vision_small.py

Where the four IDX files lie elsewhere: --config.data.path=FOLDER. It has not been trained to its
end yet, so there is no result to quote.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.kind, config.data.image_size = "images", 28
    config.data.path = "/usr/share/datasets/fashion-mnist"
    config.data.flip, config.data.shift = True, 2
    config.model.kind, config.model.patch = "vision", 4
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = 64, 128, 4, 4
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 6000, 128, 200
    config.train.learning_rate = config.train.state_learning_rate = 5e-3
    config.train.ema = 0.999
    config.eval.every, config.eval.windows, config.eval.batch_size = 1000, 2000, 200
    config.checkpoint.every_steps = 1000
    config.stability.every = 0
    return config
