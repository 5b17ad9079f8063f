"""Settings of the model, `config.model`: the table of fields, and the kinds of models.

For: `MODELS["mine"] = ModelKind(make, reads)`, and `MODEL.fields.append(Field(...))`. Not for: the
models themselves (`decoder.py`, `recurrent.py`, `bdh.py`), which know no config.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ngc_jax import nn
from ngc_jax.core.communicate import STATE_ACTIVATIONS
from ngc_jax.core.delays import Delays
from ngc_jax.core.delays import parse as parse_delays
from ngc_jax.core.rules import GATES, RULES, SignalRule, rules_between_groups, rules_with_delays
from ngc_jax.core.wiring import DYNAMIC, WIRINGS, channel_counts
from ngc_jax.data.tasks import both_ways
from ngc_jax.nn.ranks import parse as parse_ranks
from ngc_jax.nn.sharing import parse
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import SEEDS, Field, Need, Section, refusals

if TYPE_CHECKING:  # a table of settings does not need what takes a second to import
    from ngc_jax.nn.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """A kind of model, an entry of `MODELS`."""

    make: "Callable[[Any, int], LanguageModel]"  # of a config and a vocabulary
    reads: tuple[str, ...]  # the fields of `config.model` that may differ from their defaults
    check: Callable[[Any, Need], None] = lambda config, need: None  # refuses values together
    stages: bool = False  # make returns a `Decoder`, on which iteration, rewire and stability act
    data: str = "text"  # what it reads, a value of `data.kind`


def kind_of(config: Any) -> ModelKind:
    """The kind of a config's model. Raises UserError where `MODELS` has none of this name."""
    refusals(config)(config.model.kind in MODELS, "model.kind", KIND.range())
    return MODELS[config.model.kind]


def has_loop(config: Any) -> bool:
    """Whether the model repeats stages."""
    return kind_of(config).stages and config.model.core > 0


def head_counts(model: Any) -> list[int]:
    """The values of `model.heads`, with an even number of channels each: those that divide its
    groups, or that its groups divide.
    """
    whole, groups = model.heads if model.head_width else model.width, model.groups
    counts = range(1, max(whole, groups) + 1)
    fits = [n for n in counts if groups % n == 0 or n % groups == 0]
    return [n for n in fits if model.head_width or model.width % (2 * n) == 0]


def sees_both_ways(config: Any) -> bool:
    """Whether a token sees those after it too: of an image, or as a task wants it."""
    return config.data.kind == "images" or both_ways(config.data.task)


def tokens_of(config: Any) -> int:
    """Tokens of an example: of a window, or of an image."""
    data, m = config.data, config.model
    if data.kind == "text":
        return int(data.context)
    return int((data.image_size // m.patch) ** 2 + (m.readout == "class"))


def model_shape(config: Any, vocab: int) -> "nn.ModelShape":
    """The shape of a decoder or recurrent model for a vocabulary."""
    values = {**config.model.to_dict(), "vocab": vocab, "causal": not sees_both_ways(config)}
    values["context"] = config.model.attend or tokens_of(config)
    for name in ("message_activation", "exchange_activation", "state_activation"):
        values[name] = None if values[name] == "none" else values[name]
    return nn.ModelShape(**{f.name: values[f.name] for f in dataclasses.fields(nn.ModelShape)})


def _shaped(model: str) -> "Callable[[Any, int], LanguageModel]":
    return lambda config, vocab: getattr(nn, model)(model_shape(config, vocab))


def _bdh(config: Any, vocab: int) -> "LanguageModel":
    from ngc_jax.nn.bdh import BDH, BDHShape

    m = config.model
    sizes = m.width, m.hidden, m.heads, m.rounds, m.remat != "none"
    return BDH(BDHShape(vocab, *sizes, m.delays))


def _vision(config: Any, vocab: int) -> "LanguageModel":
    from ngc_jax.nn.vision import Vision, VisionShape

    own = {name: config.data[name] for name in ("image_size", "colours")}
    own |= {name: config.model[name] for name in ("patch", "readout")}
    return Vision(VisionShape(**vars(model_shape(config, vocab)), **own))


def _check(config: Any, need: Need) -> None:
    kind, task = MODELS[config.model.kind], config.data.task
    able = {name: kind for name, kind in MODELS.items() if kind.data == config.data.kind}
    wants = f"{' or '.join(map(repr, able))} where data.kind={config.data.kind!r}"
    need(config.model.kind in able, "model.kind", wants)
    two_way = " or ".join(repr(name) for name, kind in able.items() if kind.stages)
    wants = f"{two_way} where data.task={task!r} lets tokens attend both ways"
    need(kind.stages or not both_ways(task), "model.kind", wants)
    m, sizes = config.model, [n for n in MATCHED if n in kind.reads]
    wants = f"one of {', '.join(map(repr, sizes))} where model.kind={m.kind!r}"
    need(not m.match or m.match_by in sizes, "model.match_by", wants)
    kind.check(config, need)


def _check_groups(config: Any, need: Need) -> None:
    """What decoder and recurrent model have in common: groups, rules, wirings and stages."""
    m = config.model
    signal = m.rule not in RULES or isinstance(RULES[m.rule], SignalRule)
    emit = [n for n, rule in RULES.items() if isinstance(rule, SignalRule) and not rule.inside]
    wants = f"'none' where model.rule={m.rule!r} has no signal (these have: {', '.join(emit)})"
    need(m.message_activation == "none" or signal, "model.message_activation", wants)
    if m.wiring != "complete":
        need(m.rule == "addressed", "model.wiring", "'complete' unless model.rule='addressed'")
        need(m.groups > 1, "model.wiring", "'complete' where model.groups is 1")
    if m.wiring not in ("complete", "others"):
        able = channel_counts(m.wiring, m.groups)
        fits = "one less than a divisor of" if m.wiring == "block" else "less than"
        wants = f"{fits} model.groups={m.groups}, for instance {able[-1]}"
        need(m.channels in able, "model.channels", wants)
    try:
        parse(m.sharing, m.prelude + m.core + m.coda)
    except ValueError as error:
        raise UserError(f"model.sharing={m.sharing!r}: {error}") from error
    stateless = m.rule == "dense"
    need(m.sharing == "none" or not stateless, "model.sharing", "'none' where model.rule='dense'")
    wants = "0.0 where model.rule='dense', whose neurons have no states"
    need(m.state_dropout == 0 or not stateless, "model.state_dropout", wants)
    need(m.rule != "none" or m.p_intra > 0, "model.p_intra", "1 or more where model.rule is 'none'")
    unit = math.lcm(m.groups, 2)  # rotary positions turn pairs of channels
    for field in ("width", "hidden"):
        wants = f"a multiple of model.groups={m.groups}, for instance {_nearest(m[field], unit)}"
        need(m[field] % m.groups == 0, f"model.{field}", wants)
    unit, most = 1 if stateless else m.groups, min(m.width, m.hidden)
    near = min(_nearest(m.init_rank, unit), most // unit * unit)
    wants = f"0, or a multiple of {unit} up to {most}, for instance {near}"
    need(m.init_rank % unit == 0 and m.init_rank <= most, "model.init_rank", wants)


def _check_decoder(config: Any, need: Need) -> None:
    m = config.model
    wants = "1 or more where model.core and model.coda are 0"
    need(m.prelude + m.core + m.coda >= 1, "model.prelude", wants)
    _check_groups(config, need)
    fits = head_counts(m)
    need(bool(fits), "model.width", f"even, for instance {2 * m.width}")
    best = min(fits, key=lambda h: abs(h - m.heads))
    even = f"a divisor or multiple of model.groups={m.groups} with an even number of channels each"
    need(m.heads in fits, "model.heads", f"{even}, for instance {best}")
    fits = [n for n in range(1, m.heads + 1) if m.heads % n == 0]
    wants = f"0, or a divisor of model.heads={m.heads}, for instance {fits[0]}"
    need(m.kv_heads in (0, *fits), "model.kv_heads", wants)
    need(m.head_width % 2 == 0, "model.head_width", f"even, for instance {m.head_width + 1}")
    alike = m.kv_heads in (0, m.heads)
    need(alike or m.sharing == "none", "model.sharing", "'none' where model.kv_heads is less")
    wants = "'', 'linear:2' or such as 'llama3:8,1,4,8192'"
    need(_scales(m.rope_scaling), "model.rope_scaling", wants)
    _check_ranks(config, need)
    _check_delays(config, need)
    need(not m.gates or m.groups > 1, "model.gates", "False where model.groups is 1")
    need(m.qk_norm or m.qk_gain == 1, "model.qk_gain", "1.0 where model.qk_norm=False")


def _check_vision(config: Any, need: Need) -> None:
    size, patch = config.data.image_size, config.model.patch
    fits = [n for n in range(1, size + 1) if size % n == 0]
    near = min(fits, key=lambda n: abs(n - patch))
    wants = f"a divisor of data.image_size={size}, for instance {near}"
    need(patch in fits, "model.patch", wants)
    _check_decoder(config, need)


def _scales(scaling: str) -> bool:
    number = r"\d+(\.\d+)?"
    known = rf"|linear:{number}|llama3:{number}(,{number}){{3}}"
    return re.fullmatch(known, scaling) is not None


def _check_ranks(config: Any, need: Need) -> None:
    m, where = config.model, "where model.ranks is given"
    try:
        ranks = parse_ranks(m.ranks)
    except ValueError as error:
        raise UserError(f"model.ranks={m.ranks:.40}...: {error}") from error
    if not ranks:
        most = min(min(size) for size in model_shape(config, 1).sizes.values())
        fits = m.rule != "leaders" or m.p_inter <= most
        wants = f"at most {most}, the smallest side of a matrix, where model.rule='leaders'"
        need(fits, "model.p_inter", wants)
        return
    need(m.core == 0 and m.coda == 0, "model.core", f"0, as model.coda, {where}")
    need(m.prelude == len(ranks), "model.prelude", f"{len(ranks)}, its stages, {where}")
    rules = ("broadcast", "leaders", "addressed")
    need(m.rule in rules, "model.rule", f"one of {', '.join(rules)} {where}")
    need(m.sharing == "none", "model.sharing", f"'none' {where}")
    need(m.init_rank == 0, "model.init_rank", f"0 {where}")
    sizes = model_shape(config, 1).sizes
    for number, stage in enumerate(ranks, 1):
        for one in stage:
            size = sum(sizes[name][0] for name in one.members), sizes[one.members[0]][1]
            most = min(size) // (m.groups if m.rule == "addressed" else 1)
            named = f"of {'+'.join(one.members)} in stage {number} at most {most}"
            need(one.rank <= most, "model.ranks", named)
            most = size[0] * size[1] * (one.rank > 0)
            named = f"of {one.name} in stage {number} with at most {most} single synapses"
            need(one.singles <= most, "model.ranks", named)


def _delays(config: Any, need: Need) -> Delays:
    try:
        delays = parse_delays(config.model.delays)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    fits = max(delays.tokens, default=0) < config.data.context
    wants = f"of less than data.context={config.data.context} tokens, for instance '0,1'"
    need(fits, "model.delays", wants)
    return delays


def _check_delays(config: Any, need: Need) -> None:
    m = config.model
    if not _delays(config, need).tokens:
        return
    able = rules_with_delays()
    wants = f"'' where model.rule={m.rule!r} is none of {', '.join(able)}"
    need(m.rule in able, "model.delays", wants)
    wants = "'' where model.wiring is dynamic: a new edge is scored by what is heard at once"
    need(m.wiring not in DYNAMIC, "model.delays", wants)
    need(not m.ranks, "model.delays", "'' where model.ranks is given, of a model without delays")


def _check_recurrent(config: Any, need: Need) -> None:
    m, where = config.model, "where model.kind='recurrent'"
    need(m.core >= 1, "model.core", f"1 or more {where}: the number of its cells")
    for field in ("prelude", "coda"):
        need(m[field] == 0, f"model.{field}", f"0 {where}: all its stages are cells, model.core")
    need(m.sharing in ("none", "gate_up"), "model.sharing", f"one of 'none', 'gate_up' {where}")
    fixed = ", ".join(map(repr, ("complete", *WIRINGS)))
    need(m.wiring not in DYNAMIC, "model.wiring", f"one of {fixed} {where}")
    need(config.mesh.group == 1, "mesh.group", f"1 {where}: at each token signals would cross")
    _check_groups(config, need)


def _check_bdh(config: Any, need: Need) -> None:
    m, unit = config.model, 2 * config.model.heads  # rotary positions turn pairs of neurons
    wants = f"a multiple of 2 model.heads = {unit}, for instance {_nearest(m.hidden, unit)}"
    need(m.hidden % unit == 0, "model.hidden", wants)
    learned = _delays(config, need).learned
    need(not learned, "model.delays", "fixed, such as '0,1', where model.kind='bdh'")


def _nearest(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)


def _unread(config: Any) -> dict[str, str]:
    reads, m = kind_of(config).reads, config.model
    reason = f"model.kind={m.kind!r} does not read this"
    found = {field.name: reason for field in MODEL.fields if field.name not in ALWAYS + reads}
    if "route" in reads and not has_loop(config):
        found |= dict.fromkeys(("route", "state_activation"), NO_LOOP)
    return found


NO_LOOP = "the model has no loop (model.kind, core)"
ALWAYS = ("kind", "match", "match_by")  # read whatever the kind of model
MATCHED = ("width", "hidden", "p_inter", "p_intra")  # sizes that `model.match` may set
_GROUPS = (
    *("rule", "width", "hidden", "groups", "attend", "p_intra", "p_inter", "message_activation"),
    *("wiring", "channels", "wiring_seed", "sharing", "init_rank", "exchange_activation"),
    *("prelude", "core", "rounds", "drive", "coda", "form", "remat", "dropout", "state_dropout"),
)
_HEADS = (
    *("heads", "kv_heads", "head_width", "gates", "qk_norm", "qk_gain", "qkv_bias", "rope_base"),
    *("rope_scaling", "norm_epsilon", "tied", "ranks", "keep", "route", "state_activation"),
    *("delays", "stochastic_depth"),
)
_OF_TEXT = ("attend", "rope_base", "rope_scaling", "tied", "delays")  # of a row of tokens
_VISION = tuple(name for name in (*_GROUPS, *_HEADS, "patch", "readout") if name not in _OF_TEXT)
MODELS: dict[str, ModelKind] = {
    "decoder": ModelKind(_shaped("Decoder"), (*_GROUPS, *_HEADS), _check_decoder, stages=True),
    "recurrent": ModelKind(_shaped("Recurrent"), (*_GROUPS, "chunk"), _check_recurrent),
    "vision": ModelKind(_vision, _VISION, _check_vision, stages=True, data="images"),
    "bdh": ModelKind(_bdh, ("width", "hidden", "heads", "rounds", "remat", "delays"), _check_bdh),
}
KIND = Field(
    "kind",
    "decoder",
    "'recurrent' = cells, not attention; 'vision' = patches of images; 'bdh' = a baseline",
    MODELS,
)
# fmt: off
MODEL = Section("model",
    "What is trained. Each kind of model reads some of these fields and refuses the others.", [
    KIND,
    Field("rule", "addressed", "makes the weights; 'dense' = a Transformer", rules_between_groups),
    Field("match", "", "'dense_small:0.25' = sizes for this share of the matrix parameters of "
          "configs/dense_small.py, 'dense_small:0.25:flops' = of its FLOPs"),
    Field("match_by", "width", "size that match sets, before it adjusts hidden", MATCHED),
    Field("width", 128, "channels of the stream, a multiple of groups", "[1, inf)", "neurons"),
    Field("hidden", 384, "channels inside the MLP, a multiple of groups", "[1, inf)", "neurons"),
    Field("groups", 8, "groups of neighbouring channels", "[1, inf)", "groups"),
    Field("attend", 0, "tokens in reach of attention; 0 = data.context", "[0, 1e9]", "tokens"),
    Field("heads", 4, "attention heads, a divisor or multiple of groups", "[1, inf)", "heads"),
    Field("kv_heads", 0, "heads of keys and values, each for several queries; 0 = heads",
          "[0, inf)", "heads"),
    Field("head_width", 0, "channels of a head, even; 0 = width / heads", "[0, inf)", "neurons"),
    Field("p_intra", 128, "size of a state inside its group; 0 = no such part; the group's size = "
          "a dense block", "[0, inf)", "numbers"),
    Field("p_inter", 3, "size of a state, or port, between groups", "[1, inf)", "numbers"),
    Field("message_activation", "none", "activation of what groups send", lambda: ("none", *GATES)),
    Field("wiring", "complete", "which groups hear which (rule 'addressed'); rewire changes the "
          "dynamic ones", lambda: ("complete", *WIRINGS, *DYNAMIC)),
    Field("channels", 4, "groups that a group hears (dynamic: at the start)", "[1, inf)", "groups"),
    Field("wiring_seed", 0, "seed of random wirings", SEEDS),
    Field("sharing", "none", "what shares send states: of 'qkv', 'gate_up', 'depth2', 'depth3', "
          "sets such as 'query+key' or '1+2', and 'readers', with commas between"),
    Field("init_rank", 0, "greatest rank of weights at the start; 0 = as drawn", "[0, inf)"),
    Field("delays", "", "tokens by which ports 0, 1, ... are late, in turn: '0,1'; 'taps:4' = "
          "learned, of 4 tokens; '' = none"),
    Field("exchange_activation", "silu", "activation of the MLP's gate", lambda: ("none", *GATES)),
    Field("gates", False, "whether a token sets how much each group sends; these shares sum to 1"),
    Field("qk_norm", True, "whether queries and keys are normalised in each head"),
    Field("qk_gain", 1.0, "scale of normalised queries at the start", "(0, inf)"),
    Field("qkv_bias", False, "whether queries, keys and values have biases"),
    Field("rope_base", 10_000.0, "base of the rotary positions", "(1, inf)"),
    Field("rope_scaling", "", "'linear:2', or 'llama3:8,1,4,8192' as Llama 3.1; '' = none"),
    Field("norm_epsilon", 1e-6, "added to the mean square in norms", "(0, 1)"),
    Field("tied", False, "whether the embeddings are the matrix of logits too"),
    Field("ranks", "", "a rank for each synapse of each stage, as conversion gives them"),
    Field("prelude", 1, "stages before the loop", "[0, 1000]", "stages"),
    Field("core", 1, "stages in the loop, or cells; 0 = no loop", "[0, 1000]", "stages"),
    Field("rounds", 2, "times that the core runs, with the same states", "[1, inf)", "rounds"),
    Field("keep", 0.9, "part of the state that a round keeps, at the start of training", "(0, 1)"),
    Field("drive", True, "whether each round adds the loop's input again; False = only the first"),
    Field("route", "state", "queries and keys of the state, or loop's input", ("state", "start")),
    Field("state_activation", "none", "activation of the loop's state after each round",
          lambda: ("none", *filter(None, STATE_ACTIVATIONS))),
    Field("coda", 1, "stages after the loop", "[0, 1000]", "stages"),
    Field("form", "weights", "'weights' = form each W; 'signals' = never", ("weights", "signals")),
    Field("remat", "rounds", "what the gradient computes again", ("none", "rounds", "stages")),
    Field("dropout", 0.0, "part of what attention, MLP or cell add that is left out", "[0, 1)"),
    Field("state_dropout", 0.0, "part of the numbers of neurons' states that are 0", "[0, 1)"),
    Field("stochastic_depth", 0.0, "part of examples that a stage's branch leaves out", "[0, 1)"),
    Field("patch", 2, "of a patch's side, a divisor of data.image_size", "[1, inf)", "pixels"),
    Field("readout", "mean", "what classes are read from: all patches, or a token of its own",
          ("mean", "class")),
    Field("chunk", 0, "tokens that gradients go back by; 0 = a window", "[0, inf)", "tokens"),
], _check, _unread)
# fmt: on
