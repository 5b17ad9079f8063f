"""A task of your own: the larger one of two numbers.

python launch.py --config=ngc_tiny --extend=own_task.py --config.data.task=larger
    --config.data.low=1 --config.data.high=3 --config.data.context=12 --workdir=runs/larger
"""

from ngc_jax.data.tasks import TASKS, Task


def larger(rng, digits):
    a, b = ("".join(map(str, rng.integers(10, size=digits))) for _ in range(2))
    read, answer = [*a, ",", *b, "="], [*max(a, b)]
    # The answer is read symbol by symbol as it grows; "" = nothing is expected here.
    return read + answer[:-1], [""] * (len(read) - 1) + answer


TASKS["larger"] = Task(larger, (*"0123456789", ",", "="), "digits of each number", 1, 50)
