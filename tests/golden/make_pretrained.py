"""How pretrained_*.npz were made: the published code of five kinds of models, tiny, on random
weights.

For: the configs and seeds, and the script that ran the reference. Not for: the tests' own runs,
which need no PyTorch.

    python tests/golden/make_pretrained.py  # with torch 2.13.0 (CPU), transformers 5.24.0

A file holds the tensors under their published names, in float16, which holds these values exactly;
"config", the text of config.json; "tokens" [2, 24]; and "logits" [2, 24, 64] of evaluation mode,
with float64 parameters, kept in float32. What the reference computes in float32 whatever the
parameters' dtype stays so: norms, softmax and rotary angles.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
VOCAB, STD = 64, 0.3
ALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
ALL |= {"max_position_embeddings": 128, "attn_implementation": "eager"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    # Grouped-query attention and a tied head, as in SmolLM2
    "llama": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    # Neither; scaled frequencies: of the four, one stays, one is between, two are divided
    "llama3": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": LLAMA3,
    },
    # Biases of query, key and value
    "qwen2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # Norms of queries and keys; heads wider than width / heads
    "qwen3": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # A window shorter than the text
    "mistral": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "sliding_window": 7,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def main():
    import torch
    import transformers as t

    classes = {"llama": t.LlamaForCausalLM, "llama3": t.LlamaForCausalLM}
    classes |= {"qwen2": t.Qwen2ForCausalLM, "qwen3": t.Qwen3ForCausalLM}
    classes |= {"mistral": t.MistralForCausalLM}
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        draw, of = np.random.RandomState(seed + 20), classes[name]
        model = of(of.config_class(**ALL | fields)).eval().double()
        tensors = {}
        for key, parameter in sorted(model.named_parameters()):  # a tied head is not among them
            centre = 1.0 if parameter.ndim == 1 and "norm" in key else 0.0
            drawn = centre + STD * draw.standard_normal(parameter.shape)
            tensors[key] = drawn.astype(np.float16)
            parameter.data = torch.tensor(tensors[key].astype(float))
        tokens = draw.randint(0, VOCAB, (2, 24))
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.numpy().astype(np.float32)
        config = model.config.to_diff_dict() | {"architectures": [of.__name__]}
        made = {"tokens": tokens.astype(np.uint8), "logits": logits, "config": json.dumps(config)}
        np.savez_compressed(HERE / f"pretrained_{name}.npz", **tensors, **made)
        print(name, logits.std(), config)
    print(torch.__version__, t.__version__)


if __name__ == "__main__":
    main()
