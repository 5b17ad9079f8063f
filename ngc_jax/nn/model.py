"""What training, evaluation and sampling need of a model, whatever it is made of.

For: the one interface that our decoder and every baseline share. Not for: what only some have
(stages, rounds): who needs that asks for a `Decoder`.
"""

from typing import Any, Protocol

import jax

from ngc_jax.data.batches import Batch

Array = jax.Array
Params = dict[str, Any]


class LanguageModel(Protocol):
    """Functions of one shape; holds no arrays. Axes: B batch, T tokens, D width, V vocabulary."""

    @property
    def shape(self) -> Any:
        """Sizes: a frozen dataclass with `vocab`."""

    def init(self, key: Array) -> Params:
        """Parameters, float32."""

    def param_info(self) -> Params:
        """The record (`core/params.py`) of each parameter, as a tree parallel to them."""

    def embed(self, params: Params, batch: Batch) -> Array:
        """The stream [B, T, D] of what a batch gives to read."""

    def apply(self, params: Params, batch: Batch, record: bool = False) -> tuple[Array, Any]:
        """Logits [B, T, V] in float32; and the records of rounds, where there are any and asked."""

    def decode(
        self, params: Params, tokens: Array, cache: Any, position: Array
    ) -> tuple[Array, Any]:
        """Logits [B, T, V] for tokens at `position` and after, with what came before in `cache`."""

    def unstack(self, params: Params) -> Params:
        """The same parameters laid out so that `decode` reads them soonest."""

    def init_cache(self, batch: int, length: int, dtype: Any = ...) -> Any:
        """What `decode` starts from, for `length` tokens."""

    def generated(self) -> dict[str, dict[str, int]]:
        """Weights generated in a forward pass, {stack: {synapse: count}}; {}: all are stored."""
