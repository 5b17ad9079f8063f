"""An NGC model of images of 32 x 32 pixels in colours, for an accelerator.

    python launch.py --config=configs/vision_base.py --config.data.path=cifar-10-batches-bin

It needs CIFAR-10's binary files. The tests compile its step. It has not been trained yet, so there
is no result to quote.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.kind, config.data.image_size, config.data.colours = "images", 32, 3
    config.data.path = "cifar-10-batches-bin"
    config.data.flip, config.data.shift, config.data.crop = True, 4, 0.7
    config.data.mixup, config.data.cutout = 0.2, 8
    config.model.kind, config.model.patch, config.model.readout = "vision", 4, "class"
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = (
        384,
        1024,
        8,
        8,
    )
    config.model.p_intra, config.model.p_inter = 384, 8
    config.model.prelude, config.model.core, config.model.rounds, config.model.coda = 4, 2, 2, 4
    config.model.stochastic_depth = 0.1
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 40_000, 512, 2000
    config.train.learning_rate = config.train.state_learning_rate = 2e-3
    config.train.compute_dtype, config.train.label_smoothing = "bfloat16", 0.1
    config.train.ema = 0.9995
    config.eval.every, config.eval.batch_size = 2000, 512
    config.checkpoint.every_steps = 2000
    return config
