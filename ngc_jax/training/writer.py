"""A text that a model reads and continues, token by token: `Writer`.

For: sampling text as it is made, stop strings, a text longer than the window. Not for: how a token
is drawn (`nn/sampling.py`), or the command line (`commands/sample.py`).
"""

import codecs
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.nn import sampling as draws
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.sampling import Sampling
from ngc_jax.runtime import fields
from ngc_jax.training.evaluation import at_rounds
from ngc_jax.training.step import cast

if TYPE_CHECKING:
    from ngc_jax.training.load import Trained

_laid = jax.jit(lambda model, params: model.unstack(params), static_argnums=0)
_begun = jax.jit(draws.begin, static_argnums=(0, 1, 2, 3))
_read = jax.jit(draws.read, static_argnums=0, donate_argnums=2)
_write = jax.jit(draws.write, static_argnums=0, donate_argnums=2)


def sampled(*, tokens: int, seed: int, stop: Sequence[str], **given: Any) -> Sampling:
    """How tokens are drawn, by fields of `Sampling`. Raises UserError for a value out of range."""
    strays = {*given} - {*Sampling._fields}
    if strays:
        raise TypeError(f"no fields of Sampling: {', '.join(sorted(strays))}")
    drawn = Sampling(**given)
    need = fields.refusals({"tokens": tokens, "seed": seed, "stop": stop} | drawn._asdict())
    need(tokens >= 1, "tokens", "1 or more")
    need(drawn.temperature >= 0, "temperature", "0 or more, for instance 0.8")
    need(0 < drawn.top_p <= 1, "top_p", "above 0 and at most 1, for instance 0.95")
    need(drawn.top_k >= 0, "top_k", "0, for all, or more, for instance 40")
    need(0 <= drawn.min_p <= 1, "min_p", "from 0 to 1, for instance 0.05")
    need(drawn.repetition_penalty > 0, "repetition_penalty", "above 0, for instance 1.1")
    need(0 <= seed < 2**32, "seed", "from 0 to 4,294,967,295")
    need(not isinstance(stop, str) and all(stop), "stop", "strings that are not empty")
    return drawn


class Writer:
    """A text, [] at first, that `read` and `write` make longer; holds what is computed of it.

    A decoder is asked for no more tokens at a time than it was trained on, `data.context`: where
    the window is full, its end is read again as the beginning of a new one. Raises UserError for
    `rounds` that the model cannot have.
    """

    def __init__(self, trained: "Trained", rounds: int | None = None):
        self.model, _ = at_rounds(trained.model, trained.config, rounds)
        self.tokenizer, config = trained.tokenizer, trained.config
        dtype = jnp.dtype(config.train.compute_dtype)
        self.params = _laid(self.model, cast(trained.params, dtype))
        bounded = isinstance(self.model, Decoder)  # others keep as much of any length
        self.room = max(2, int(config.data.context)) if bounded else 0
        self.begin = partial(_begun, self.model, 1, self.room or 1, dtype)
        self.clear()

    def clear(self) -> None:
        """Begins anew, with no text."""
        self.heard, self.text = self.begin(), list[int]()  # of the window: its tokens

    def read(self, tokens: Sequence[int] | np.ndarray, ahead: int = 1, whole: bool = True) -> None:
        """Reads tokens; of what fills a window, its end, so that `ahead` more have room there.

        whole: by one program of this length; else by few that serve all lengths.
        """
        left = [int(token) for token in tokens]
        if self.room and len(self.text) + len(left) >= self.room:
            kept = max(1, self.room // 2, self.room - ahead)
            left = [*self.text, *left][-kept:]
            self.clear()
        self.text += left
        while left:
            size = len(left) if whole else 1 << (len(left).bit_length() - 1)
            self.heard = _read(self.model, self.params, self.heard, jnp.asarray([left[:size]]))
            left = left[size:]

    def write(
        self,
        count: int,
        sampling: Sampling,
        seed: int = 0,
        stop: Sequence[str] = (),
        one_document: bool = False,
    ) -> Iterator[str]:
        """Text of at most `count` tokens more, in pieces, as soon as each is known.

        It ends before the first of the strings `stop`, and of `one_document` at its end.
        Undecodable bytes are U+FFFD.
        """
        made, text = list[int](), ""
        decoder, key = codecs.getincrementaldecoder("utf-8")("replace"), jax.random.key(seed)
        drawn = Sampling(*map(jnp.asarray, sampling))
        for number in range(count):
            if self.room:
                self.read([], self.room // 2, whole=False)  # where the window is full
            given = self.model, self.params, self.heard, key, jnp.int32(number), drawn
            token, self.heard = _write(*given)
            made.append(int(np.asarray(token)[0]))
            self.text.append(made[-1])
            if one_document and made[-1] == self.tokenizer.mark:
                break
            before, both = (self.tokenizer.decode(made[-2:end]) for end in (-1, None))
            text += decoder.decode(both[len(before) :])
            if found := [text.index(one) for one in stop if one in text]:
                yield text[: min(found)]
                return
            known = len(text) - _begins(text, stop)
            if known:
                yield text[:known]
            text = text[known:]
        if text := text + decoder.decode(b"", final=True):
            yield text


def _begins(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of these strings."""
    most = max(map(len, stop), default=1) - 1
    ends = range(min(most, len(text)), 0, -1)
    return next((n for n in ends if any(one.startswith(text[-n:]) for one in stop)), 0)
