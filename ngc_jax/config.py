"""Every setting, with its unit and range, and the checks that refuse an impossible run before
anything is allocated.

For: `base()`, which the files in `configs/` start from, and `validate()`. Not for: what a setting
does (each is read in one place, named in the comment's section) or named runs (`configs/`).
"""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ngc_jax.core.communicate import STATE_ACTIVATIONS
from ngc_jax.core.rules import GATES, RULES, SignalRule

INSIDE = ("within", "block")
SIGNAL_RULES = [n for n, r in RULES.items() if isinstance(r, SignalRule)]
from ngc_jax.core.wiring import WIRINGS
from ngc_jax.data.tasks import TASKS, both_ways
from ngc_jax.nn.bdh import BDH, BDHShape
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.recurrent import Recurrent
from ngc_jax.nn.shape import DYNAMIC, ModelShape
from ngc_jax.nn.sharing import parse
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.profiler import traceable
from ngc_jax.training.penalty import REGULARISERS
from ngc_jax.training.stability_metrics import PROBES as MEASURES

OURS: dict[str, Callable[[ModelShape], LanguageModel]] = {
    "decoder": Decoder,
    "recurrent": Recurrent,
}
RULES_OF_A_MODEL = (*(rule for rule in RULES if rule not in INSIDE), "none", "dense")


def base() -> ConfigDict:
    """All fields at their defaults, which are the values of `configs/defaults.py`."""
    c = ConfigDict()
    c.seed = 0  # 0 to 4,294,967,295: parameters and the order of the data follow from it

    c.data = ConfigDict()
    # A reasoning task instead of text (docs/tasks.md): "parity", "running_parity", "modular",
    # "hops", "addition", "listops", "dyck", "path"; "maze", "sudoku4", "sudoku6", "sudoku9",
    # "sudoku9_search", or one of these with "_in_place", of a model whose tokens see both ways; ""
    # = text
    c.data.task = ""
    c.data.low = 1  # least difficulty of the task's problems, as its table in docs/tasks.md has it
    c.data.high = 10  # greatest, >= low; data.context must hold the longest
    # of the task to train on, >= 1; data.validation_fraction of that many are held out
    c.data.problems = 100_000
    c.data.problem_seed = 0  # what problems are drawn from, 0 to 4,294,967,295
    # a text file or a folder of text files; "" = this interpreter's library source
    c.data.path = ""
    # a prepared TFDS text set instead, such as "lm1b" or "wiki40b/en"; "" = none
    c.data.tfds_name = ""
    c.data.tfds_data_dir = ""  # where TFDS sets are kept; "" = TFDS's own default
    c.data.train_split = "train"  # of the TFDS set, slices allowed: "train[:95%]"
    c.data.validation_split = "validation"  # of the TFDS set, likewise
    c.data.text_key = "text"  # the TFDS feature that holds the text
    # of data.path, or of data.problems beside them, held out, in (0, 0.5]
    c.data.validation_fraction = 0.1
    c.data.tokenizer = "bytes"  # "bytes", or "bpe": byte pairs learned on the train text
    c.data.vocab_size = 4096  # tokens of a BPE, 258 to 1,000,000; bytes have 257
    c.data.context = 128  # tokens of a window, or of the longest problem, >= 1
    c.data.isolate_documents = False  # True: a token attends within its own document only
    c.data.cache_dir = ""  # for prepared text and tokens; "" = ~/.cache/ngc_jax

    c.model = ConfigDict()
    # "decoder", of which all that follows is; "recurrent" (nn/recurrent.py), which has no heads,
    # prelude or coda, and whose core counts cells with so many rounds a token; or "bdh", the
    # baseline of nn/bdh.py, which has the width, hidden (its neurons), heads, rounds (how often its
    # one layer runs) and remat given here, and nothing else.
    c.model.kind = "decoder"
    # Between groups: "addressed", "broadcast", "metric", "metric_diagonal", "metric_scalar",
    # "tanh", "shift", "riemannian", "distance" (docs/method.md says what each is), or "none";
    # "dense" = the ordinary Transformer.
    c.model.rule = "addressed"
    # "" or "CONFIG:SHARE" or "CONFIG:SHARE:flops": set sizes so that the model has this share of
    # the matrix parameters, or of the FLOPs, of configs/CONFIG.py, as in "dense_small:0.25";
    # replaces the size named by match_by, and hidden.
    c.model.match = ""
    c.model.match_by = "width"  # "width" (hidden in proportion), "hidden", "p_inter", "p_intra"
    c.model.width = 128  # neurons of the stream, D: a multiple of groups
    c.model.hidden = 384  # neurons of the exchange's hidden layer, F: a multiple of groups
    c.model.groups = 8  # groups of neurons, G >= 1
    # tokens that attention looks back on, itself included, >= 1; 0 = data.context
    c.model.attend = 0
    c.model.heads = 4  # attention heads: a divisor of groups, for a head is one group or several
    # numbers of a state within its group: 0 = no such part, >= the group's size = dense block
    c.model.p_intra = 128
    c.model.p_inter = 3  # numbers of one port (addressed) or of one state (all other rules), >= 1
    # On the signal between groups: "none", "silu", "gelu", "relu"; "none" for tanh, shift,
    # riemannian, distance.
    c.model.message_activation = "none"
    # Who hears whom under rule="addressed": "complete", its own group included; "others"; "ring",
    # "small_world", "regular" (random) or "block" of so many channels a group (core/wiring.py); or
    # "dynamic", where each synapse has channels of its own that change as c.rewire says, and
    # "dynamic_ports", where single numbers of them do.
    c.model.wiring = "complete"
    # Groups that a group hears, 1 to groups - 1; not used by "complete" and "others". Of "dynamic"
    # ones, those at the start, which is what training costs.
    c.model.channels = 4
    # of "small_world", "regular" and the changes of "dynamic", 0 to 4,294,967,295
    c.model.wiring_seed = 0
    # Who shares send states: "none", or of "qkv", "gate_up", "depth2", "depth3", sets such as
    # "query+key" or "1+2" (stages are numbered from the embedding), several with commas between
    # them; with "readers" stages share in the synapses that read the stream alone.
    c.model.sharing = "none"
    # Rank that weights start with at most: neurons start in so many kinds that send alike, 1 to
    # width and to hidden, a multiple of groups unless rule="dense"; 0 = as drawn.
    c.model.init_rank = 0
    # of the exchange's gate: "silu", "gelu", "relu"; "none" = a plain product
    c.model.exchange_activation = "silu"
    # True: each group speaks in a share that the token sets; shares sum to one over groups
    c.model.gates = False
    c.model.qk_norm = True  # normalise queries and keys in each head
    # where the learned scale of normalised queries starts, > 0: a large one looks at few tokens
    c.model.qk_gain = 1.0
    c.model.prelude = 1  # stages before the loop, >= 0
    c.model.core = 1  # stages in the loop, >= 0; 0 = no loop
    c.model.rounds = 2  # times that the core runs, with the same states, >= 1
    # of the state, from round to round, at the start, in (0, 1): a small one forgets earlier rounds
    c.model.keep = 0.9
    # each round adds the loop's input anew, in learned shares; False: the first has it alone
    c.model.drive = True
    # whence a round's queries and keys: the "state", or the "start", what the loop began with
    c.model.route = "state"
    # of the loop's state after each round: "none", or "tanh" = within -1 to 1
    c.model.state_activation = "none"
    c.model.coda = 1  # stages after the loop, >= 0
    # "weights": generate each W, then multiply; "signals": never form W (wins when wide)
    c.model.form = "weights"
    # recompute for the gradient: "none", "rounds" (or a cell's tokens), "stages" (these too)
    c.model.remat = "rounds"
    # of kind="recurrent": tokens that gradients go back through, >= 1; 0 = all of a window
    c.model.chunk = 0

    c.rewire = ConfigDict()  # of model.wiring="dynamic" and "dynamic_ports" alone
    # that a group has in the end, 1 to model.channels; ports are these times p_inter
    c.rewire.channels = 4
    c.rewire.begin = 0.0  # share of the updates that go before the first interval, in [0, 1)
    c.rewire.end = 0.75  # share of the updates by which the wiring is final, in (begin, 1]
    c.rewire.every = 50  # updates between two changes, >= 1
    # share of a group's edges exchanged in a change, in [0, 1]; falls to 0 by the end
    c.rewire.exchange = 0.3
    # new edges by "gradient", "correlation" of activations, or at "random"
    c.rewire.regrow = "gradient"

    # rounds in training; evaluation and sampling have model.rounds (docs/method.md)
    c.iteration = ConfigDict()
    # Of an update: "fixed" = model.rounds; drawn, "uniform" or "lognormal_poisson"; or "marked":
    # each example has as many as there are marks in it, also when it is evaluated.
    c.iteration.rounds = "fixed"
    c.iteration.mark = 0  # the token that is a mark, >= 0
    c.iteration.low = 1  # fewest rounds, >= 1, unless "fixed"
    c.iteration.high = 8  # most rounds, >= low; `solve` may have more
    c.iteration.mean = 4.0  # of "lognormal_poisson" before it is cut to low and high, > 1
    c.iteration.backprop = 0  # last rounds that gradients go through, >= 1; 0 = all
    # of the state's own size, added to it after each round in training, >= 0
    c.iteration.noise = 0.0
    # rounds between those after which there is a loss, last one included; 0 = it alone
    c.iteration.supervise_every = 0
    # of each loss before the last one's 1, > 0; train/loss is their weighted mean
    c.iteration.supervise_weight = 1.0

    c.train = ConfigDict()
    c.train.steps = 1000  # updates, >= 1
    # windows of one update: a multiple of accumulation x mesh.data x mesh.fsdp
    c.train.batch_size = 16
    c.train.accumulation = 1  # parts that a batch is computed in, one after another, >= 1
    # "adamw", or "muon" for matrices and states with adamw for the rest
    c.train.optimizer = "adamw"
    c.train.learning_rate = 1e-2  # peak, for all that is no neuron state, > 0
    c.train.state_learning_rate = 1e-2  # peak, for neuron states, > 0
    c.train.schedule = "cosine"  # after the warm-up: "cosine", or "wsd" (stable, then linear decay)
    c.train.warmup_steps = 100  # linear, >= 0, < steps
    c.train.decay_fraction = 0.2  # of the steps, the decay at the end of "wsd", in (0, 1]
    c.train.final_fraction = 0.1  # of the peak rate, where the schedule ends, in [0, 1]
    c.train.weight_decay = 0.1  # of matrices and states, per unit of learning rate, >= 0
    c.train.b1 = 0.9  # AdamW's first moment, in [0, 1)
    c.train.b2 = 0.99  # AdamW's second moment, in [0, 1)
    c.train.clip_norm = 1.0  # of the whole gradient, > 0
    # "float32" or "bfloat16"; parameters and optimizer are float32 always
    c.train.compute_dtype = "float32"
    # deviations above the moving mean that make a loss a spike, > 0: skipped (spikes.py); 0 = off
    c.train.spike = 0.0
    # updates skipped in a row, not finite or spikes, that are trouble; >= 1
    c.train.max_bad_steps = 20
    # times that trouble sends the run back to a checkpoint, past the batches since, >= 0
    c.train.max_rewinds = 2
    # without an update, a batch of evaluation or a save that are a hang, > 0; 0 = no watch
    c.train.hang_minutes = 0.0
    c.train.hang_exit = False  # True: a hang ends the process, for a scheduler to start it again
    c.train.log_every = 20  # updates between rows of metrics, >= 1
    # updates that are traced into DIR/profile for xprof, "first:last", from 1 on; "" = none
    c.train.profile = ""

    c.eval = ConfigDict()
    # updates between evaluations, >= 1; the last update is always followed by one
    c.eval.every = 200
    c.eval.windows = 512  # held-out windows or problems of each, evenly spread; 0 = all
    c.eval.batch_size = 32  # windows at a time: a multiple of mesh.data x mesh.fsdp

    c.checkpoint = ConfigDict()
    # updates between checkpoints, >= 1; the last update always has one
    c.checkpoint.every_steps = 200
    c.checkpoint.every_minutes = 10.0  # and at least this often, > 0
    # newest checkpoints kept, >= 2, so that a damaged one has a sound one behind it
    c.checkpoint.keep = 3

    c.mesh = ConfigDict()
    # parts of the batch, >= 1, or -1: as many as devices are left; data x fsdp x group = devices
    c.mesh.data = -1
    c.mesh.fsdp = 1  # parts of the batch, of the parameters and of the optimizer, >= 1
    # parts of the groups, >= 1: a divisor of model.heads; model.form is then "signals" in any case
    c.mesh.group = 1

    c.stability = ConfigDict()
    # updates between measurements on held-out text, >= 1 (the last has one), or 0 for none
    c.stability.every = 200
    # which: "rounds,tokens,departure,exponents" or some of them (watch.py)
    c.stability.measures = ",".join(MEASURES)
    c.stability.tokens = 1024  # held-out tokens of each, >= 1, rounded up to whole windows
    c.stability.rounds = 8  # rounds that the exponent along rounds is followed, >= 1
    # a band held by the loss: "none", "contraction", "exponent" (log per round)
    c.stability.regulariser = "none"
    c.stability.low = -2.0  # lower end of the band, natural logarithm per round
    c.stability.high = 0.0  # upper end, > low
    c.stability.weight = 1.0  # nats per token for each squared unit outside the band, >= 0
    # nats per token for each unit of |Jacobian of the settled round|^2 / n, >= 0; 0 = off
    c.stability.jacobian = 0.0
    return c


def model_shape(config: ConfigDict, vocab: int) -> ModelShape:
    """The frozen shape of `config.model` for a vocabulary."""
    context = config.model.attend or config.data.context
    fields = {
        **config.model.to_dict(),
        "vocab": vocab,
        "context": context,
        "causal": not both_ways(config.data.task),
    }
    for name in ("attend", "kind", "match", "match_by"):
        del fields[name]
    for name in ("message_activation", "exchange_activation", "state_activation"):
        fields[name] = None if fields[name] == "none" else fields[name]
    return ModelShape(**fields)


def make_model(config: ConfigDict, vocab: int) -> LanguageModel:
    """The model that a config asks for, for a vocabulary."""
    if config.model.kind in OURS:
        return OURS[config.model.kind](model_shape(config, vocab))
    m = config.model
    return BDH(
        BDHShape(vocab, m.width, m.hidden, m.heads, layers=m.rounds, remat=m.remat != "none")
    )


def validate(config: ConfigDict) -> None:
    """Refuse what cannot run. Raises UserError naming the field, its value, and a value that works."""
    m, t, d = config.model, config.train, config.data

    def need(holds: bool, field: str, wants: str) -> None:
        if not holds:
            value: Any = config
            for name in field.split("."):
                value = value[name]
            raise UserError(f"{field}={value!r}: must be {wants}")

    def choice(field: str, value: str, options: Any) -> None:
        need(value in options, field, "one of " + ", ".join(map(repr, options)))

    need(0 <= config.seed < 2**32, "seed", "from 0 to 4,294,967,295")
    choice("data.tokenizer", d.tokenizer, ("bytes", "bpe"))
    need(
        258 <= d.vocab_size <= 1_000_000,
        "data.vocab_size",
        "from 258 to 1,000,000, for instance 4096",
    )
    need(d.context >= 1, "data.context", "1 or more, for instance 128")
    if d.task:
        choice("data.task", d.task, TASKS)
        task = TASKS[d.task]
        need(
            not (d.path or d.tfds_name),
            "data.task",
            "'' where data.path or data.tfds_name gives a text",
        )
        need(
            not d.isolate_documents,
            "data.isolate_documents",
            "False where data.task has no documents",
        )
        need(
            d.low >= task.lowest,
            "data.low",
            f"{task.lowest} or more ({task.unit}) where data.task={d.task!r}",
        )
        need(
            d.high <= task.highest,
            "data.high",
            f"at most {task.highest} ({task.unit}) where data.task={d.task!r}",
        )
        need(d.low <= d.high, "data.low", f"at most data.high={d.high}")
        need(d.problems >= 1, "data.problems", "1 or more, for instance 100000")
        need(0 <= d.problem_seed < 2**32, "data.problem_seed", "from 0 to 4,294,967,295")
    need(
        0 < d.validation_fraction <= 0.5,
        "data.validation_fraction",
        "above 0 and at most 0.5, for instance 0.1",
    )

    choice("model.kind", m.kind, (*OURS, "bdh"))
    decoder = m.kind == "decoder" or not both_ways(d.task)
    need(decoder, "model.kind", f"'decoder' where data.task={d.task!r} is to be seen both ways")
    if m.kind == "bdh":
        unit = 2 * max(1, m.heads)  # rotary positions turn pairs of neurons
        neurons = f"a multiple of 2 model.heads = {unit}, for instance {max(unit, round(m.hidden / unit) * unit)}"
        need(m.hidden % unit == 0, "model.hidden", neurons)
    for field, none in (("every", 0), ("regulariser", "none"), ("jacobian", 0)):
        still = f"{none!r} where model.kind={m.kind!r}: no stages"
        need(m.kind == "decoder" or config.stability[field] == none, f"stability.{field}", still)
    need(m.chunk == 0 or m.kind == "recurrent", "model.chunk", f"0 where model.kind={m.kind!r}")
    if m.kind == "recurrent":
        need(m.chunk >= 0, "model.chunk", "0 or more")
        for field, wanted in (
            ("prelude", (0,)),
            ("coda", (0,)),
            ("gates", (False,)),
            ("sharing", ("none", "gate_up")),
        ):
            choice(f"model.{field}", m[field], wanted)
        need(m.core >= 1, "model.core", "1 or more where model.kind='recurrent': its cells")
        choice("model.wiring", m.wiring, ("complete", *WIRINGS))
        need(
            config.mesh.group == 1,
            "mesh.group",
            "1 where model.kind='recurrent': signals would cross at each token",
        )
    choice("model.rule", m.rule, RULES_OF_A_MODEL)
    choice("model.message_activation", m.message_activation, ("none", *GATES))
    signals = m.message_activation == "none" or m.rule not in RULES or m.rule in SIGNAL_RULES
    send = ", ".join(rule for rule in SIGNAL_RULES if rule not in INSIDE)
    makes = f"'none' where model.rule={m.rule!r} makes its weights without a signal (those with one: {send})"
    need(signals, "model.message_activation", makes)
    choice("model.exchange_activation", m.exchange_activation, ("none", *GATES))
    choice("model.wiring", m.wiring, ("complete", *WIRINGS, *DYNAMIC))
    wired = "'complete' unless model.rule is 'addressed', whose neurons alone keep a port for each partner"
    need(m.wiring == "complete" or m.rule == "addressed", "model.wiring", wired)
    need(m.wiring != "others" or m.groups > 1, "model.wiring", "'complete' where model.groups is 1")
    if m.wiring not in ("complete", "others"):
        fewer = f"from 1 to model.groups - 1 = {m.groups - 1}"
        need(1 <= m.channels < m.groups, "model.channels", fewer)
        islands = [k for k in range(1, m.groups) if m.groups % (k + 1) == 0]
        near = f"one less than a divisor of model.groups={m.groups}, for instance {islands[-1] if islands else None}"
        need(m.wiring != "block" or m.channels in islands, "model.channels", near)
    need(0 <= m.wiring_seed < 2**32, "model.wiring_seed", "from 0 to 4,294,967,295")
    try:
        parse(m.sharing, m.prelude + m.core + m.coda)
    except ValueError as error:
        raise UserError(f"model.sharing={m.sharing!r}: {error}") from error
    need(
        m.sharing == "none" or m.rule != "dense",
        "model.sharing",
        "'none' where model.rule='dense' has no states",
    )
    need(
        not m.gates or m.groups > 1,
        "model.gates",
        "False where model.groups is 1, whose share is always one",
    )
    need(0 < m.keep < 1, "model.keep", "above 0 and below 1, for instance 0.9")
    need(m.qk_gain > 0, "model.qk_gain", "above 0, for instance 1.0")
    need(
        m.qk_norm or m.qk_gain == 1,
        "model.qk_gain",
        "1.0 where model.qk_norm=False, which leaves no scale",
    )
    choice("model.route", m.route, ("state", "start"))
    choice("model.state_activation", m.state_activation, ("none", *filter(None, STATE_ACTIVATIONS)))
    choice("model.form", m.form, ("weights", "signals"))
    choice("model.remat", m.remat, ("none", "rounds", "stages"))
    for field in ("width", "hidden", "groups", "heads", "p_inter", "rounds"):
        need(m[field] >= 1, f"model.{field}", "1 or more")
    for field in ("attend", "prelude", "core", "coda", "p_intra"):
        need(m[field] >= 0, f"model.{field}", "0 or more")
    need(m.prelude + m.core + m.coda >= 1, "model.prelude", "1 or more where core and coda are 0")
    need(m.rule != "none" or m.p_intra > 0, "model.p_intra", "1 or more where model.rule is 'none'")
    for field in ("width", "hidden"):
        unit = math.lcm(m.groups, 2)  # rotary positions turn pairs of channels
        near = max(unit, round(m[field] / unit) * unit)
        divides = f"a multiple of model.groups={m.groups}, for instance {near}"
        need(m[field] % m.groups == 0, f"model.{field}", divides)
    fits = [h for h in range(1, m.groups + 1) if m.groups % h == 0 and m.width // h % 2 == 0]
    need(bool(fits), "model.width", f"even, for instance {2 * m.width}")
    best = min(fits, key=lambda h: abs(h - m.heads))
    whole = f"a divisor of model.groups={m.groups} with an even number of channels each, for instance {best}"
    need(m.heads in fits or m.kind == "recurrent", "model.heads", whole)

    unit, most = 1 if m.rule == "dense" else m.groups, min(m.width, m.hidden)
    near = min(max(unit, round(m.init_rank / unit) * unit), most // unit * unit)
    ranks = f"0, or a multiple of {unit} (kinds of senders, as many in each group) up to {most}, for instance {near}"
    need(
        m.init_rank >= 0 and m.init_rank % unit == 0 and m.init_rank <= most,
        "model.init_rank",
        ranks,
    )

    choice("train.optimizer", t.optimizer, ("adamw", "muon"))
    choice("train.schedule", t.schedule, ("cosine", "wsd"))
    choice("train.compute_dtype", t.compute_dtype, ("float32", "bfloat16"))
    for field in ("steps", "batch_size", "accumulation", "max_bad_steps", "log_every"):
        need(t[field] >= 1, f"train.{field}", "1 or more")
    for field in ("learning_rate", "state_learning_rate", "clip_norm"):
        need(t[field] > 0, f"train.{field}", "above 0")
    for field in ("spike", "max_rewinds", "hang_minutes"):
        need(t[field] >= 0, f"train.{field}", "0 or more")
    watched = "False where train.hang_minutes is 0, so that no hang is noticed"
    need(t.hang_minutes > 0 or not t.hang_exit, "train.hang_exit", watched)
    need(
        traceable(t.profile),
        "train.profile",
        "'', or the first and the last update to trace, for instance '10:20'",
    )
    need(t.weight_decay >= 0, "train.weight_decay", "0 or more")
    need(0 <= t.b1 < 1, "train.b1", "from 0 to below 1, for instance 0.9")
    need(0 <= t.b2 < 1, "train.b2", "from 0 to below 1, for instance 0.99")
    need(
        0 < t.decay_fraction <= 1, "train.decay_fraction", "above 0 and at most 1, for instance 0.2"
    )
    need(0 <= t.final_fraction <= 1, "train.final_fraction", "from 0 to 1, for instance 0.1")
    warm = f"at least 0 and below train.steps={t.steps}, for instance {t.steps // 10}"
    need(0 <= t.warmup_steps < t.steps, "train.warmup_steps", warm)

    need(config.eval.every >= 1, "eval.every", "1 or more")
    need(config.eval.windows >= 0, "eval.windows", "1 or more, or 0 for all")
    need(config.eval.batch_size >= 1, "eval.batch_size", "1 or more")
    need(config.checkpoint.every_steps >= 1, "checkpoint.every_steps", "1 or more")
    need(config.checkpoint.every_minutes > 0, "checkpoint.every_minutes", "above 0")
    need(
        config.checkpoint.keep >= 2,
        "checkpoint.keep",
        "2 or more, so that a damaged one has a sound one behind it",
    )

    s = config.stability
    need(s.every >= 0, "stability.every", "1 or more, or 0 for none")
    named = set(s.measures.split(",")) <= set(MEASURES)
    need(named, "stability.measures", f"some of {','.join(MEASURES)}, for instance 'rounds,tokens'")
    need(s.tokens >= 1, "stability.tokens", "1 or more, for instance 1024")
    need(s.rounds >= 1, "stability.rounds", "1 or more, for instance 8")
    choice("stability.regulariser", s.regulariser, REGULARISERS)
    need(s.weight >= 0, "stability.weight", "0 or more")
    need(s.jacobian >= 0, "stability.jacobian", "0 or more")
    need(
        s.low < s.high, "stability.low", f"below stability.high={s.high}, for instance {s.high - 1}"
    )
    looped = s.regulariser == "none" or (m.core > 0 and m.rounds > 1)
    need(
        looped,
        "stability.regulariser",
        "'none' where the model has no loop of 2 rounds or more (model.core, rounds)",
    )
    need(
        s.jacobian == 0 or m.core > 0,
        "stability.jacobian",
        "0 where the model has no loop (model.core=0)",
    )
