"""The lens: what is said at each place of a decoder, by which neurons, and what they are for.

For: the logit lens, a logit as a sum of what neurons write, and units silenced or changed. Not for:
which texts excite a unit (`excitation.py`), or pages (`lens_page.py`). docs/lens.md has formulas.
A place is a stage or a round, by the names of `probes.activations`; a site is one of the two
synapses by which a stage writes to the stream. Axes: B sequences, T tokens, D width, V vocabulary,
N neurons that write at a site (channels of heads, or hidden neurons), P stages passed, U units.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngc_jax.analysis.probes import activations, stage_names, walk
from ngc_jax.data import NOTHING
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.synapse import Heard, intercept

Array = jax.Array
Params = dict[str, Any]
SITES = {"attention_out": "attention", "down": "exchange"}  # by the names of their synapses
Written = tuple[str, str]  # a stage passed, "core 1, round 2", and a site
Change = Callable[[Written, Array], Array]  # of what neurons write [B, T, N]


class Unit(NamedTuple):
    """Neighbouring neurons that write at one site of a stage: a group, a head or one neuron."""

    place: str  # "core 1, round 2"
    site: str  # "attention" or "exchange"
    first: int
    size: int
    name: str  # "group 3"

    def __str__(self) -> str:
        return f"{self.name}, {self.site}, {self.place}"


class Said(NamedTuple):
    """What the stream at a place says of the next token, by the logit lens."""

    nats: Array  # [B, T] of the token that came
    divergence: Array  # [B, T] KL from the model's own output, nats
    top: Array  # [B, T] the likeliest token
    share: Array  # [B, T] its probability


class Maps(NamedTuple):
    """An affine map of the stream at each place, x A + b: A [places, D, D] and b [places, D]."""

    matrix: Array
    shift: Array


def places(model: Decoder) -> list[str]:
    """The names of all places, in order."""
    s, stages = model.shape, iter(stage_names(model.shape))
    found = ["embedding", *(next(stages) for _ in range(s.prelude))]
    for turn in range(s.rounds if s.core else 0):
        found += [*(next(stages) for _ in range(s.core)), f"round {turn + 1}"]
    return [*found, *stages]


def logit_lens(
    model: Decoder, params: Params, batch: Batch, maps: Maps | None = None
) -> OrderedDict[str, Said]:
    """What is said at each place, as if the model ended there (nostalgebraist, 2020).

    softmax(W norm(x_l)) with the model's own last norm and matrix of logits W; with `maps` (of
    `tuned_lens`) of x_l A_l + b_l. One place after the other is read, so that memory is that of two
    outputs [B, T, V].
    """
    found = activations(model, params, batch)
    last = jax.nn.log_softmax(model.unembed(params, next(reversed(found.values()))))

    def read(given: tuple[Array, Maps | None]) -> Said:
        logs = _read(model, params, *given)
        divergence = _divergence(last, logs)
        return Said(
            _nats(logs, batch.targets), divergence, jnp.argmax(logs, -1), jnp.exp(jnp.max(logs, -1))
        )

    said = jax.lax.map(read, (jnp.stack([*found.values()]), maps))
    return OrderedDict(
        (name, jax.tree.map(lambda a, i=i: a[i], said)) for i, name in enumerate(found)
    )


def tuned_lens(
    model: Decoder, params: Params, batches: Iterable[Batch], rate: float = 1e-3
) -> Maps:
    """Maps with which each place says best what the output says (arXiv 2303.08112).

    They begin as the identity; each batch is one update by Adam of the sum over places of
    KL(softmax(W norm(x_L)), softmax(W norm(x_l A_l + b_l))), the mean over tokens.
    """
    optimizer, width, count = optax.adam(rate), model.shape.width, len(places(model))
    maps = Maps(jnp.tile(jnp.eye(width), (count, 1, 1)), jnp.zeros((count, width)))

    @jax.jit
    def update(maps: Maps, state: Any, batch: Batch) -> tuple[Maps, Any]:
        streams = jnp.stack([*activations(model, params, batch).values()])
        last = jax.nn.log_softmax(model.unembed(params, streams[-1]))

        @jax.checkpoint
        def far(given: tuple[Array, Maps]) -> Array:
            return jnp.mean(_divergence(last, _read(model, params, *given)))

        grads = jax.grad(lambda maps: jnp.sum(jax.lax.map(far, (streams, maps))))(maps)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(maps, updates), state

    state = optimizer.init(maps)
    for batch in batches:
        maps, state = update(maps, state, batch)
    return maps


def _read(model: Decoder, params: Params, x: Array, maps: Maps | None) -> Array:
    """Log probabilities [B, T, V] that a stream at one place gives, mapped or as it is."""
    return jax.nn.log_softmax(model.unembed(params, x if maps is None else x @ maps[0] + maps[1]))


def _divergence(last: Array, logs: Array) -> Array:
    """KL [B, T] of log probabilities [B, T, V] of the output from others."""
    return jnp.sum(jnp.exp(last) * (last - logs), axis=-1)


def _nats(logs: Array, targets: Array) -> Array:
    """Nats [B, T] of the targets, 0 where nothing is asked, of log probabilities [B, T, V]."""
    nats = -jnp.take_along_axis(logs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == NOTHING, 0, nats)


class Attribution(NamedTuple):
    """The terms of a logit, by token: they sum to it."""

    embedding: Array  # [B, T]
    written: dict[Written, Array]  # [B, T, N] of each neuron that writes


def attribution(
    model: Decoder, params: Params, batch: Batch, tokens: Array, centred: bool = False
) -> Attribution:
    """How much of the logit of `tokens` [B, T] each neuron writes directly, and the embedding.

    centred: of the logit less the mean of all V, which is what a probability depends on.

    Neuron j of weights w_j and activity a_j gives a_j w_j . (c g / rms(x_L) u), u the column of the
    logit's matrix, g the last norm's scale, x_L the last stream, and c [D] what a loop leaves of
    what was written before: keep^(R - r) of round r, keep^R + drive (1 + ... + keep^(R - 1)) of all
    before the loop. The norm's length is held, as in direct logit attribution (Elhage et al. 2021).
    What is heard late (`model.delays`) is a term of the token that hears it.
    ValueError where the stream is no sum: `message_activation`, `state_activation`.
    """
    s = model.shape
    for field in ("message_activation", "state_activation"):
        if getattr(s, field) is not None:
            told = "what neurons write is no sum then; None is"
            raise ValueError(f"model.{field}={getattr(s, field)!r}: {told}")
    embedded, left = model.embed(params, batch), _left(model, params)
    last = model.stream(params, embedded, batch.segments)[0].astype(jnp.float32)
    matrix = params["unembed"].T if "unembed" in params else params["embed"]
    matrix = matrix - jnp.mean(matrix, axis=0) if centred else matrix
    length = jax.lax.rsqrt(jnp.mean(jnp.square(last), -1, keepdims=True) + s.norm_epsilon)
    towards = matrix[tokens] * params["norm"]["scale"] * length  # [B, T, D]
    written: dict[Written, Array] = {}

    def give(at: Written, one: Heard) -> None:
        written[at] = _by_listener(one, left[at[0]] * towards)

    run_with(model, params, batch, give)
    return Attribution(jnp.sum(left["embedding"] * embedded * towards, -1), written)


def _by_listener(one: Heard, towards: Array) -> Array:
    """a_j w_j . towards of each neuron [B, T, N], at the tokens t that hear it, towards [B, T, D].

    Of K tokens behind one another, each hears some of what a neuron says; of each K-th, one does.
    """
    back, at = jax.vjp(opened(one), one.x)[1], jnp.arange(one.x.shape[1])
    reach, found = 1 + one.synapse.longest, jnp.zeros_like(one.x)
    for first in range(reach):
        heard = jnp.where((at % reach == first)[:, None], towards, 0)
        late = at + (first - at) % reach
        found = found.at[:, late].add(one.x * back(heard)[0], mode="drop")
    return found


def _left(model: Decoder, params: Params) -> dict[str, Array]:
    """What is left in the last stream of what is written at a stage, by channel: [D]."""
    s, one = model.shape, jnp.ones(model.shape.width)
    if not s.core:
        return dict.fromkeys(["embedding", *stage_names(s)], one)
    keep, drive = model.scales(params)
    powers = [keep**n for n in range(s.rounds + 1)]
    before = powers[-1] + drive * sum(powers[:-1])
    left = {"embedding": before}
    for name in stage_names(s):
        stack, _, turn = name.partition(", round ")
        kind = stack.partition(" ")[0]
        left[name] = {"prelude": before, "coda": one}.get(kind, powers[s.rounds - int(turn or 0)])
    return left


def opened(one: Heard) -> Callable[[Array], Array]:
    """A synapse that was called, as a function of x [B, T, N]: what it writes [B, T, D]."""
    states = {"params": one.synapse.variables["params"]}
    unbound = one.synapse.clone(parent=None, name=None)

    def act(synapse: Any, x: Array) -> Array:  # not its `__call__`, which is listened to
        return synapse.opened(one.members)(x, one.segments)[..., 0, :]

    return lambda x: jnp.asarray(unbound.apply(states, x, method=act))


def run_with(
    model: Decoder,
    params: Params,
    batch: Batch,
    at_site: Callable[[Written, Heard], Any] = lambda at, one: None,
    after: Callable[[str, Array], Array] = lambda place, x: x,
) -> Array:
    """The last stream [B, T, D], where at_site(written, heard) may return what a site writes.

    after(place, x) is what goes on in the place of the stream x [B, T, D] after a stage.
    """
    names, last = iter(stage_names(model.shape)), [model.embed(params, batch)]

    def keep(_: Any, x: Array) -> None:
        last[0] = x

    def visit(run: Callable[..., Any], x: Array, route: Array | None) -> tuple[Array, None]:
        place = next(names)

        def listen(one: Heard) -> Array | None:
            site = SITES.get(str(one.synapse.name))
            return None if site is None else at_site((place, site), one)

        with intercept(listen):
            x = after(place, run(x, route)[0])
        keep(None, x)
        return x, None

    walk(model, params, batch, visit, keep)
    return last[0]


def changed(model: Decoder, params: Params, batch: Batch, change: Change) -> Array:
    """Logits [B, T, V] where change(written, a) is what neurons write in the place of a [B, T, N].

    A change of nothing, a -> a, gives the model's own. Silencing, patching from another run and
    clipping are such changes.
    """

    def write(at: Written, one: Heard) -> Array:
        return opened(one)(change(at, one.x))[..., None, :]

    return model.unembed(params, run_with(model, params, batch, write))


class Patched(NamedTuple):
    """What streams of one prompt restore in a run on another. T tokens; P: embedding and stages."""

    restored: Array  # [P, T] share of the difference of logits that is restored; 1: all
    right: Array  # [] the token that the model says after the first prompt
    wrong: Array  # [] and after the other one


def patching(model: Decoder, params: Params, prompt: Batch, other: Batch) -> Patched:
    """Activation patching between two prompts of as many tokens, [1, T] each (arXiv 2202.05262).

    In a run on `other` the stream after a place is that of `prompt`, at one token alone. With
    d = logit(right) - logit(wrong) after the last token, it restores (d - d_other) / (d_prompt -
    d_other); nan where both prompts are followed by the same token.
    """
    names, length = stage_names(model.shape), prompt.inputs.shape[1]
    kept = activations(model, params, prompt)
    ends = [model.apply(params, one)[0][0, -1] for one in (prompt, other)]
    right, wrong = (jnp.argmax(logits) for logits in ends)

    def apart(logits: Array) -> Array:
        return logits[..., right] - logits[..., wrong]

    def run(at: tuple[Array, Array]) -> Array:
        number, token = at

        def after(place: str, x: Array) -> Array:
            here = (jnp.arange(length) == token) & (number == names.index(place))
            return jnp.where(here[None, :, None], kept[place], x)

        last = run_with(model, params, other, after=after)
        return apart(model.unembed(params, last[:, -1:])[0, 0])

    swapped = jnp.where(jnp.eye(length, dtype=bool), prompt.inputs, other.inputs)
    first = apart(model.apply(params, Batch(swapped))[0][:, -1])
    pairs = jnp.meshgrid(jnp.arange(len(names)), jnp.arange(length), indexing="ij")
    rest = jax.lax.map(run, tuple(one.reshape(-1) for one in pairs)).reshape(-1, length)
    low, high = apart(ends[1]), apart(ends[0])
    restored = (jnp.concatenate([first[None], rest]) - low) / (high - low)
    return Patched(restored, right, wrong)


def activity(model: Decoder, params: Params, batch: Batch) -> dict[Written, Array]:
    """What neurons write, a [B, T, N], at each site of each stage."""
    found: dict[Written, Array] = {}
    run_with(model, params, batch, lambda at, one: found.update({at: one.x}))
    return found


def units(model: Decoder, what: str = "group") -> list[Unit]:
    """Every group, head or stage's site of a model, in a token's order. ValueError: another."""
    s = model.shape
    most = {"attention": s.heads * s.head_size, "exchange": s.hidden}
    counts = {
        "group": {"attention": s.groups, "exchange": s.groups},
        "head": {"attention": s.heads},
        "site": {"attention": 1, "exchange": 1},
        "neuron": most,
    }
    if what not in counts:
        raise ValueError(f"what={what!r}: must be one of {', '.join(counts)}")
    return [
        Unit(place, site, i * most[site] // n, most[site] // n, f"{what} {i}" if n > 1 else "all")
        for place in stage_names(s)
        for site, n in counts[what].items()
        for i in range(n)
    ]


def means(model: Decoder, params: Params, batch: Batch) -> dict[Written, Array]:
    """The mean activity of each neuron over a batch, [N], to silence units with."""
    return {at: jnp.mean(a, axis=(0, 1)) for at, a in activity(model, params, batch).items()}


def silenced_nats(
    model: Decoder, params: Params, batch: Batch, silent: list[Unit], fill: dict[Written, Array]
) -> Iterator[np.ndarray]:
    """Nats [B, T] of a batch with nothing silenced, then with each unit by itself.

    A silent neuron writes `fill` [N] (`means`; or zeros) in the place of its activity: mean and
    zero ablation. One program is compiled, whatever the number of units.
    """
    number = {place: i for i, place in enumerate(stage_names(model.shape))}
    sites = [*SITES.values()]

    @jax.jit
    def nats(params: Params, fill: Any, batch: Batch, unit: tuple[Array, ...]) -> Array:
        place, site, first, count = unit

        def change(at: Written, a: Array) -> Array:
            here = (place == number[at[0]]) & (site == sites.index(at[1]))
            neurons = jnp.arange(a.shape[-1])
            off = here & (neurons >= first) & (neurons < first + count)
            return jnp.where(off, fill[at].astype(a.dtype), a)

        logs = jax.nn.log_softmax(changed(model, params, batch, change))
        return _nats(logs, batch.targets)

    fill_of = {at: jnp.asarray(one) for at, one in fill.items()}
    for one in [None, *silent]:
        at = (-1, 0, 0, 0)
        if one is not None:
            at = (number[one.place], sites.index(one.site), one.first, one.size)
        yield np.asarray(nats(params, fill_of, batch, tuple(map(jnp.int32, at))))
