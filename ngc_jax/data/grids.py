"""Mazes and Sudokus, drawn at random, with their one solution.

For: grids of a difficulty; a Sudoku is a list of N N cells, 0: empty. Not for: tasks (`tasks.py`).
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice

import numpy as np
from numpy.random import Generator

WALL, OPEN, START, GOAL, PATH = range(5)
Place = tuple[int, int]  # row, column
Shape = tuple[int, int]  # rows and columns of a box; their product is N


def maze(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A maze of size x size rooms, size >= 2, and the same with its path: grids of 2 size - 1.

    Rooms stand at even places, walls or doors between them. A random depth-first walk cuts doors.
    """
    grid = np.full((2 * size - 1,) * 2, WALL)
    first, last = (divmod(int(room), size) for room in rng.choice(size * size, 2, replace=False))
    came_from, walk = dict[Place, Place](), [(first, first)]
    while walk:
        room, before = walk.pop()
        if room in came_from:
            continue
        came_from[room] = before
        grid[2 * room[0], 2 * room[1]] = grid[room[0] + before[0], room[1] + before[1]] = OPEN
        sides = ((0, 1), (1, 0), (0, -1), (-1, 0))
        around = [(room[0] + down, room[1] + right) for down, right in sides]
        new = [at for at in around if min(at) >= 0 and max(at) < size and at not in came_from]
        walk += [(new[i], room) for i in rng.permutation(len(new))]
    solved, at = grid.copy(), last
    while at != first:
        before = came_from[at]
        solved[2 * at[0], 2 * at[1]] = solved[at[0] + before[0], at[1] + before[1]] = PATH
        at = before
    for marked in (grid, solved):
        marked[2 * first[0], 2 * first[1]], marked[2 * last[0], 2 * last[1]] = START, GOAL
    return grid, solved


def sudoku(
    shape: Shape, rng: Generator, blanks: int, search: bool = False
) -> tuple[list[int], list[int]]:
    """A Sudoku with so many empty cells and exactly one solution, and the solution.

    Without `search` singles solve it (`fill_singles`); with it they do not. Cells of a random
    solution are emptied in random order where that leaves one solution: where the digit is then a
    single, each of which leaves it solvable by singles, or `solutions` finds no other.
    """
    of = peers(shape)
    while True:
        solution = next(solutions([0] * len(of), shape, rng))
        given, empty = solution.copy(), 0
        for cell in rng.permutation(len(of)).tolist():
            if empty == blanks:
                break
            given[cell] = 0
            single = is_single(free(given, shape, of[cell]), shape, cell, solution[cell])
            # one solution, and no second one
            if single or (search and len([*islice(solutions(given, shape), 2)]) == 1):
                empty += 1
            else:
                given[cell] = solution[cell]
        if empty == blanks and not (search and 0 not in fill_singles(given, shape)):
            return given, solution


@lru_cache
def units(shape: Shape) -> list[list[list[int]]]:
    """For each cell the cells of its row, of its column and of its box."""
    rows, columns = shape
    size = rows * columns
    cells = np.arange(size**2).reshape(size, size)
    boxes = cells.reshape(columns, rows, rows, columns).swapaxes(1, 2).reshape(size, size)
    lines = [*cells.tolist(), *cells.T.tolist(), *boxes.tolist()]
    return [[line for line in lines if cell in line] for cell in range(size**2)]


@lru_cache
def peers(shape: Shape) -> list[set[int]]:
    """For each cell the cells of its units, itself among them."""
    return [{*chain(*around)} for around in units(shape)]


def free(grid: list[int], shape: Shape, cells: Iterable[int] = ()) -> dict[int, set[int]]:
    """The digits that each empty one of these cells, or of all, can hold: what no peer holds."""
    digits, of = {*range(1, shape[0] * shape[1] + 1)}, peers(shape)
    empty = [cell for cell in cells or range(len(grid)) if not grid[cell]]
    return {cell: digits.difference([grid[peer] for peer in of[cell]]) for cell in empty}


def solutions(given: list[int], shape: Shape, rng: Generator | None = None) -> Iterator[list[int]]:
    """All solutions, by trying digits in order, or as `rng` has it, where fewest are free."""
    grid, of = given.copy(), peers(shape)

    def fill(left: dict[int, set[int]]) -> Iterator[list[int]]:
        if not left:
            yield grid.copy()
            return
        cell = min(left, key=lambda i: len(left[i]))
        digits = sorted(left[cell])
        if rng is not None:
            rng.shuffle(digits)
        rest = {i: held for i, held in left.items() if i != cell}
        near = [i for i in of[cell] if i in rest]
        for digit in digits:
            grid[cell] = digit
            yield from fill(rest | {i: rest[i] - {digit} for i in near})

    yield from fill(free(given, shape))


def is_single(left: dict[int, set[int]], shape: Shape, cell: int, digit: int) -> bool:
    """Whether a digit of left[cell] (see `free`) is the only one there, or only there in a unit."""
    return left[cell] == {digit} or any(
        not any(digit in left.get(other, ()) for other in unit if other != cell)
        for unit in units(shape)[cell]
    )


def fill_singles(given: list[int], shape: Shape) -> list[int]:
    """The grid after naked and hidden singles were filled in until there were none."""
    grid = given.copy()
    while True:
        left = free(grid, shape)
        found = {i: d for i in left for d in left[i] if is_single(left, shape, i, d)}
        if not found:
            return grid
        for cell, digit in found.items():
            grid[cell] = digit
