"""Held-out loss, problems solved and stability of a model, over as many rounds as one asks for.

For: sums over held-out batches as nats per target, bits per byte or problems solved. Not for: one
batch (`step.py`), or the stability measures (`stability_metrics.py`).
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ngc_jax.data import cache, tasks
from ngc_jax.data.batches import Examples, filled, held_out_batches
from ngc_jax.data.problems import Problems, problem_set
from ngc_jax.data.tokens import Data
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.settings import tokens_of
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.output import come
from ngc_jax.training.rounds import Apply, mark_of, marked
from ngc_jax.training.settled import Settled
from ngc_jax.training.stability_metrics import make_watch
from ngc_jax.training.step import SELDOM, make_eval_step

ATTENDED = 2**23  # pairs of positions in a batch at most, so that long problems fit in memory
Rounds = int | Settled | None  # rounds of the loop; None: those of training
Step = Callable[..., Any]  # the evaluation of one batch, `make_eval_step`
Watch = Callable[[Any], dict[str, float]]  # params -> a row of stability measures


def at_rounds(
    model: LanguageModel, config: Any, rounds: Rounds
) -> tuple[LanguageModel, Apply | None]:
    """The model at these rounds, what replaces `apply` if they differ by token; or UserError."""
    if rounds is None:
        return model, marked(model, config)
    if not isinstance(model, Decoder) or not model.shape.core:
        raise UserError(f"rounds={rounds}: must not be given for a model without a loop")
    if isinstance(rounds, Settled):
        return model, partial(model.settle, tolerance=rounds.tolerance, cap=rounds.cap)
    if rounds < 1:
        raise UserError(f"rounds={rounds}: must be 1 or more, for instance 8")
    return model.at(rounds), None


def compile_eval(
    model: LanguageModel, config: Any, mesh: Mesh, data: Data, settle: Apply | None = None
) -> Step:
    """The jitted evaluation of one batch on a mesh; `settle`, if given, replaces `model.apply`."""
    of = data.tokenizer
    step = make_eval_step(model, config.train, of.lengths, settle, getattr(of, "score", ""))
    return jax.jit(meshes.with_mesh(mesh, step), out_shardings=meshes.replicated(mesh))


def held_out(
    step: Step, params: Any, mesh: Mesh, examples: Examples, batch_size: int, limit: int = 0
) -> dict[str, float]:
    """Means over `limit` examples (0: all, and every token of a text once), by the sums of `step`.

    "loss": nats per target. "bits_per_byte": of text, comparable over tokenizers. "exact": share of
    problems with every answer right; "accuracy": of images whose class is. "rounds" per target: of
    a loop that runs until it settles.
    """
    rows, total = meshes.local_batch_rows(mesh, batch_size), Counter[str]()
    examples = examples if limit else filled(examples)
    count = -(-min(limit or len(examples), len(examples)) // batch_size)
    batches = held_out_batches(examples, batch_size=batch_size, limit=limit, rows=rows)
    for number, placed in enumerate(batches, 1):
        sums = step(params, *(meshes.put_batch(mesh, part) for part in placed))
        total.update(jax.tree.map(float, jax.device_get(sums)))
        come(number, count)
    means = {"loss": total["nats"] / total["targets"]}
    score = next((name for name in ("exact", "accuracy") if name in total), "")
    if score:
        means[score] = total[score] / total["examples"]
    elif total["bytes"]:  # none are known of tokens of others
        means["bits_per_byte"] = total["nats"] / math.log(2) / total["bytes"]
    if "rounds" in total:
        means["rounds"] = total["rounds"] / total["targets"]
    return means


def compile_watch(model: Decoder, config: Any, mesh: Mesh, data: Data) -> Watch:
    """The measures of `config.stability`, means over held-out windows, each counted as often."""
    parts, available = mesh.size // mesh.shape["group"], len(data.validation)
    wanted = -(-config.stability.tokens // (tokens_of(config) * parts)) * parts
    count = min(wanted, available // parts * parts) or math.lcm(available, parts)
    spread = np.linspace(0, available - 1, count).round().astype(int)
    chosen = spread if count <= available else np.arange(count) % available
    rows = meshes.local_batch_rows(mesh, count)
    batches = held_out_batches([data.validation[i] for i in chosen], batch_size=count, rows=rows)
    batch = meshes.put_batch(mesh, next(batches)[0])
    watch = meshes.with_mesh(mesh, make_watch(model, config.stability))
    step = jax.jit(watch, out_shardings=meshes.replicated(mesh), compiler_options=SELDOM)
    return lambda params: jax.tree.map(float, jax.device_get(step(params, batch)))


def score(
    model: LanguageModel, params: Any, config: Any, problems: Examples, settle: Apply | None = None
) -> dict[str, float]:
    """`held_out` of problems; `settle`, if given, replaces `model.apply`."""
    mesh, evaluate = meshes.single_device(), make_eval_step(model, config.train, None, settle)
    rows = max(1, min(config.eval.batch_size, ATTENDED // len(problems[0].targets) ** 2))
    return held_out(jax.jit(meshes.with_mesh(mesh, evaluate)), params, mesh, problems, rows)


def examine(
    model: LanguageModel,
    params: Any,
    config: Any,
    difficulty: int,
    examples: int,
    *,
    seed: int = 0,
    attend: int | None = None,
    rounds: Rounds = None,
) -> dict[str, float]:
    """`score` on test problems of a difficulty, unseen in training, drawn from a seed.

    Attention looks back on `attend` tokens; 0: on all of a problem; None: as in training.
    """
    data, mark, counts = config.data, mark_of(config), {"test": examples}
    home = cache.cache_directory(data)
    found = problem_set(data.task, difficulty, difficulty, counts, seed, home)
    ends = tasks.boundary(data.task) if mark is None else mark
    problems = Problems(found.home, "test", found.longest, ends)
    attend = config.model.attend if attend is None else attend
    if isinstance(model, Decoder):
        model = model.reshaped(context=attend or max(found.longest, data.context))
    model, settle = at_rounds(model, config, rounds)
    return score(model, params, config, problems, settle)
