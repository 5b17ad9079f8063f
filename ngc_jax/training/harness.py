"""A run in lm-evaluation-harness: `python -m ngc_jax.training.harness run --model ngc_jax ...`.

For: `Harness`, which answers the three requests of the harness for any run that reads text; it is
importable without the harness. Not for: tasks, or our own held-out loss (`evaluation.py`).
"""

import dataclasses
import functools
import runpy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.data import NOTHING
from ngc_jax.nn.sampling import Sampling
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError, fail
from ngc_jax.training.evaluation import at_rounds
from ngc_jax.training.load import load
from ngc_jax.training.step import nats_of
from ngc_jax.training.writer import Writer

try:
    from lm_eval.api.model import LM
except ImportError:  # the harness asks, and is not asked
    LM = object

Part = tuple[int, np.ndarray, int]  # of which request, tokens, how many of the last are predicted


class Harness(LM):
    """A run, by model_args: workdir=DIR, and if wanted step=, rounds=, extend=FILE.py.

    A text begins with a document's mark. All is computed in windows of data.context tokens, so that
    each program is compiled once. Raises UserError for a run that reads no text, or rounds without
    a loop.
    """

    def __init__(
        self,
        workdir: Any,
        step: int | None = None,
        rounds: int | None = None,
        batch_size: Any = 16,
        extend: str = "",
        **others: Any,  # device and more, which are not ours
    ) -> None:
        super().__init__()
        if extend:
            runpy.run_path(str(files.place(extend)))
        run = load(str(workdir), step)
        run.encode("")  # refuses the model of a task
        self.run = dataclasses.replace(run, model=at_rounds(run.model, run.config, rounds)[0])
        self.context, self.size = int(run.config.data.context), _size(batch_size)

    def loglikelihood(self, requests: list[Any], **how: Any) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, as a log, and whether it is likeliest."""

        def parts() -> Iterator[Part]:
            for number, (context, text) in enumerate(request.args for request in requests):
                row, own = self.run.encode(context + text), self.run.encode(context)
                both = min(len(row), len(own))  # a token of both is the continuation's
                asked = len(row) - int(np.argmin(np.append(row[:both] == own[:both], False)))
                while asked:  # with as much before it as a window holds
                    count = min(asked, self.context)
                    yield number, row[-self.context - 1 :], count
                    row, asked = row[:-count], asked - count

        return self._scores(parts(), len(requests))

    def loglikelihood_rolling(self, requests: list[Any], **how: Any) -> list[float]:
        """Nats of each text, as a log, in windows that lie as those of `ngc evaluate`."""

        def parts() -> Iterator[Part]:
            for number, request in enumerate(requests):
                row = self.run.encode(request.args[0])
                for first in range(0, len(row) - 1, self.context):
                    own = row[first : first + self.context + 1]
                    yield number, own, len(own) - 1

        return [total for total, _ in self._scores(parts(), len(requests))]

    @functools.cached_property
    def writer(self) -> Writer:
        """What writes the answers, one after another."""
        return Writer(self.run)

    def generate_until(self, requests: list[Any], **how: Any) -> list[str]:
        """What follows each context, up to a stop string, a document's end or max_gen_toks."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, how: dict[str, Any]) -> str:
        until, count = how.get("until") or [], int(how.get("max_gen_toks", 256))
        warm = float(how.get("temperature", 1.0)) if how.get("do_sample") else 0.0
        drawn = Sampling(warm, how.get("top_p", 1.0), how.get("top_k", 0), how.get("min_p", 0.0))
        self.writer.clear()
        self.writer.read(self.run.encode(context), count, whole=False)
        stop = [until] if isinstance(until, str) else [one for one in until if one]
        return "".join(self.writer.write(count, drawn, stop=stop, one_document=True))

    def _scores(self, parts: Iterable[Part], count: int) -> list[tuple[float, bool]]:
        """The logs of probability, by request, and whether all its tokens are the likeliest."""
        total, likeliest, left = np.zeros(count), np.ones(count, bool), [*parts]
        for first in range(0, len(left), self.size):
            tokens = np.full((self.size, self.context + 1), self.run.tokenizer.mark, np.int32)
            targets = np.full((self.size, self.context), NOTHING, np.int32)
            chosen = left[first : first + self.size]
            for place, (_, row, asked) in enumerate(chosen):
                end = len(row) - 1
                tokens[place, : len(row)], targets[place, end - asked : end] = row, row[-asked:]
            logits = self.run.logits(tokens[:, :-1])
            nats, counts = jax.device_get(nats_of(logits, jnp.asarray(targets)))
            right = np.asarray(jnp.argmax(logits, -1)) == targets
            for place, (number, *_) in enumerate(chosen):
                total[number] -= np.sum(nats[place], where=counts[place], dtype=np.float64)
                likeliest[number] &= right[place][counts[place]].all()
        return [(float(one), bool(other)) for one, other in zip(total, likeliest, strict=True)]


def _size(given: Any) -> int:
    """Windows at a time; "auto", as the harness may ask, is 16."""
    return int(given) if str(given).isdecimal() and int(given) else 16


def main() -> None:
    """The command line of the harness, which knows --model ngc_jax."""
    if LM is object and {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        sys.exit(0)
    try:
        import lm_eval.models  # noqa: F401 (else it would not add its own to ours)
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        fail(2, f"{error}: pip install 'ngc_jax[lm_eval]'")
    if "ngc_jax" not in model_registry:  # newer ones find the entry point
        model_registry.register("ngc_jax", target="ngc_jax.training.harness:Harness")
    try:
        cli_evaluate()
    except UserError as error:
        fail(2, error)


if __name__ == "__main__":
    main()
