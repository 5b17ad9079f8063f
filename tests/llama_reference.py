"""The forward pass of the Llama family in NumPy: a second reference, written from the papers.

For: logits of Llama, Mistral, Qwen2 and Qwen3 from tensors under their published names. Not for:
speed, caches, or anything that the package itself could be compared with by sharing code.
"""

import numpy as np


def frequencies(config, head):
    """Radians that a token turns each pair of channels by [head / 2] (arXiv 2104.09864)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config["rope_theta"]
    turns = base ** (-np.arange(0, head, 2) / head)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":  # arXiv 2306.15595
        return turns / rope["factor"]
    if kind == "llama3":  # long waves are stretched, short ones stay, those between are mixed
        rounds = rope["original_max_position_embeddings"] * turns / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((rounds - low) / (high - low), 0, 1)
        return turns * (keep + (1 - keep) / rope["factor"])
    assert kind == "default", kind
    return turns


def rotate(x, turns):
    """x [B, T, heads, d], whose channel i pairs with i + d / 2."""
    angles = np.arange(x.shape[1])[:, None, None] * turns
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(config, tensors, tokens, dtype=np.float64):
    """Logits [B, T, V] of tokens [B, T]; tensors[name] is an array of the published shape."""

    def get(name):
        return np.asarray(tensors[name], dtype)

    def norm(x, name):
        size = np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"]
        return x / np.sqrt(size) * get(name)

    def linear(x, name):
        y = x @ get(f"{name}.weight").T
        return y + get(f"{name}.bias") if f"{name}.bias" in tensors else y

    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or width // heads
    turns = frequencies(config, head).astype(dtype)
    x = get("model.embed_tokens.weight")[tokens]
    batch, length = tokens.shape
    back = np.arange(length)[:, None] - np.arange(length)
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    seen = (back >= 0) & (back < (window or length))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (linear(y, f"{at}.self_attn.{n}_proj") for n in "qkv")
        q, k, v = (one.reshape(batch, length, -1, head) for one in (q, k, v))
        if f"{at}.self_attn.q_norm.weight" in tensors:
            q = norm(q, f"{at}.self_attn.q_norm.weight")
            k = norm(k, f"{at}.self_attn.k_norm.weight")
        q, k = rotate(q, turns), rotate(k, turns)
        k, v = (np.repeat(one, heads // one.shape[2], axis=2) for one in (k, v))
        score = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(dtype(head))
        score = np.where(seen, score, -np.inf)
        share = np.exp(score - score.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bhts,bshd->bthd", share, v).reshape(batch, length, -1)
        x = x + linear(mixed, f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = linear(y, f"{at}.mlp.gate_proj"), linear(y, f"{at}.mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}.mlp.down_proj")
    x = norm(x, "model.norm.weight")
    tied = "model.embed_tokens" if "lm_head.weight" not in tensors else "lm_head"
    return x @ get(f"{tied}.weight").T
