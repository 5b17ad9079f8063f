"""Mazes and Sudokus, drawn at random, with their one solution.

For: drawing a grid of a wanted difficulty, and the solvers that this takes. Not for: what of it a
model reads and is asked for (`tasks.py`). A Sudoku of `rows` x `columns` boxes has N = rows columns
digits and N N cells, a flat list with 0 for an empty one.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.random import Generator

WALL, OPEN, START, GOAL, PATH = range(5)


def maze(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A maze of size x size rooms, size >= 2, and the same with its path: grids of 2 size - 1.

    Rooms stand at even places, walls or doors between them, and the wall around all is left out.
    Any two rooms are joined by one way: doors are cut by a random depth-first walk. Start and goal
    are two rooms drawn at random.
    """
    grid = np.full((2 * size - 1,) * 2, WALL)
    came_from: dict[tuple[int, int], tuple[int, int] | None] = {}
    first, last = (divmod(int(room), size) for room in rng.choice(size * size, 2, replace=False))
    walk: list[tuple[tuple[int, int], tuple[int, int] | None]] = [(first, None)]
    while walk:
        room, before = walk.pop()
        if room in came_from:
            continue
        came_from[room] = before
        grid[2 * room[0], 2 * room[1]] = OPEN
        if before is not None:
            grid[room[0] + before[0], room[1] + before[1]] = OPEN
        sides = ((0, 1), (1, 0), (0, -1), (-1, 0))
        around = [(room[0] + down, room[1] + right) for down, right in sides]
        free = [at for at in around if min(at) >= 0 and max(at) < size and at not in came_from]
        walk += [(free[i], room) for i in rng.permutation(len(free))]
    solved, at = grid.copy(), last
    while (before := came_from[at]) is not None:
        solved[2 * at[0], 2 * at[1]] = solved[at[0] + before[0], at[1] + before[1]] = PATH
        at = before
    for marked in (grid, solved):
        marked[2 * first[0], 2 * first[1]], marked[2 * last[0], 2 * last[1]] = START, GOAL
    return grid, solved


def sudoku(
    rows: int, columns: int, rng: Generator, blanks: int, search: bool = False
) -> tuple[list[int], list[int]]:
    """A Sudoku with so many empty cells and exactly one solution, and the solution.

    Without `search` singles solve it (`fill_singles`); with it they do not. Cells of a random
    solution are emptied in random order where that leaves one solution. A cell whose digit is then
    a single leaves it solvable by singles, and each such Sudoku can come about so; any other cell
    is tried by `solutions`.
    """
    size = rows * columns
    while True:
        solution = next(solutions([0] * size**2, rows, columns, rng))
        given, empty = solution.copy(), 0
        for cell in rng.permutation(size**2).tolist():
            if empty == blanks:
                break
            given[cell] = 0
            single = is_single(given, rows, columns, cell, solution[cell])
            # one solution, and no second one
            if single or (search and len([*islice(solutions(given, rows, columns), 2)]) == 1):
                empty += 1
            else:
                given[cell] = solution[cell]
        if empty == blanks and not (search and 0 not in fill_singles(given, rows, columns)):
            return given, solution


def solutions(
    given: list[int], rows: int, columns: int, rng: Generator | None = None
) -> Iterator[list[int]]:
    """All solutions, one after another; digits are tried in order, or as `rng` has it.

    The empty cell with fewest digits left is tried first.
    """
    size, grid = rows * columns, given.copy()
    cells = [divmod(i, size) for i in range(size**2)]
    # of each cell its row, column and box among all of these, and the digits they have, as bits
    where = [(i, size + j, 2 * size + i // rows * rows + j // columns) for i, j in cells]
    used = [0] * 3 * size

    def taken(cell: int) -> int:
        row, column, box = where[cell]
        return used[row] | used[column] | used[box]

    def put(cell: int, digit: int) -> None:
        """Takes a digit up where it is not, or back where it is."""
        for place in where[cell]:
            used[place] ^= 1 << digit

    def fill(empty: list[int]) -> Iterator[list[int]]:
        if not empty:
            yield grid.copy()
            return
        cell = max(empty, key=lambda i: taken(i).bit_count())
        digits = [digit for digit in range(1, size + 1) if not taken(cell) >> digit & 1]
        if rng is not None:
            rng.shuffle(digits)
        rest = [i for i in empty if i != cell]
        for digit in digits:
            grid[cell] = digit
            put(cell, digit)
            yield from fill(rest)
            put(cell, digit)

    for cell in (i for i, digit in enumerate(grid) if digit):
        put(cell, grid[cell])
    yield from fill([i for i, digit in enumerate(grid) if digit == 0])


@lru_cache
def units(rows: int, columns: int) -> list[list[list[int]]]:
    """For each cell the cells of its row, of its column and of its box."""
    size = rows * columns
    cells = np.arange(size**2).reshape(size, size)
    boxes = cells.reshape(columns, rows, rows, columns).swapaxes(1, 2).reshape(size, size)
    lines = [*cells.tolist(), *cells.T.tolist(), *boxes.tolist()]
    return [[line for line in lines if cell in line] for cell in range(size**2)]


def is_single(given: list[int], rows: int, columns: int, cell: int, digit: int) -> bool:
    """Whether an empty cell must hold this digit, seen from one cell or one unit alone.

    A naked single: the cell sees all other digits. A hidden single: no other empty cell of its row,
    column or box can hold it. The digit is one that the cell can hold.
    """
    of = units(rows, columns)
    seen = {given[other] for unit in of[cell] for other in unit}
    if len(seen - {0, digit}) == rows * columns - 1:
        return True
    return any(
        all(
            given[other]
            or other == cell
            or any(given[far] == digit for around in of[other] for far in around)
            for other in unit
        )
        for unit in of[cell]
    )


def fill_singles(given: list[int], rows: int, columns: int) -> list[int]:
    """The grid after naked and hidden singles were filled in until there were none."""
    grid, of = given.copy(), units(rows, columns)
    changed = True
    while changed:
        changed = False
        for cell in (i for i, digit in enumerate(grid) if digit == 0):
            seen = {grid[other] for unit in of[cell] for other in unit}
            for digit in set(range(1, rows * columns + 1)) - seen:
                if is_single(grid, rows, columns, cell, digit):
                    grid[cell], changed = digit, True
                    break
    return grid
