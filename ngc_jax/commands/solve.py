"""How many problems of a task a trained model solves, by difficulty: `python -m ngc_jax.solve
--workdir=DIR`.

For: tests of any difficulty, beyond those of training too, on problems that training cannot have
seen (`data/problems.py`). Not for: held-out loss (`evaluate.py`).

`--rounds=32` and `--rounds=settled` run the loop as in `evaluate.py`, where training had other
rounds.

A problem is solved when every answer is right, each the likeliest symbol given the right ones
before it; for an answer of several symbols that is what greedy decoding writes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import scipy.stats

from ngc_jax.commands.evaluate import ask_rounds, run_for
from ngc_jax.data.batches import Examples
from ngc_jax.data.problems import Problems, problem_set
from ngc_jax.data.tasks import TASKS, boundary, check
from ngc_jax.data.tokens import cache_directory
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.evaluation import as_trained, held_out
from ngc_jax.training.rounds import Apply
from ngc_jax.training.step import make_eval_step
from ngc_jax.training.workdir import Trained, command, open_trained, parser

Run = Callable[[Trained], tuple[LanguageModel, Apply | None]]  # as `evaluate.as_trained`
# pairs of positions in a batch at most, so that attention over long problems fits in memory
ATTENDED = 2**23


def attending(trained: Trained, length: int) -> Trained:
    """The same model, with attention that looks back on so many tokens."""
    model = trained.model
    if isinstance(model, Decoder):
        model = Decoder(dataclasses.replace(model.shape, context=length))
    return trained._replace(model=model)


def score(
    model: LanguageModel, params: Any, config: Any, problems: Examples, settle: Apply | None = None
) -> dict[str, float]:
    """`held_out` of problems: "exact" is the share that is solved. `settle`, if given, stands for
    `model.apply`.
    """
    mesh = meshes.single_device()
    step = jax.jit(
        meshes.with_mesh(
            mesh, make_eval_step(model, config.train, None, boundary(config.data.task), settle)
        )
    )
    rows = max(1, min(config.eval.batch_size, ATTENDED // problems[0].shape[1] ** 2))
    return held_out(step, params, mesh, problems, rows)


def examine(
    trained: Trained,
    difficulty: int,
    examples: int,
    seed: int = 0,
    attend: int = 0,
    run: Run = as_trained,
) -> dict[str, float]:
    """`score` on so many test problems of a difficulty, drawn from a seed.

    Attention looks back on `attend` tokens, 0: on all of them. `run` says for how many rounds the
    loop runs.
    """
    data = trained.config.data
    found = problem_set(
        data.task, difficulty, difficulty, {"test": examples}, seed, cache_directory(data)
    )
    problems = Problems(found.home, "test", found.longest)
    model, settle = run(attending(trained, attend or max(found.longest, data.context)))
    return score(model, trained.params, trained.config, problems, settle)


def interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of `count` independent cases, after Wilson: holds near 0 and 1 too."""
    found = scipy.stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def difficulties(given: str, data: Any) -> Sequence[int]:
    """Those asked for, as in "5,10,20"; else the least, middle and greatest of training, and twice
    that.
    """
    try:
        usual = {
            data.low,
            (data.low + data.high) // 2,
            data.high,
            min(2 * data.high, TASKS[data.task].highest),
        }
        asked = [int(n) for n in given.split(",")] if given else sorted(usual)
    except ValueError as error:
        raise UserError(
            f"--difficulties={given}: must be whole numbers with commas, for instance 5,10"
        ) from error
    for difficulty in asked:
        check(data.task, difficulty, "--difficulties")
    return asked


def main() -> None:
    """Print the score at each difficulty."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--difficulties", default="", help="such as 5,10,20; default: those of training, and beyond"
    )
    arguments.add_argument("--examples", type=int, default=200, help="problems of each, >= 1")
    arguments.add_argument("--seed", type=int, default=0, help="that they are drawn from, >= 0")
    arguments.add_argument(
        "--attend", type=int, default=0, help="tokens that attention looks back on; default 0: all"
    )
    ask_rounds(arguments)
    args = arguments.parse_args()
    if args.attend < 0:
        raise UserError(f"--attend={args.attend}: must be 1 or more, or 0 for all")
    if args.examples < 1:
        raise UserError(f"--examples={args.examples}: must be 1 or more, for instance 200")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: must be 0 or more")
    trained = open_trained(args.workdir, args.step)
    data = trained.config.data
    if not data.task:
        raise UserError(
            f"--workdir={args.workdir} holds a model of text: data.task is '' in its config"
        )
    asked = difficulties(args.difficulties, data)
    unit = TASKS[data.task].unit
    print(
        f"{args.workdir}, step {trained.step}: {data.task}, trained on {data.low} to {data.high} {unit}"
    )
    print(f"{'difficulty':>10}  {'problems':>8}  {'exact':>7}  95% interval")
    for difficulty in asked:
        result = examine(
            trained, difficulty, args.examples, args.seed, args.attend, partial(run_for, args=args)
        )
        low, high = interval(result["exact"], args.examples)
        rounds = f", {result['rounds']:.1f} rounds" if "rounds" in result else ""
        said = f"{result['exact']:>7.2%}  {low:.2%} to {high:.2%}{rounds}"
        print(f"{difficulty:>10}  {args.examples:>8}  {said}", flush=True)


if __name__ == "__main__":
    command(main)
