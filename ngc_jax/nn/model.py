"""What training, evaluation and sampling need of a model, whatever it is made of.

For: the one interface that our decoder and every baseline share. Not for: what only some have
(stages, rounds): who needs that asks for a `Decoder`.
"""

from typing import Any, Protocol

import jax

Array = jax.Array
Params = dict[str, Any]


class LanguageModel(Protocol):
    """Functions of one shape; holds no arrays. Axes: B batch, T tokens, V vocabulary."""

    @property
    def shape(self) -> Any:
        """Sizes: a frozen dataclass with `vocab`."""

    def init(self, key: Array) -> Params:
        """Parameters, float32."""

    def apply(
        self, params: Params, tokens: Array, segments: Array | None = None, record: bool = False
    ) -> tuple[Array, Any]:
        """Logits [B, T, V] in float32 for tokens [B, T]; and, where there are rounds and it is
        asked, their records.
        """

    def decode(
        self, params: Params, tokens: Array, cache: Any, position: Array
    ) -> tuple[Array, Any]:
        """Logits [B, T, V] for tokens that stand at `position` and after, with what came before in
        `cache`.
        """

    def unstack(self, params: Params) -> Params:
        """The same parameters laid out so that `decode` reads them soonest."""

    def init_cache(self, batch: int, length: int, dtype: Any = ...) -> Any:
        """What `decode` starts from, for `length` tokens."""

    def generated(self) -> dict[str, dict[str, int]]:
        """Weights generated in a forward pass, {name of a stack: {synapse: how many}}; {} where all
        are stored.
        """
