"""How many problems of a task a trained model solves, by difficulty: `python -m ngc_jax.solve --workdir=DIR`.

For: tests of any difficulty, beyond those of training too, on problems that training cannot have seen
(`data/problems.py`). Not for: held-out loss (`evaluate.py`).

A problem is solved when every answer is right, each the likeliest symbol given the right ones before it; for an answer
of several symbols that is what greedy decoding writes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats

from ngc_jax.data.batches import Examples, held_out_batches
from ngc_jax.data.problems import Problems, problem_set
from ngc_jax.data.tasks import TASKS, check
from ngc_jax.data.tokens import cache_directory
from ngc_jax.errors import UserError
from ngc_jax.nn.decoder import Decoder
from ngc_jax.steps import solved
from ngc_jax.workdir import Trained, command, open_trained, parser

Array = jax.Array
Answer = Callable[[Any, Array], Array]  # (params, inputs [B, T]) -> logits [B, T, V]
ATTENDED = 2**23  # pairs of positions in a batch at most, so that attention over long problems fits in memory


class Score(NamedTuple):
    """Of problems of one difficulty, how many were solved."""

    difficulty: int
    problems: int
    solved: int

    def interval(self) -> tuple[float, float]:
        """95% interval of the share that is solved, after Wilson: holds near 0 and 1 too."""
        found = scipy.stats.binomtest(self.solved, self.problems).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def count_solved(answer: Answer, params: Any, examples: Examples, batch_size: int) -> int:
    """How many of the problems are solved by `answer`, a model run in any way."""

    @jax.jit
    def right(params: Any, batch: Array) -> Array:
        return solved(answer(params, batch[:, 0]), batch[:, 1])

    rows = max(1, min(batch_size, ATTENDED // examples[0].shape[1] ** 2))
    batches = held_out_batches(examples, batch_size=rows)
    return sum(int(np.sum(np.asarray(right(params, batch)) & real)) for batch, real in batches)


def score(trained: Trained, difficulty: int, examples: int, seed: int) -> Score:
    """The score on so many test problems of a difficulty. Those longer than in training are attended to as a whole."""
    data = trained.config.data
    found = problem_set(data.task, difficulty, difficulty, {"test": examples}, seed, cache_directory(data))
    problems = Problems(found.home, "test", found.longest)
    model = trained.model
    if isinstance(model, Decoder):
        model = Decoder(dataclasses.replace(model.shape, context=max(data.context, found.longest)))

    def answer(params: Any, inputs: Array) -> Array:
        return model.apply(params, inputs)[0]

    return Score(difficulty, examples, count_solved(answer, trained.params, problems, trained.config.eval.batch_size))


def difficulties(given: str, data: Any) -> Sequence[int]:
    """Those asked for, as in "5,10,20"; else the least, middle and greatest of training, and twice that."""
    try:
        usual = {data.low, (data.low + data.high) // 2, data.high, min(2 * data.high, TASKS[data.task].highest)}
        asked = [int(n) for n in given.split(",")] if given else sorted(usual)
    except ValueError as error:
        raise UserError(f"--difficulties={given}: must be whole numbers with commas, for instance 5,10") from error
    for difficulty in asked:
        check(data.task, difficulty, "--difficulties")
    return asked


def main() -> None:
    """Print the score at each difficulty."""
    arguments = parser(__doc__)
    arguments.add_argument("--difficulties", default="", help="such as 5,10,20; default: those of training, and beyond")
    arguments.add_argument("--examples", type=int, default=200, help="problems of each, >= 1")
    arguments.add_argument("--seed", type=int, default=0, help="that they are drawn from, >= 0")
    args = arguments.parse_args()
    if args.examples < 1:
        raise UserError(f"--examples={args.examples}: must be 1 or more, for instance 200")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: must be 0 or more")
    trained = open_trained(args.workdir, args.step)
    data = trained.config.data
    if not data.task:
        raise UserError(f"--workdir={args.workdir} holds a model of text: data.task is '' in its config")
    asked = difficulties(args.difficulties, data)
    unit = TASKS[data.task].unit
    print(f"{args.workdir}, step {trained.step}: {data.task}, trained on {data.low} to {data.high} {unit}")
    print(f"{'difficulty':>10}  {'problems':>8}  {'exact':>7}  95% interval")
    for difficulty in asked:
        found = score(trained, difficulty, args.examples, args.seed)
        low, high = found.interval()
        share = found.solved / found.problems
        print(f"{difficulty:>10}  {found.problems:>8}  {share:>7.2%}  {low:.2%} to {high:.2%}", flush=True)


if __name__ == "__main__":
    command(main)
