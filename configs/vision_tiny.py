"""A small NGC model on handwritten digits: scikit-learn's 1,797 images of 8 x 8 pixels.

    python launch.py --config=configs/vision_tiny.py

28,560 parameters, 27,392 of them in matrices. It needs pip install 'ngc_jax[vision]'. 98.2% of the
held-out images are right, the mean of five seeds (97.8% to 98.9%, docs/vision.md), after 80 to 90
seconds of processor time.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.kind, config.data.validation_fraction = "images", 0.2
    config.data.shift, config.data.crop = 1, 0.9
    config.model.kind, config.model.patch = "vision", 2
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = 32, 64, 4, 4
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 2000, 64, 50
    config.train.label_smoothing, config.train.ema, config.train.log_every = 0.1, 0.99, 100
    config.eval.every, config.eval.windows, config.eval.batch_size = 500, 0, 120
    config.checkpoint.every_steps = 500
    config.stability.every = 0
    return config
