"""Reasoning tasks: problems drawn at random, of any difficulty, each with its one right answer.

For: what a problem reads and what is asked at each position (docs/tasks.md). `python -m
ngc_jax.data.tasks parity 5` prints one. Not for: keeping many of them (`problems.py`).
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from ngc_jax.data import NOTHING, grids
from ngc_jax.runtime.errors import UserError

MODULUS = 5
DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyzABCDEF")
CLOSING = {"(": ")", "[": "]"}
OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda v: sorted(v)[(len(v) - 1) // 2],
    "[SUM": lambda v: sum(v) % 10,
}

# what is read and what is asked at each position; "" = nothing
Written = tuple[list[str], list[str]]
Writer = Callable[[Generator, int], Written]  # of a problem of a difficulty
Drawer = Callable[[Generator, int], Sequence[Any]]  # of a grid and its solution, as numbers


class Task(NamedTuple):
    """A kind of problem."""

    write: Writer
    symbols: tuple[str, ...]  # the spelling of token 0, 1, ...
    unit: str  # what difficulty counts
    lowest: int
    highest: int  # beyond it problems do not exist, or take long to find
    in_place: bool = False  # whether symbols are asked before those that they follow from


class Problem(NamedTuple):
    """One problem as tokens, int32 [T] each."""

    inputs: np.ndarray
    targets: np.ndarray  # the right symbol, or NOTHING where nothing is asked


def draw(name: str, rng: Generator, difficulty: int) -> Problem:
    """A problem of TASKS[name]."""
    task = TASKS[name]
    token = {symbol: i for i, symbol in enumerate(task.symbols)} | {"": NOTHING}
    read, asked = task.write(rng, difficulty)
    return Problem(*(np.array([token[s] for s in row], np.int32) for row in (read, asked)))


def _written(question: list[str], answer: list[str]) -> Written:
    """The answer, symbol by symbol: each is asked where all before it have been read."""
    return question + answer[:-1], [""] * (len(question) - 1) + answer


def both_ways(name: str) -> bool:
    """Whether a task, or text (""), wants a model whose tokens see those after them too."""
    return bool(name) and TASKS[name].in_place


def boundary(name: str) -> int | None:
    """The token that ends a problem and that nothing sees across; None for a causal task."""
    return TASKS[name].symbols.index("=") if both_ways(name) else None


def parity(rng: Generator, bits: int) -> Written:
    """Whether the ones are odd in number, asked at the end."""
    row = rng.integers(2, size=bits).tolist()
    return _written([*map(str, row), "="], [str(sum(row) % 2)])


def running_parity(rng: Generator, bits: int) -> Written:
    """The same, asked after every bit."""
    row = rng.integers(2, size=bits)
    return [*map(str, row.tolist())], [*map(str, (np.cumsum(row) % 2).tolist())]


def modular(rng: Generator, terms: int) -> Written:
    """A chain of +, - and * modulo five, from left to right."""
    first, *digits = rng.integers(MODULUS, size=terms).tolist()
    question, value = [str(first)], first
    for digit in digits:
        sign = str(rng.choice(["+", "-", "*"]))
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[sign] % MODULUS
        question += [sign, str(digit)]
    return _written([*question, "="], [str(value)])


def hops(rng: Generator, count: int) -> Written:
    """`count` hops from each letter; one leads to the letter after its last occurrence.

    A hop from X[i] goes to the largest j <= i with X[j - 1] = X[i], 3 back on average; where a hop
    finds none nothing is asked. No letter stands twice in a row, which would be a hop onto itself.
    """
    letters = [int(rng.integers(4))]
    while len(letters) < 32 + 4 * count:
        letters.append((letters[-1] + int(rng.integers(1, 4))) % 4)
    last: dict[int, int] = {}
    hop = []  # where one hop leads to, or -1
    for i, letter in enumerate(letters):
        hop.append(last.get(letter, -2) + 1)
        last[letter] = i
    at = np.arange(len(letters))
    for _ in range(count):
        at = np.where(at < 0, -1, np.array(hop)[at])
    spelt = [LETTERS[letter] for letter in letters]
    return [">"] * count + spelt, [""] * count + [spelt[i] if i >= 0 else "" for i in at]


def addition(rng: Generator, digits: int) -> Written:
    """The sum of two numbers of so many digits; all three have their lowest digit first."""
    a, b = rng.integers(10, size=(2, digits)).tolist()
    total, carried = [], 0
    for pair in zip(a, b, strict=True):
        carried, digit = divmod(sum(pair) + carried, 10)
        total.append(digit)
    return _written([*map(str, a), "+", *map(str, b), "="], [*map(str, total), str(carried)])


def listops(rng: Generator, depth: int) -> Written:
    """The value of nested lists of 2 to 4 arguments; one of each is the next list."""

    def write(depth: int) -> tuple[list[str], int]:
        if depth == 0:
            digit = int(rng.integers(10))
            return [str(digit)], digit
        count = int(rng.integers(2, 5))
        below = (rng.random(count) < 0.25).astype(int) if depth > 1 else np.zeros(count, int)
        below[rng.integers(count)] = depth - 1
        parts, values = zip(*(write(int(part)) for part in below), strict=True)
        operator = str(rng.choice(list(OPERATORS)))
        return [operator, *itertools.chain.from_iterable(parts), "]"], OPERATORS[operator](values)

    question, value = write(depth)
    return _written([*question, "="], [str(value)])


def dyck(rng: Generator, depth: int) -> Written:
    """The brackets that close what is open, then "."; it climbs, wanders, and goes to its end."""
    question, open_ = list[str](), list[str]()
    stop = int(rng.integers(1, depth + 1))  # brackets that are left open
    wandered = 0  # symbols up to which it wanders, once the depth is reached
    while not wandered or len(question) < wandered or len(open_) != stop:
        if wandered and len(question) >= wandered:
            up = len(open_) < stop
        else:
            up = not open_ or (len(open_) < depth and rng.random() < (0.5 if wandered else 0.7))
        if up:
            open_.append(str(rng.choice(list(CLOSING))))
        question.append(open_[-1] if up else CLOSING[open_.pop()])
        if len(open_) == depth and not wandered:
            wandered = len(question) + depth
    return _written([*question, "="], [*(CLOSING[bracket] for bracket in reversed(open_)), "."])


def path(rng: Generator, length: int) -> Written:
    """The one shortest path between two nodes of a graph, given as its edges, node by node.

    As many nodes are off it as on it; up to a third as many more edges leave it the shortest.
    """
    nodes = 2 * (length + 1)
    parent = np.array([max(0, i - 1) if i <= length else rng.integers(i) for i in range(nodes)])
    edges = [(int(parent[i]), i) for i in range(1, nodes)]
    for _ in range(nodes // 3):
        extra = tuple(sorted(rng.choice(nodes, 2, replace=False).tolist()))
        beside = np.zeros((nodes, nodes), np.int64)
        for a, b in [*edges, extra]:
            beside[a, b] = beside[b, a] = 1
        # Walks of each number of steps from node 0 to the last: none shorter, and one as short.
        walks = [np.linalg.matrix_power(beside, n)[0, length] for n in range(length + 1)]
        if extra not in edges and walks == [0] * length + [1]:
            edges.append(extra)
    name, question = [LETTERS[i] for i in rng.permutation(len(LETTERS))], list[str]()
    for i in rng.permutation(len(edges)):
        a, b = rng.permutation(edges[i]).tolist()
        question += [name[a], name[b], ","]
    return _written([*question, name[0], name[length], "="], name[1 : length + 1])


def _grid(draw: Drawer, spelling: Sequence[str], in_place: bool) -> Writer:
    """A grid with every cell of its solution, asked where the cell is, or is read again."""

    def write(rng: Generator, difficulty: int) -> Written:
        drawn = draw(rng, difficulty)
        given, solved = ([spelling[cell] for cell in np.ravel(grid)] for grid in drawn)
        if in_place:
            return [*given, "="], [*solved, ""]
        return [*given, "=", *given], [""] * (len(given) + 1) + solved

    return write


MAZE, SUDOKU = ("#", "_", "S", "G", "*"), (".", *DIGITS[1:])
# the function, what its cells are spelt as, the unit of difficulty, and its limits
_GRIDS: dict[str, tuple[Drawer, tuple[str, ...], str, int, int]] = {
    "maze": (grids.maze, MAZE, "rooms of a side", 2, 50),
    "sudoku4": (partial(grids.sudoku, (2, 2)), SUDOKU[:5], "empty cells", 1, 11),
    "sudoku6": (partial(grids.sudoku, (2, 3)), SUDOKU[:7], "empty cells", 1, 25),
    "sudoku9": (partial(grids.sudoku, (3, 3)), SUDOKU, "empty cells", 1, 50),
    "sudoku9_search": (partial(grids.sudoku, (3, 3), search=True), SUDOKU, "empty cells", 48, 54),
}
TASKS = {
    "parity": Task(parity, ("0", "1", "="), "bits", 1, 10_000),
    "running_parity": Task(running_parity, ("0", "1"), "bits", 1, 10_000),
    "modular": Task(modular, (*DIGITS[:MODULUS], "+", "-", "*", "="), "terms", 1, 10_000),
    "hops": Task(hops, (*LETTERS[:4], ">"), "hops", 1, 1000),
    "addition": Task(addition, (*DIGITS, "+", "="), "digits of each term", 1, 10_000),
    "listops": Task(listops, (*DIGITS, *OPERATORS, "]", "="), "lists in one another", 1, 200),
    "dyck": Task(dyck, ("(", ")", "[", "]", "=", "."), "brackets in one another", 1, 1000),
    "path": Task(path, (*LETTERS, ",", "="), "edges of the path", 1, len(LETTERS) // 2 - 1),
}
for _end, _in_place in (("", False), ("_in_place", True)):
    for _name, (_draw, _cells, _unit, _least, _most) in _GRIDS.items():
        _write = _grid(_draw, _cells, _in_place)
        TASKS[_name + _end] = Task(_write, (*_cells, "="), _unit, _least, _most, _in_place)


def spell(name: str, problem: Problem) -> str:
    """A problem to be read: what is given above what is asked, grids by rows."""
    symbols = TASKS[name].symbols
    given, asked = ([symbols[i] if i >= 0 else "" for i in row] for row in problem)
    if name.startswith(("maze", "sudoku")):
        cells = [*filter(None, asked)]
        side = math.isqrt(len(cells))
        rows = [slice(i, i + side) for i in range(0, len(cells), side)]
        return "\n".join(f"{' '.join(given[row])}   {' '.join(cells[row])}" for row in rows)
    width = max(map(len, symbols))
    return "\n".join(" ".join(s.ljust(width) for s in row).rstrip() for row in (given, asked))


def main() -> None:
    """Prints problems: what is read, and below or beside it what is asked."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("difficulty", type=int)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        check(args.task, args.difficulty, "difficulty")
    except UserError as error:
        parser.error(str(error))
    rng = np.random.default_rng(args.seed)
    drawn = (draw(args.task, rng, args.difficulty) for _ in range(args.count))
    print("\n\n".join(spell(args.task, problem) for problem in drawn))


def check(name: str, difficulty: int, field: str) -> None:
    """Raises UserError for a difficulty that the task does not have."""
    task = TASKS[name]
    if not task.lowest <= difficulty <= task.highest:
        wants = f"from {task.lowest} to {task.highest} ({task.unit})"
        raise UserError(f"{field}={difficulty}: must be {wants} where the task is {name!r}")


if __name__ == "__main__":
    main()
