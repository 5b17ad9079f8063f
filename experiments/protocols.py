"""The models of the comparison, and the protocols: data, length and sizes of training.

For: tables that a reader can check, and the sizes that follow from them. Not for: running or
reporting (`compare.py`).
"""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

import ngc_jax
from ngc_jax.config import model_shape, named, reset_unread
from ngc_jax.training.match_size import prepare

DENSE = {"model.rule": "dense", "unlooped": True}
LOW_RANK = {"model.rule": "broadcast", "model.p_intra": 0, "model.match_by": "p_inter"}
CLASSIC = {"model.exchange_activation": "none", "model.qk_norm": False}
STILL = {"stability.every": 0}
# the faster form for these; the other models form their weights first
SIGNALS = {"model.form": "signals"}
# The fields that differ from the protocol's config. "rate": the learning rate in the middle of
# those tried. "unlooped": as many stages as the config runs, each with its own states, no loop.
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"rate": 1e-2, "model.wiring": "others"},
    "NGC unlooped": {"rate": 1e-2, "model.wiring": "others", "unlooped": True},
    "dense": {"rate": 5e-3, **DENSE},
    "encapsulated": {"rate": 5e-3, **DENSE, "model.gates": True},
    "dense looped": {"rate": 5e-3, "model.rule": "dense"},
    "low rank": {"rate": 3e-3, **LOW_RANK, **SIGNALS},
    "Basis Sharing": {
        "rate": 3e-3,
        **DENSE,
        **LOW_RANK,
        **SIGNALS,
        "model.sharing": "depth2,readers",
    },
    "CoLA": {"rate": 5e-3, **DENSE, **LOW_RANK, **CLASSIC, "model.message_activation": "silu"},
    "block-diagonal": {"rate": 1e-2, "model.rule": "none", **SIGNALS},
    "BDH": {
        "rate": 5e-3,
        "model.kind": "bdh",
        "model.width": 64,
        "model.hidden": 1024,
        "model.rounds": 4,
        **STILL,
    },
}
SIZES = ("NGC", "dense")  # models of all sizes
SOURCE = pathlib.Path(ngc_jax.__file__).parent  # a short text, for a short run


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Data, length and sizes of training."""

    common: dict[str, Any]  # fields of every run
    # fraction of dense's parameters, "0.32", or FLOPs, "1:flops" -> models; () means all
    shares: dict[str, tuple[str, ...]]
    # multiples of a model's learning rate that are tried; a single one is used without a trial
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    # length of a trial, relative to a full run: much shorter trials prefer too high rates
    tuning: float = 0.8
    measured: bool = True  # whether time and peak memory of an update are measured
    p_inter: int = 2  # numbers in a port of NGC
    config: str = "defaults"  # of configs/: the fields that a model does not set
    dense: str = "dense_small"  # of configs/: the model that fractions refer to
    needs_path: bool = False  # whether the text must be given

    @property
    def only_dense(self) -> "Protocol":
        """The same protocol with only the dense model, at its own size."""
        return dataclasses.replace(self, shares={"1": ("dense",)})


PROTOCOLS = {
    "smoke": Protocol(
        {
            "train.steps": 10,
            "train.warmup_steps": 2,
            "train.batch_size": 4,
            "data.context": 32,
            "data.path": str(SOURCE),
            **STILL,
        },
        shares={"0.25": ()},
        factors=(1.0,),
        measured=False,
    ),
    # At 1:flops the dense model is dense_small itself.
    "small": Protocol({}, shares={"0.12": SIZES, "0.22": SIZES, "0.32": (), "1:flops": ()}),
    # nanoGPT's setting for a CPU (4 layers of width 128, context 64, 12 x 64 x 2,000 tokens: loss
    # 1.88) with four times its tokens. The first size has 250,000 parameters in matrices.
    "shakespeare_cpu": Protocol(
        {"data.context": 64, "train.batch_size": 48, "train.steps": 2000, "eval.windows": 0},
        shares={"0.29": (), "1": ("NGC", "dense")},
        needs_path=True,
    ),
    # nanoGPT's setting for a GPU (6 layers of width 384, context 256, 64 x 256 x 5,000 tokens: loss
    # 1.4697 with 10.65 M parameters): 1.06 M parameters, a tenth of that, and dense at that size.
    "shakespeare_gpu": Protocol(
        {
            "data.context": 256,
            "model.core": 2,
            "train.batch_size": 64,
            "train.steps": 5000,
            "train.compute_dtype": "bfloat16",
            "train.weight_decay": 0.3,
        },
        shares={"1.24": (), "12.5": ("dense",)},
        needs_path=True,
    ),
    # A billion tokens of Wikipedia.
    "base": Protocol(
        {"train.steps": 2000},
        shares={"0.19": (), "0.32": SIZES, "1": ("dense",)},
        p_inter=8,
        config="ngc_base",
        dense="dense_base",
    ),
}


@dataclasses.dataclass(frozen=True)
class Sized:
    """One model at one size."""

    model: str
    share: str
    rate: float  # the learning rate in the middle of those tried
    fields: dict[str, Any]  # that differ from the protocol's config
    config: ConfigDict  # with solved sizes


def sized(protocol: Protocol, chosen: list[str], path: str = "") -> list[Sized]:
    """The models of a protocol at their sizes, with widths solved.

    `path`: the text; "" means the protocol's own. Raises UserError if a size cannot be met.
    """
    found = []
    for share, models in protocol.shares.items():
        for model in (name for name in chosen if name in (models or MODELS)):
            config = named(protocol.config)
            fields = {
                **protocol.common,
                **MODELS[model],
                "model.match": f"{protocol.dense}:{share}",
            }
            rate = fields.pop("rate")
            if model.startswith("NGC"):
                fields["model.p_inter"] = protocol.p_inter
            if path:
                fields["data.path"] = path
            # in a dense model, gates act on heads
            if fields.get("model.rule") == "dense":
                fields["model.groups"] = config.model.heads
            if fields.pop("unlooped", False):
                config.update_from_flattened_dict(protocol.common)
                depth = model_shape(config, 1).depth
                fields |= {"model.prelude": depth, "model.core": 0, "model.coda": 0}
            config.update_from_flattened_dict(fields)
            fields |= reset_unread(config)
            prepare(config)
            found.append(Sized(model, share, rate, fields, config))
    return found
