"""How many problems of a task a trained model solves: `python -m ngc_jax.solve --workdir=DIR`.

For: tests at any difficulty, on problems that training has not seen. One is solved when greedy
decoding writes every answer right. Not for: the test itself (`training/evaluation.py`).
"""

import re
from collections.abc import Sequence
from typing import Any

from ngc_jax.commands.arguments import PLACES, ROUNDS, command, opened, parser, read, rounds_of
from ngc_jax.data.tasks import TASKS, check
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import SEEDS, Field
from ngc_jax.runtime.output import doing

OPTIONS = (
    Field("difficulties", "", "such as 5,10,20; default: those of training, and beyond"),
    Field("examples", 200, "problems of each", "[1, inf)"),
    Field("seed", 0, "of the draw of problems", SEEDS),
    Field("attend", -1, "tokens to look back on, 0: all, -1: as in training", "[-1, inf)"),
)


def interval(share: float, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share of `count` independent cases; it holds near 0 and 1 too."""
    import scipy.stats

    found = scipy.stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def difficulties(given: str, data: Any) -> Sequence[int]:
    """Difficulties to test: those given, "5,10", or of training and beyond. Raises UserError."""
    middle, beyond = (data.low + data.high) // 2, min(2 * data.high, TASKS[data.task].highest)
    if not re.fullmatch(r"(\d+(, ?\d+)*)?", given):
        raise UserError(f"--difficulties={given}: must be whole numbers with commas, such as 5,10")
    default = {data.low, middle, data.high, beyond}
    asked = [int(n) for n in given.split(",")] if given else sorted(default)
    for difficulty in asked:
        check(data.task, difficulty, "--difficulties")
    return asked


def main() -> None:
    """Prints the score at each difficulty."""
    args = read(parser(__doc__, *OPTIONS, *PLACES, *ROUNDS))
    from ngc_jax.training.evaluation import examine

    how = {"seed": args.seed, "attend": None if args.attend < 0 else args.attend}
    how["rounds"], trained = rounds_of(args), opened(args)
    data = trained.config.data
    if not data.task:
        raise UserError(f"--workdir={args.workdir} holds a model of {data.kind}, with data.task=''")
    asked = difficulties(args.difficulties, data)
    about = f"trained on {data.low} to {data.high} {TASKS[data.task].unit}"
    print(f"{args.workdir}, step {trained.step}: {data.task}, {about}")
    print(f"{'difficulty':>10}  {'problems':>8}  {'exact':>7}  95% interval")
    model = trained.model, trained.params, trained.config
    for difficulty in asked:
        with doing(f"solving problems of difficulty {difficulty}"):
            result = examine(*model, difficulty, args.examples, **how)
        low, high = interval(result["exact"], args.examples)
        taken = f", {result['rounds']:.1f} rounds" if "rounds" in result else ""
        shown = f"{result['exact']:>7.2%}  {low:.2%} to {high:.2%}{taken}"
        print(f"{difficulty:>10}  {args.examples:>8}  {shown}", flush=True)


if __name__ == "__main__":
    command(main)
