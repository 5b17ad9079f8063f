"""An NGC language model for an accelerator or a pod slice.

    python launch.py --config=configs/ngc_base.py

120 M parameters (53 M in matrices, 67 M in embeddings) generate 283 M weights. It needs English
Wikipedia, prepared by TFDS as ArrayRecord (another set: --config.data.tfds_name=...). The tests
compile its step. It has not been trained yet, so there is no result to quote.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.tfds_name = "wiki40b/en"
    config.data.tokenizer, config.data.vocab_size = "bpe", 32_768
    config.data.context = 1024
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = (
        1024,
        2816,
        16,
        16,
    )
    config.model.p_intra, config.model.p_inter = 1024, 8
    config.model.prelude, config.model.core, config.model.rounds, config.model.coda = 5, 6, 2, 5
    config.train.steps, config.train.warmup_steps = 20_000, 1000
    config.model.remat = "stages"
    config.train.batch_size, config.train.accumulation = 512, 32  # 0.5 M tokens
    config.train.learning_rate = config.train.state_learning_rate = 2e-3
    config.train.b2 = 0.95
    config.train.compute_dtype = "bfloat16"
    config.eval.every, config.eval.batch_size = 1000, 16
    config.checkpoint.every_steps = 1000
    return config
