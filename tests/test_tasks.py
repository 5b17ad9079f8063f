"""Reasoning tasks: answers checked by solvers of another kind, parts that share nothing, a run from
start to score.
"""

import itertools
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, drawn
from ml_collections import ConfigDict

from ngc_jax.commands import solve
from ngc_jax.commands.arguments import command
from ngc_jax.config import base, make_model, validate
from ngc_jax.data import NOTHING, tasks
from ngc_jax.data.batches import Batch, segments_of, train_batches
from ngc_jax.data.problems import Problems, draw_set, part_of, problem_set
from ngc_jax.data.tasks import TASKS, Problem, boundary, draw
from ngc_jax.data.tokenizer import Symbols, load_tokenizer
from ngc_jax.data.tokens import load_data
from ngc_jax.nn.sampling import Sampling, generate
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import read_rows
from ngc_jax.training import loop as train
from ngc_jax.training.evaluation import score
from ngc_jax.training.load import load
from ngc_jax.training.step import predict, solved

# ---- Solvers: difficulty, and what is given as symbols -> what is to be answered -----------------


def written(given: str) -> list[str]:
    """What comes before the answer."""
    return given[: given.index("=")].split()


def parity(bits, given):
    row = written(given)
    assert len(row) == bits
    return [str(row.count("1") % 2)]


def running_parity(bits, given):
    row = given.split()
    assert len(row) == bits
    return [str(row[: i + 1].count("1") % 2) for i in range(bits)]


def modular(terms, given):
    value = eval("(" * terms + re.sub(r"(\d)", r"\1)", " ".join(written(given))))
    assert len(written(given)) == 2 * terms - 1
    return [str(value % 5)]


def hops(count, given):
    row = given.split()
    assert row[:count] == [">"] * count
    x = ["", *row[count:]]  # numbered from 1, as in the paper; 0 is nowhere

    def find(i):
        return max([0] + [j for j in range(2, i + 1) if x[j - 1] == x[i]]) if i else 0

    answers = []
    for i in range(1, len(x)):
        for _ in range(count):
            i = find(i)
        if i:
            answers.append(x[i])
    assert len(answers) >= 8
    return answers


def addition(digits, given):
    a, b = ("".join(number.split())[::-1] for number in " ".join(written(given)).split("+"))
    assert len(a) == len(b) == digits
    return list(f"{int(a) + int(b):0{digits + 1}}"[::-1])


def listops(depth, given):
    kinds = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda v: int(np.percentile(v, 50, method="lower")),
        "[SUM": sum,
    }
    stack, deepest = [], 0
    for symbol in written(given):
        stack.append(symbol)
        deepest = max(deepest, sum(str(s).startswith("[") for s in stack))
        if symbol == "]":
            start = max(i for i, s in enumerate(stack) if str(s).startswith("["))
            stack[start:] = [kinds[stack[start]]([int(s) for s in stack[start + 1 : -1]]) % 10]
    assert deepest == depth
    return [str(stack[0])]


def dyck(depth, given):
    text = "".join(written(given))
    heights = np.cumsum([1 if bracket in "([" else -1 for bracket in text])
    assert (heights.max(), heights.min() >= 0) == (depth, True)
    while text != (text := text.replace("()", "").replace("[]", "")):
        pass
    return [*text[::-1].translate(str.maketrans("([", ")]")), "."]


def path(length, given):
    *edges, ends = " ".join(written(given)).split(" , ")
    start, goal = ends.split()
    names = sorted({name for edge in edges for name in edge.split()})
    beside = np.zeros((len(names),) * 2, int)
    for edge in edges:
        a, b = (names.index(name) for name in edge.split())
        beside[a, b] = beside[b, a] = 1
    ways = [np.linalg.matrix_power(beside, n) for n in range(length + 1)]  # walks of n edges
    s, t = names.index(start), names.index(goal)
    assert [int(way[s, t]) for way in ways] == [0] * length + [1]
    return [
        names[int(np.flatnonzero(ways[n][s] * ways[length - n][:, t])[0])]
        for n in range(1, length + 1)
    ]


def grid_of(given):
    cells = written(given)
    assert given.split()[len(cells) + 1 :] == cells, "the grid is read twice"
    side = round(len(cells) ** 0.5)
    return np.array(cells).reshape(side, side)


def maze(rooms, given):
    """What is left when dead ends are walled up is the way."""
    grid = grid_of(given)
    assert len(grid) == 2 * rooms - 1
    free = np.pad(grid != "#", 1)
    ends = np.pad((grid == "S") | (grid == "G"), 1)
    for _ in range(free.size):
        around = free[:-2, 1:-1].astype(int) + free[2:, 1:-1] + free[1:-1, :-2] + free[1:-1, 2:]
        free[1:-1, 1:-1] &= (around > 1) | ends[1:-1, 1:-1]
    return np.where(free[1:-1, 1:-1] & (grid == "_"), "*", grid).ravel().tolist()


def sudoku(rows, columns, search, blanks, given):
    """By candidates for whole units; without search that alone must do, which also proves the
    solution the only one.
    """
    grid, size = grid_of(given), rows * columns
    assert np.sum(grid == ".") == blanks
    cells = list(itertools.product(range(size), repeat=2))
    units = [[c for c in cells if c[0] == i] for i in range(size)] + [
        [c for c in cells if c[1] == i] for i in range(size)
    ]
    units += [
        [c for c in cells if (c[0] // rows, c[1] // columns) == box]
        for box in itertools.product(range(columns), range(rows))
    ]
    digits = set(map(str, range(1, size + 1)))
    left = {c: digits if grid[c] == "." else {str(grid[c])} for c in cells}

    def settle(left):
        left, before = dict(left), None
        while before != left:
            before = dict(left)
            for unit in units:
                known = [next(iter(left[c])) for c in unit if len(left[c]) == 1]
                for c in unit:
                    if len(left[c]) > 1:
                        left[c] = left[c] - set(known)
                for digit in digits:
                    places = [c for c in unit if digit in left[c]]
                    if len(places) == 1:
                        left[places[0]] = {digit}
                if len(known) != len(set(known)) or not all(digits & left[c] for c in unit):
                    return None
        return left

    def solve_(left):
        left = settle(left)
        if left is None:
            return []
        if all(len(options) == 1 for options in left.values()):
            return [[next(iter(left[c])) for c in cells]]
        cell = min((c for c in cells if len(left[c]) > 1), key=lambda c: len(left[c]))
        return [found for digit in sorted(left[cell]) for found in solve_({**left, cell: {digit}})]

    alone = settle(left)
    assert any(len(options) > 1 for options in alone.values()) == search
    (only,) = solve_(left)
    return only


SOLVERS = {
    "parity": (parity, (1, 9, 1000)),
    "running_parity": (running_parity, (1, 12)),
    "modular": (modular, (1, 2, 9)),
    "hops": (hops, (1, 4, 32)),
    "addition": (addition, (1, 5)),
    "listops": (listops, (1, 2, 5)),
    "dyck": (dyck, (1, 2, 7)),
    "path": (path, (1, 4, 15)),
    "maze": (maze, (2, 5)),
    "sudoku4": (lambda *a: sudoku(2, 2, False, *a), (1, 11)),
    "sudoku6": (lambda *a: sudoku(2, 3, False, *a), (1, 22)),
    "sudoku9": (lambda *a: sudoku(3, 3, False, *a), (45,)),
    "sudoku9_search": (lambda *a: sudoku(3, 3, True, *a), (50,)),
}
SOLVERS |= {
    f"{name}_in_place": SOLVERS[name] for name in SOLVERS if name.startswith(("maze", "sudoku"))
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_another_solver(name):
    solver, difficulties = SOLVERS[name]
    spelt = Symbols(TASKS[name].symbols)
    for difficulty in difficulties:
        rng = np.random.default_rng(difficulty)
        for _ in range(1 if name.startswith("sudoku9") else 4):
            inputs, targets = draw(name, rng, difficulty)
            asked = targets[targets != NOTHING]
            given = spelt.decode(inputs).decode()
            if TASKS[name].in_place:
                assert given.split().index("=") == len(inputs) - 1, "the grid is read once"
                given = f"{given} {given.rstrip('= ')}"  # twice, as the solvers have it
            assert spelt.decode(asked).decode().split() == solver(difficulty, given)
            if "=" in TASKS[name].symbols and not name.startswith(("maze", "sudoku")):
                first = np.flatnonzero(targets != NOTHING)[0]
                assert TASKS[name].symbols[inputs[first]] == "=", (
                    "nothing of an answer is read before it is asked"
                )
                np.testing.assert_array_equal(inputs[first + 1 :], targets[first:-1])


def test_a_problem_can_be_printed(monkeypatch, capsys):
    for name in ("sudoku4", "sudoku4_in_place"):
        monkeypatch.setattr(sys, "argv", ["tasks", name, "6", "--seed=1"])
        tasks.main()
        rows = [line.split("   ") for line in capsys.readouterr().out.splitlines()]
        assert sum(given.count(".") for given, _ in rows) == 6
        assert all(sorted(answer.split()) == ["1", "2", "3", "4"] for _, answer in rows)


def test_a_grid_in_place_is_seen_whole_and_what_fills_it_up_is_not(cache):
    config = base()
    config.update_from_flattened_dict(
        {**TINY, "data.task": "maze_in_place", "data.low": 2, "data.high": 3}
    )
    config.data.update({"context": 26, "problems": 20, "cache_dir": str(cache)})
    model = make_model(config, len(TASKS["maze_in_place"].symbols))
    params = drawn(model)
    end = boundary("maze_in_place")
    held_out = load_data(config.data).validation
    for example in (held_out[i] for i in range(len(held_out))):
        np.testing.assert_array_equal(example.segments, np.cumsum(example.inputs == end))

    @jax.jit
    def predicted(batch):
        return predict(model.apply, params, batch, jnp.float32)[0]

    def read(inputs):
        return predicted(Batch(inputs, segments=segments_of(inputs, end)))

    grid = draw("maze_in_place", np.random.default_rng(0), 2).inputs  # nine cells and "="
    alone = read(grid[None])
    filled = read(padded(Problem(grid, grid), 32).inputs[None])
    np.testing.assert_allclose(filled[:, :9], alone[:, :9], rtol=1e-5, atol=1e-6)
    changed = grid.copy()
    changed[8] = (changed[8] + 1) % 5
    assert np.all(np.any(read(changed[None])[:, :9] != alone[:, :9], axis=-1)), (
        "each cell sees the last one"
    )
    with pytest.raises(ValueError, match="has no cache"):
        model.init_cache(1, 10)


# ---- Sets ----------------------------------------------------------------------------------------


def test_parts_share_no_problem_and_tell_nothing_of_the_answer():
    parts = {}
    for seed, part in enumerate(("train", "validation", "test")):
        found = draw_set("modular", 2, 3, {part: 300}, seed)[part]
        parts[part] = {tuple(problem.inputs.tolist()) for problem in found}
    for a, b in itertools.combinations(parts.values(), 2):
        assert not a & b
    assert sum(map(len, parts.values())) > 300, "and they are many"
    odd = {part: [] for part in parts}
    for bits in itertools.product((0, 1), repeat=10):
        odd[part_of(Problem(np.array([*bits, 2], np.int32), np.empty(0)))].append(sum(bits) % 2)
    assert {part: round(np.mean(answers), 1) for part, answers in odd.items()} == dict.fromkeys(
        odd, 0.5
    )
    assert 0.75 < len(odd["train"]) / 1024 < 0.85


def test_a_part_without_problems_is_a_clear_error():
    with pytest.raises(
        UserError, match=r"data.task='parity' has too few problems of difficulty 1 to 1 .* for test"
    ):
        draw_set("parity", 1, 1, {"test": 1}, 0)


@pytest.fixture
def asked(cache) -> ConfigDict:
    """A run of seconds on brackets."""
    config = base()
    config.update_from_flattened_dict(TINY)
    config.data.update(
        {
            "task": "dyck",
            "low": 1,
            "high": 3,
            "problems": 1000,
            "context": 40,
            "cache_dir": str(cache),
        }
    )
    config.model.update({"rule": "dense", "rounds": 2})  # the quickest to compile
    config.train.update(
        {"steps": 150, "batch_size": 32, "learning_rate": 3e-2, "state_learning_rate": 3e-2}
    )
    (
        config.train.log_every,
        config.eval.every,
        config.checkpoint.every_steps,
        config.stability.every,
    ) = 150, 150, 150, 0
    return config


def padded(problem, length):
    """As the decoder reads it, to the right of which nothing is asked."""
    inputs, targets = np.zeros(length, np.int32), np.full(length, NOTHING, np.int32)
    inputs[: len(problem.inputs)], targets[: len(problem.targets)] = problem
    return Batch(inputs, targets)


def test_a_set_follows_from_its_seed_and_is_drawn_once(tmp_path):
    def drawn(seed):
        return problem_set("addition", 1, 3, {"train": 40, "validation": 4}, seed, tmp_path)

    first = drawn(0)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert drawn(0) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == made
    assert drawn(1).fingerprint != first.fingerprint
    assert "40 train, 4 validation problems of up to 11 tokens" in first.summary
    kept = Problems(first.home, "train", 13)
    fresh = draw_set("addition", 1, 3, {"train": 40, "validation": 4}, 0)["train"]
    assert len(kept) == 40
    read, written = [kept[i] for i in range(40)], [padded(problem, 13) for problem in fresh]
    read, written = (
        sorted(one.inputs.tobytes() + one.targets.tobytes() for one in examples)
        for examples in (read, written)
    )
    assert read == written


def test_batches_of_problems_are_a_function_of_the_step(asked):
    problems = load_data(asked.data).train
    options = {"batch_size": 4, "seed": 3, "stop": 9}
    whole = list(train_batches(problems, start=0, **options))
    assert len(whole) == 9
    assert whole[0].inputs.shape == whole[0].targets.shape == (4, 40)
    later = list(train_batches(problems, start=5, **options))
    jax.tree.map(np.testing.assert_array_equal, whole[5:], later)


# ---- A run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chess"}, "data.task='chess': must be one of '', 'parity', 'running_parity'"),
        (
            {"task": "maze_in_place", "low": 2, "model.kind": "bdh"},
            "model.kind='bdh': must be 'decoder' where data.task=",
        ),
        (
            {"task": "maze_in_place", "low": 2, "iteration.rounds": "marked"},
            "iteration.rounds='marked': must be another",
        ),
        ({"task": "maze"}, r"data.low=1: must be 2 or more \(rooms of a side\)"),
        ({"task": "path", "high": 20}, r"data.high=20: must be at most 15 \(edges of the path\)"),
        ({"task": "parity", "low": 11}, "data.low=11: must be at most data.high=10"),
        ({"task": "parity", "path": "a.txt"}, "data.task='parity': must be '' where data.path"),
        (
            {"task": "parity", "isolate_documents": True},
            "data.isolate_documents=True: must be False",
        ),
        ({"task": "parity", "problems": 0}, "data.problems=0: must be 1 or more"),
    ],
)
def test_impossible_tasks_are_refused(fields, message):
    config = base()
    config.update_from_flattened_dict(
        {name if "." in name else f"data.{name}": v for name, v in fields.items()}
    )
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_context_that_is_too_short_is_named_with_what_it_must_be(asked):
    asked.data.context = 5
    with pytest.raises(UserError, match=r"data.context=5: must be [23]\d or more, .* data.high=3"):
        load_data(asked.data)


def test_solved_is_all_right_where_asked():
    draws = np.random.default_rng(0)
    logits, targets = draws.normal(size=(50, 3, 2)), draws.integers(-1, 2, (50, 3))
    plain = [
        all(t < 0 or row[t] == row.max() for row, t in zip(*one, strict=True))
        for one in zip(logits, targets, strict=True)
    ]
    assert 5 < sum(plain) < 45
    np.testing.assert_array_equal(jax.jit(solved)(logits, targets), plain)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "brackets"


def test_a_run_learns_a_task_and_is_scored_by_difficulty(asked, kept, monkeypatch, capsys):
    assert train.run(asked, kept)
    held_out = load_data(asked.data).validation
    asked_for = [held_out[i].targets for i in range(len(held_out))]
    answers = Counter(tuple(targets[targets >= 0]) for targets in asked_for)
    guessing = answers.most_common(1)[0][1] / len(held_out)
    assert read_rows(kept)[-1]["final/exact"] > guessing + 0.3
    assert load_tokenizer(kept, asked.data).symbols == TASKS["dyck"].symbols
    assert (
        f"| share of held-out problems solved | {read_rows(kept)[-1]['final/exact']:.4f} |"
        in (kept / "card.md").read_text()
    )

    capsys.readouterr()
    monkeypatch.setattr(
        sys,
        "argv",
        ["solve", f"--workdir={kept}", "--trust", "--difficulties=2,6", "--examples=100"],
    )
    command(solve.main)
    said = capsys.readouterr().out
    found = {
        int(row[0]): row
        for row in re.findall(r"(\d+) +100 +([\d.]+)%  ([\d.]+)% to ([\d.]+)%", said)
    }
    assert found.keys() == {2, 6}
    for _, exact, low, high in found.values():
        assert float(low) < float(exact) < float(high) or float(exact) in (0, 100)
    assert float(found[2][1]) > float(found[6][1]), (
        "harder ones than in training, and longer than its context"
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [*sys.argv[:3], "--difficulties=2", "--examples=20", "--rounds=settled", "--cap=3"],
    )
    command(solve.main)
    assert re.search(r" 20 +[\d.]+%  .*, [123]\.\d rounds", capsys.readouterr().out)


def test_exact_is_what_greedy_decoding_writes(kept):
    """Right answers that are read as they grow, and what stands to the right of a problem, do not
    help.
    """
    trained = load(kept)
    alike = {}  # problems whose question is as long, and whose answer is
    for problem in draw_set("dyck", 4, 4, {"test": 300}, 1)["test"]:
        alike.setdefault((len(problem.inputs), np.sum(problem.targets >= 0)), []).append(problem)
    (length, answers), problems = max(
        alike.items(), key=lambda item: len(item[1]) * (item[0][1] > 1)
    )
    prompts = jnp.array([problem.inputs[: length - answers + 1] for problem in problems])
    said = generate(
        trained.model, trained.params, prompts, int(answers), jax.random.key(0), Sampling(0.0)
    )
    right = np.all(np.array([problem.targets[-answers:] for problem in problems]) == said, axis=1)
    assert 0 < right.sum() < len(problems)
    examples = [padded(problem, length + 5) for problem in problems]
    result = score(
        trained.decoder.reshaped(context=length), trained.params, trained.config, examples
    )
    assert result["exact"] == pytest.approx(right.mean())
