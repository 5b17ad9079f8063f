"""A model that ngc_jax has trained, in PyTorch: `net = Model(FOLDER)`, `logits = net(tokens)`.

For: a folder that `ngc export --form=torch` has written, which holds a copy of this file. It needs
torch and safetensors, and not ngc_jax. Not for: text; `mark` in config.json begins a document, and
of data.tokenizer "bytes" a token is a byte. Axes: B batch, T tokens, H heads, d channels of a head.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}


class Model(torch.nn.Module):
    """The weights as parameters, {"stages/0/query": ...}, and what is computed with them."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        super().__init__()
        home = pathlib.Path(folder)
        self.config = json.loads((home / "config.json").read_text("utf-8"))
        found = {n: t for file in home.glob("*.safetensors") for n, t in load_file(file).items()}
        self.frequency = torch.nn.Buffer(found.pop("frequency"))
        self.weights = torch.nn.ParameterDict({n.replace(".", "/"): t for n, t in found.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab], those at t of token t + 1, for tokens [B, T]."""
        c, at = self.config, torch.arange(tokens.shape[1], device=tokens.device)
        distance = at[:, None] - at[None, :]
        mask = (distance.abs() < c["context"]) & ((distance >= 0) | (not c["causal"]))
        if c["boundary"] is not None:  # a token sees none of another document
            document = (tokens == c["boundary"]).cumsum(-1)
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
        x, core = self.weights["embed"][tokens], c["prelude"] + c["core"]
        for number in range(c["prelude"]):
            x = self.stage(number, x, mask, x, False)
        start = x
        for _ in range(c["rounds"] if c["core"] else 0):
            after = x
            for number in range(c["prelude"], core):
                after = self.stage(number, after, mask, start, c["route"] == "start")
            x = self.weights["keep"] * x + self.weights["drive"] * start + after - x
            x = x.tanh() if c["state_activation"] == "tanh" else x
        for number in range(core, core + c["coda"]):
            x = self.stage(number, x, mask, x, False)
        head = "embed" if c["tied"] else "unembed"
        return self.norm(x, "norm") @ self.weights[head].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        """x over its root mean square, times a scale, if the model has this norm."""
        if name not in self.weights:
            return x
        size = (x.square().mean(-1, keepdim=True) + self.config["norm_epsilon"]).sqrt()
        return x / size * self.weights[name]

    def stage(self, number: int, x: Tensor, mask: Tensor, start: Tensor, routed: bool) -> Tensor:
        """Attention, then an MLP, each added to x; if `routed`, queries and keys are of start."""
        w, home, heads = self.weights, f"stages/{number}/", self.config["heads"]
        own = self.norm(x, f"{home}attention_norm")
        other = self.norm(start, f"{home}attention_norm") if routed else own
        made = []
        for name, read in (("query", other), ("key", other), ("value", own)):
            y = read @ w[home + name].T + w.get(f"{home}{name}_bias", 0.0)
            y = y.unflatten(-1, (-1, 2 * len(self.frequency)))
            y = self.norm(y, f"{home}{name}_norm").transpose(1, 2)  # [B, H, T, d]
            y = y if name == "value" else self.turned(y)
            made.append(y.repeat_interleave(heads // y.shape[1], dim=1))
        mixed = functional.scaled_dot_product_attention(*made, attn_mask=mask)
        x = x + mixed.transpose(1, 2).flatten(2) @ w[f"{home}attention_out"].T
        read = self.norm(x, f"{home}exchange_norm")
        gate = ACTIVATIONS.get(self.config["activation"], lambda z: z)(read @ w[f"{home}gate"].T)
        return x + (gate * (read @ w[f"{home}up"].T)) @ w[f"{home}down"].T

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions on the pairs of channels (c, c + d/2) of x [B, H, T, d]."""
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
