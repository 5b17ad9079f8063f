"""How bdh.json and cola.json were made: the published code, run on weights that the tests can make
again.

For: the seeded weights and inputs, which `test_baselines.py` imports, and the script that ran the
references. Not for: the tests' own runs, which need neither reference nor PyTorch.

    git clone https://github.com/pathwaycom/bdh      # at 714bc800631e7bffc0946768f4f3c77d25a68ca4
    git clone https://github.com/alvin-zyl/CoLA      # at 91ff0d10809181c6ca430a596c18aea3590cbd24
    PYTHONPATH=bdh:CoLA python tests/golden/make.py  # with torch 2.15.0 (CPU), transformers 4.47.1

The references run in evaluation mode (no dropout) with float64 parameters; what they compute in
float32 whatever the parameters' dtype stays so (both: rotary angles; CoLA: norms and softmax).
Logits are kept for some columns only.
"""

import json
import pathlib
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
BDH = {"n_layer": 3, "n_embd": 32, "n_head": 4, "mlp_internal_dim_multiplier": 4, "vocab_size": 256}
# of all parameters: the published one, and one that weighs each term more
BDH_STD = {"published": 0.02, "large": 0.3}
BDH_COLUMNS = 32  # every 32nd logit is kept
COLA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "rank": 6,
}
COLA |= {"num_attention_heads": 4}
COLA_COLUMNS = 5
COLA_LAYER = {"in_features": 12, "out_features": 20, "rank": 5}


def tokens(vocab, batch=2, length=40):
    """Inputs [B, T] and targets [B, T]."""
    drawn = np.random.RandomState(0).randint(0, vocab, (batch, length + 1))
    return drawn[:, :-1], drawn[:, 1:]


def bdh_weights(std):
    """Parameters by their published names, drawn in this order."""
    c, draw = types.SimpleNamespace(**BDH), np.random.RandomState(1)
    neurons = c.mlp_internal_dim_multiplier * c.n_embd // c.n_head
    shapes = {
        "embed.weight": (c.vocab_size, c.n_embd),
        "encoder": (c.n_head, c.n_embd, neurons),
        "encoder_v": (c.n_head, c.n_embd, neurons),
        "decoder": (c.n_head * neurons, c.n_embd),
        "lm_head": (c.n_embd, c.vocab_size),
    }
    return {name: std * draw.standard_normal(shape) for name, shape in shapes.items()}


def cola_weights():
    """Parameters by their published names, drawn in this order."""
    c, draw = types.SimpleNamespace(**COLA), np.random.RandomState(2)
    d, f = c.hidden_size, c.intermediate_size
    weights = {"model.embed_tokens.weight": draw.standard_normal((c.vocab_size, d))}
    for layer in range(c.num_hidden_layers):
        start = f"model.layers.{layer}."
        square = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        tall = {"mlp.gate_proj": (d, f), "mlp.up_proj": (d, f), "mlp.down_proj": (f, d)}
        for name, (n_in, n_out) in (square | tall).items():
            weights[f"{start}{name}.cola_a"] = 0.3 * draw.standard_normal((n_in, c.rank))
            weights[f"{start}{name}.cola_b"] = 0.5 * draw.standard_normal((c.rank, n_out))
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{start}{name}.weight"] = 1 + 0.2 * draw.standard_normal(d)
    weights["model.norm.weight"] = 1 + 0.2 * draw.standard_normal(d)
    weights["lm_head.weight"] = 0.2 * draw.standard_normal((c.vocab_size, d))
    return weights


def cola_layer():
    """x [7, n_in], A [n_in, r] and B [r, n_out] of one layer, without bias as in the published
    configs.
    """
    c, draw = types.SimpleNamespace(**COLA_LAYER), np.random.RandomState(3)
    shapes = (7, c.in_features), (c.in_features, c.rank), (c.rank, c.out_features)
    return tuple(draw.standard_normal(shape) for shape in shapes)


def main():
    import bdh
    import torch
    from cola import ColaConfig, ColaForCausalLM
    from cola.cola_layer import ColaLayer

    def fill(model, weights):
        named = dict(model.named_parameters())
        assert set(named) == set(weights), set(named) ^ set(weights)
        for name, parameter in named.items():
            assert parameter.shape == weights[name].shape, name
            parameter.data = torch.tensor(weights[name])

    def kept(array, columns):
        return np.round(array.detach().numpy()[..., ::columns].astype(float), 8).tolist()

    runs = {}
    for name, std in BDH_STD.items():
        model = bdh.BDH(bdh.BDHConfig(**BDH, dropout=0.0)).eval()
        fill(model, bdh_weights(std))
        logits, loss = model(*(torch.tensor(t) for t in tokens(BDH["vocab_size"])))
        loss.backward()
        norms = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
        runs[name] = {
            "logits": kept(logits, BDH_COLUMNS),
            "loss": loss.item(),
            "gradient_norms": norms,
        }
    header = f"github.com/pathwaycom/bdh at 714bc800, BDHConfig({BDH}), parameters of std {BDH_STD}"
    write("bdh", header, runs)

    runs = {}
    for name, only in (("low_rank_activation_only", True), ("both_activations", False)):
        config = ColaConfig(**COLA, hidden_act="silu", rms_norm_eps=1e-6, only_lr_act=only)
        model = ColaForCausalLM(config).eval()
        fill(model, cola_weights())
        logits = model(torch.tensor(tokens(COLA["vocab_size"])[0])).logits
        runs[name] = {"logits": kept(logits, COLA_COLUMNS)}
    x, a, b = cola_layer()
    layer = ColaLayer(**COLA_LAYER, bias=False)
    fill(layer, {"cola_a": a, "cola_b": b})
    runs["layer"] = {"y": kept(layer(torch.tensor(x)), 1)}
    header = f"github.com/alvin-zyl/CoLA at 91ff0d10, ColaConfig({COLA}), ColaLayer({COLA_LAYER})"
    write("cola", header, runs)


def write(name, header, runs):
    made = "torch 2.15.0 on a CPU, evaluation mode, float64 parameters"
    about = f"Made by make.py beside this file: {header}. {made}."
    text = (
        json.dumps({"about": about, **runs}, indent=0)
        .replace(",\n", ", ")
        .replace("[\n", "[")
        .replace("\n]", "]")
    )
    (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
