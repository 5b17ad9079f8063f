"""A dense model in another form: fewer numbers in each matrix, by a method and a share kept.

For: `fit`, which gives every matrix its factors, `convert`, which makes a work directory of them,
and `formed`, the way back. Not for: a single matrix (`methods.py`), ranks, or Grams.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.config import make_model, reset_unread, validate
from ngc_jax.convert import ranks as budgets
from ngc_jax.convert.calibrate import Sums, problems
from ngc_jax.convert.config_json import CONVERTED
from ngc_jax.convert.flow import Stage, shifted_problems
from ngc_jax.convert.leaders import leaders
from ngc_jax.convert.methods import METHODS, RECIPES, SHARED_IN_DEPTH, Decomposition
from ngc_jax.convert.methods import stacked as joined_problem
from ngc_jax.convert.pretrained import begin
from ngc_jax.core.rules import weights
from ngc_jax.data.batches import Batch
from ngc_jax.nn import stacks
from ngc_jax.nn.model import Params
from ngc_jax.nn.ranks import MEMBERS, Joined, write
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.sharing import FANS, spread, take
from ngc_jax.runtime import files
from ngc_jax.runtime.fields import refusals
from ngc_jax.training.load import Trained

Array = np.ndarray
ALLOTTED: dict[str, Callable[..., list[int]]] = {
    "uniform": budgets.uniform,
    "greedy": budgets.greedy,
    "price": budgets.by_price,
}
IN_FLOW = ("mpifa", "aa_svd")
READERS = (  # the ways in which members of a stage that read the same may have one signal
    ("query|key|value", "query+key|value", "query+value|key", "query|key+value", "query+key+value"),
    ("gate|up", "gate+up"),
)


class Group(NamedTuple):
    """Matrices with one signal, their outputs stacked."""

    places: tuple[tuple[int, str], ...]  # stage, member
    of: Decomposition
    weight: Array  # W [m, n]


Choices = list[list[list[Group]]]  # for matrices that may have one signal, each way of it


class Fitted(NamedTuple):
    """A matrix of some members of a stage, W = post pre^T, or at rank 0 the dense one."""

    joined: Joined
    made: Array  # W [m, n]
    post: Array  # [m, r]
    pre: Array  # [n, r]
    beside: Params  # the post states of parts beside the factors, by name: of other forms


Cut = tuple[int, Fitted]  # the stage, and what it has of a group


class Fit(NamedTuple):
    """The factors of all matrices of a model, by stage, and what they cost."""

    stages: list[list[Fitted]]
    counted: str  # "led": r receivers of each matrix are its signal; "factored": none are
    predicted: float  # loss, by the method: nats a token where it knows these
    numbers: dict[str, int]  # in the matrices: "dense", and with these ranks "factored" and "led"
    fields: dict[str, Any]  # of `config.model`: of other forms


def fit(
    trained: Trained,
    means: Sums,
    method: str,
    kept: float,
    share: bool = False,
    batch: Batch | None = None,
) -> Fit:
    """The factors of every matrix of a dense model, by a method of `METHODS`.

    kept: the share of numbers that stays, above 0 and below 1. `share` lets the price choose which
    members of a stage have one signal. With the batch of the means, methods `IN_FLOW` see what the
    stages before have become. Raises UserError for other values.
    """
    need = refusals({"method": method, "kept": kept, "share": share})
    need(method in METHODS, "method", f"one of {', '.join(METHODS)}")
    need(0 < kept < 1, "kept", "above 0 and below 1, for instance 0.8")
    priced = RECIPES[method][0] == "price"
    need(priced or not share, "share", "False where the method has no price, as 'ngc' has")
    if method in IN_FLOW and batch is not None:
        return _fit_in_flow(trained, means, method, kept, batch)
    need(method != "aa_svd", "method", "another one where the batch is not given")
    return allot(decompose(trained, means, method, share), method, kept)


def decompose(trained: Trained, means: Sums, method: str, share: bool = False) -> Choices:
    """The part of `fit` that no share kept changes, for methods outside `IN_FLOW`."""
    return list(_choices(problems(trained.decoder, trained.params, means), method, share))


def allot(choices: Choices, method: str, kept: float) -> Fit:
    """`fit` of matrices that are decomposed: their ranks, and the factors cut."""
    how, counted = RECIPES[method]
    count = budgets.COUNTS[counted]
    groups = [group for candidates in choices for group in candidates[0]]
    if any(len(candidates) > 1 for candidates in choices):
        priced = [[[_priced(g) for g in groups] for groups in one] for one in choices]
        taken, ranks = budgets.partition(priced, kept, count)
        groups = [g for one, which in zip(choices, taken, strict=True) for g in one[which]]
    else:
        tails, sizes = zip(*map(_priced, groups), strict=True)
        given = (sizes,) if how == "uniform" else (tails, sizes)
        ranks = ALLOTTED[how](*given, kept, count)
    ranks = [max(rank, 1) for rank in ranks]  # 0 would stand for a dense matrix
    cuts = [list(_cut(group, rank)) for group, rank in zip(groups, ranks, strict=True)]
    return _finished(groups, ranks, cuts, counted)


def _fit_in_flow(trained: Trained, means: Sums, method: str, kept: float, batch: Batch) -> Fit:
    """`fit` of one stage after another, at the same share of each matrix."""
    (_, counted), groups, ranks = RECIPES[method], list[Group](), list[int]()
    cuts: list[list[Cut]] = []
    flow = shifted_problems(trained, means, batch)
    for number, (stage, weights_before, replace) in enumerate(flow):
        made: dict[tuple[str, ...], Array] = {}
        for member in MEMBERS:
            group = _group([(number, stage)], [member], method)
            ranks += budgets.uniform([_priced(group)[1]], kept, budgets.COUNTS[counted])
            ranks[-1] = max(ranks[-1], 1)
            groups.append(group)
            cuts.append(list(_cut(group, ranks[-1])))
            made |= {one.joined.members: one.made for _, one in cuts[-1]}
        replace(weights_before | take(_dense_stack(trained.decoder, [made]), 0))
    return _finished(groups, ranks, cuts, counted)


def _finished(groups: list[Group], ranks: list[int], cuts: list[list[Cut]], counted: str) -> Fit:
    by_stage = collections.defaultdict(list)
    for number, fitted in itertools.chain(*cuts):
        by_stage[number].append(fitted)
    stages = [by_stage[number] for number in range(len(by_stage))]
    sizes = [_priced(group)[1] for group in groups]
    numbers = {name: budgets.spent(ranks, sizes, of) for name, of in budgets.COUNTS.items()}
    lost = sum(float(group.of.loss(rank)) for group, rank in zip(groups, ranks, strict=True))
    return Fit(stages, counted, lost, {"dense": sum(m * n for m, n in sizes), **numbers}, {})


def _choices(stages: Iterable[Stage], method: str, share: bool) -> Iterator[list[list[Group]]]:
    """`Choices`, one after another."""
    depth = 2 if method == "basis_sharing" else 1
    numbered = enumerate(stages)
    while together := list(itertools.islice(numbered, depth)):
        joint = set[str]()
        for ways in READERS if share else ():
            joint |= set(ways[0].split("|"))
            parts = [[one.split("+") for one in way.split("|")] for way in ways]
            yield [[_group(together, members, method) for members in way] for way in parts]
        for member in MEMBERS:
            if member in joint:
                continue
            if member in SHARED_IN_DEPTH:
                yield [[_group(together, [member], method)]]
            else:
                yield from ([[_group([one], [member], method)]] for one in together)


def _group(stages: list[tuple[int, Stage]], members: list[str], method: str) -> Group:
    places = [(number, member) for number, _ in stages for member in members]
    known = [stage[member] for _, stage in stages for member in members]
    weight = np.concatenate([problem.weight for problem in known])
    if len(stages) == 1 and len(known) > 1:
        known = [joined_problem(*known)]
    return Group(tuple(places), METHODS[method](*known), weight.astype(np.float32))


def _priced(group: Group) -> tuple[Array, tuple[int, int]]:
    return group.of.tail, (group.weight.shape[0], group.weight.shape[1])


def _cut(group: Group, rank: int) -> Iterator[Cut]:
    """What each stage has of a group at this rank; at full rank the matrix stays as it is."""
    whole = rank == min(group.weight.shape)
    post, pre = group.of.factors(0 if whole else rank)
    rows = len(group.weight) // len({number for number, _ in group.places})
    by_stage = itertools.groupby(group.places, lambda place: place[0])
    for part, (number, places) in enumerate(by_stage):
        own = slice(part * rows, (part + 1) * rows)
        joined = Joined(tuple(member for _, member in places), 0 if whole else rank)
        made = group.weight[own] if whole else (post[own] @ pre.T).astype(np.float32)
        yield number, Fitted(joined, made, post[own], pre, {})


def convert(trained: Trained, found: Fit, workdir: files.Path, origin: str = "") -> None:
    """Makes a work directory of the model with these factors, as its step 0.

    Raises UserError for a directory that is not empty.
    """
    config, model = trained.config.copy_and_resolve_references(), trained.decoder
    rule = "leaders" if found.counted == "led" else "broadcast"
    fields = {"rule": rule, "prelude": model.shape.depth, "core": 0, "coda": 0, "groups": 1}
    config.update_from_flattened_dict(CONVERTED)
    fields |= found.fields
    config.model.update(fields | {"ranks": write([[f.joined for f in s] for s in found.stages])})
    reset_unread(config)
    validate(config, here=False)
    kept = {name: value for name, value in trained.params.items() if name not in stacks.STACKS}
    taught = stacks.stages_of(stacks.join_stages(model.shape, trained.params)[0])
    names = set(model.shape.fans())
    rest = [{name: v for name, v in stage.items() if name not in names} for stage in taught]
    stages = [
        own | {fitted.joined.name: _states(fitted, config.model.rule) for fitted in stage}
        for own, stage in zip(rest, found.stages, strict=True)
    ]
    begin(workdir, config, trained.tokenizer, kept | {"prelude": stacks.numbered(stages)}, origin)


def _states(fitted: Fitted, rule: str) -> Params:
    """The parameters of a synapse with these factors."""
    if not fitted.joined.rank:
        return {"dense_block": {"weight": jnp.asarray(fitted.made[None, None])}}
    states: Params = {"pre": fitted.pre, "post": fitted.post}
    if rule == "leaders":
        lead, rest, order = leaders(fitted.post, fitted.pre)
        states = {"pre": lead, "post": {"state": rest, "gain": np.ones(()), "order": order}}

    def cast(array: Array) -> Any:  # the axis of a fan of one
        return jnp.asarray(array, jnp.int32 if array.dtype == np.int32 else jnp.float32)[None]

    beside = {name: {"post": post} for name, post in fitted.beside.items()}
    return jax.tree.map(cast, {f"inter_{rule}": states, **beside})


def reconstructed(trained: Trained, found: Fit) -> Params:
    """The dense model's parameters with the matrices that the factors make: the same outputs."""
    model, params = trained.decoder, trained.params
    made = [{one.joined.members: one.made for one in stage} for stage in found.stages]
    stack, senders = stacks.join_stages(model.shape, params)
    return stacks.split_stages(model.shape, params, stack | _dense_stack(model, made), senders)


def formed(trained: Trained) -> Trained:
    """A converted model as a dense one: its weights are formed, its outputs stay."""
    config, shape = trained.config.copy_and_resolve_references(), trained.decoder.shape
    config.model.update({"rule": "dense", "ranks": "", "form": "weights", "groups": 1})
    reset_unread(config)
    model = make_model(config, shape.vocab)
    made, rest = [], []
    for number, stage in enumerate(stacks.stages_of(stacks.get_stack(trained.params, "prelude"))):
        alone: Iterable[tuple[str, Array]] = formed_weights(shape, stage, number).items()
        made.append(dict[tuple[str, ...], Array]({(member,): w for member, w in alone}))
        rest.append({n: v for n, v in stage.items() if n not in shape.fans(number)})
    others = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)
    params = trained.params | {"prelude": others | _dense_stack(model, made)}
    return dataclasses.replace(trained, config=config, model=model, params=params)


def formed_weights(shape: ModelShape, stage: Any, number: int = 0) -> dict[str, np.ndarray]:
    """The weights [n_out, n_in] of the members of a stage's synapses, from its expanded states.

    number: of the stage, where they differ in shape. Activations of signals are left out.
    """
    found: dict[str, np.ndarray] = {}
    for synapse, parts in shape.summands(number).items():
        fan, summands = shape.fans(number)[synapse], []
        own = shape.shared.of(synapse) if synapse in FANS else tuple(range(len(fan)))
        senders = (0,) if shape.apart else own
        for part in parts:
            states = stage[synapse][part.name]
            pre, post = states.get("pre", ()), states.get("post", states.get("weight"))
            made = jax.vmap(partial(weights, part.how))(spread(senders, pre), post)
            summands.append(np.asarray(made).reshape(-1, made.shape[-1]))
        ends = np.cumsum([shape.sizes[member][0] for member in fan])[:-1]
        found |= dict(zip(fan, np.split(sum(summands), ends), strict=True))
    return found


def _dense_stack(model: Any, made: list[dict[tuple[str, ...], Array]]) -> Params:
    """The synapses of a dense model, stages stacked, from matrices by stage and joined members."""
    s, by_member = model.shape, dict[tuple[int, str], Array]()
    for number, stage in enumerate(made):
        for members, whole in stage.items():
            parts = np.split(whole, np.cumsum([s.sizes[m][0] for m in members])[:-1])
            by_member |= {(number, m): part for m, part in zip(members, parts, strict=True)}
    stack = {}
    for synapse, members in s.fans().items():
        fans = [[by_member[number, m] for m in members] for number in range(len(made))]
        weight = jnp.asarray(np.stack([np.stack(fan)[:, None] for fan in fans]), jnp.float32)
        stack[synapse] = {"dense_block": {"weight": weight}}
    return stack
