"""Settings of a run but for its data and model: tables of fields, and which values go together.

For: seed, rewire, iteration, train, eval, checkpoint, mesh, stability. Not for: reading them.
"""

from typing import Any

import jax

from ngc_jax.core.rewiring import REGROW
from ngc_jax.core.wiring import DYNAMIC
from ngc_jax.nn.settings import NO_LOOP, has_loop, kind_of, sees_both_ways
from ngc_jax.runtime.fields import SEEDS, Field, Need, Section
from ngc_jax.runtime.profiler import traceable

DRAWS = ("fixed", "uniform", "lognormal_poisson", "marked")
REGULARISERS = ("none", "contraction", "exponent")
IMITATED = ("outputs", "stream", "stages")
DTYPES = ("float32", "bfloat16")


def _unread_rewire(config: Any) -> dict[str, str]:
    if config.model.wiring in DYNAMIC:
        return {}
    reason = f"model.wiring={config.model.wiring!r} does not change in training"
    return dict.fromkeys([field.name for field in REWIRE.fields], reason)


def _check_rewire(config: Any, need: Need) -> None:
    r, m, steps = config.rewire, config.model, config.train.steps
    if m.wiring not in DYNAMIC:
        return
    wants = f"from 1 to model.channels = {m.channels}, those at the start"
    need(r.channels <= m.channels, "rewire.channels", wants)
    wants = f"above rewire.begin={r.begin} and at most 1, for instance {(r.begin + 1) / 2}"
    need(r.begin < r.end, "rewire.end", wants)
    span = round(r.end * steps) - round(r.begin * steps)
    wants = f"one or more of the {steps} updates after rewire.begin, for instance 1.0"
    need(span >= 1, "rewire.end", wants)
    wants = f"from 1 to the {span} updates between rewire.begin and rewire.end"
    need(r.every <= span, "rewire.every", wants)


def _unread_iteration(config: Any) -> dict[str, str]:
    i = config.iteration
    if not has_loop(config):
        return dict.fromkeys([field.name for field in ITERATION.fields], NO_LOOP)
    read = {"fixed": "", "uniform": "low high", "lognormal_poisson": "low high mean"}
    unread = {"mark", "low", "high", "mean"} - {*read.get(i.rounds, "mark low high").split()}
    found = dict.fromkeys(unread, f"iteration.rounds={i.rounds!r}")
    return found | (
        {} if i.supervise_every else {"supervise_weight": "iteration.supervise_every=0"}
    )


def _check_iteration(config: Any, need: Need) -> None:
    i, m, data = config.iteration, config.model, config.data
    of = f"data.task={data.task!r}" if data.task else f"data.kind={data.kind!r}"
    wants = f"another where {of} lets tokens attend both ways, for instance 'fixed'"
    need(i.rounds != "marked" or not sees_both_ways(config), "iteration.rounds", wants)
    most, of = m.rounds, f"model.rounds={m.rounds}"
    if i.rounds != "fixed":
        most, of = i.high, f"iteration.high={i.high}"
        need(i.low <= i.high, "iteration.low", f"at most {of}, for instance {max(1, i.high // 2)}")
    need(i.backprop <= most, "iteration.backprop", f"from 1 to {of}, or 0 for all rounds")
    wants = "0 where model.drive=False: all before the loop would not be trained"
    need(m.drive or i.backprop in (0, most), "iteration.backprop", wants)
    judged = i.backprop or most
    wants = f"0, or below the {judged} rounds with gradients, for instance {judged // 2}"
    need(i.supervise_every < judged, "iteration.supervise_every", wants)


def _check_train(config: Any, need: Need) -> None:
    t = config.train
    wants = f"below train.steps={t.steps}, for instance {t.steps // 10}"
    need(t.warmup_steps < t.steps, "train.warmup_steps", wants)
    wants = "False where train.hang_minutes is 0"
    need(t.hang_minutes > 0 or not t.hang_exit, "train.hang_exit", wants)
    stages = kind_of(config).stages and not has_loop(config) and config.data.kind == "text"
    wants = (
        "'outputs' where the model sees images, has no stages or repeats them (model.kind, core)"
    )
    need(stages or t.imitate == "outputs", "train.imitate", wants)
    wants = "a work directory where train.imitate='stages', which trains neither end of a model"
    need(t.imitate != "stages" or t.init_from != "", "train.init_from", wants)
    wants = f"0.0 where model.wiring={config.model.wiring!r} changes in training"
    need(t.ema == 0 or config.model.wiring not in DYNAMIC, "train.ema", wants)
    need(traceable(t.profile), "train.profile", "'', or the updates to trace, for instance '10:20'")


def _unread_train(config: Any) -> dict[str, str]:
    t = config.train
    if not t.teacher:
        return dict.fromkeys(("imitate", "temperature"), "train.teacher=''")
    found = {"label_smoothing": "train.teacher is learned"}
    return found | ({"temperature": "train.imitate='stages'"} if t.imitate == "stages" else {})


def _check_eval(config: Any, need: Need) -> None:
    data = config.data
    of = f"data.task={data.task!r}" if data.task else f"data.kind={data.kind!r}"
    wants = f"0 where {of}, whose models read no text"
    need(not config.eval.sample or not (data.task or data.kind != "text"), "eval.sample", wants)


def _unread_eval(config: Any) -> dict[str, str]:
    return {} if config.eval.sample else {"prompt": "eval.sample=0"}


def _check_mesh(config: Any, need: Need) -> None:
    mesh, heads, t = config.mesh, config.model.heads, config.train
    devices, here = jax.device_count(), jax.local_device_count()
    common = _divisors(here, heads)
    wants = f"a divisor of model.heads={heads} and of the {here} devices of a process"
    need(mesh.group in common, "mesh.group", f"{wants}: {str(common)[1:-1]}")
    parts = devices // mesh.group
    wants = f"a divisor of the {devices} devices here / mesh.group={mesh.group}"
    need(parts % mesh.fsdp == 0, "mesh.fsdp", f"{wants}: {str(_divisors(parts))[1:-1]}")
    rest = parts // mesh.fsdp
    wants = f"the {devices} devices here / (mesh.fsdp={mesh.fsdp} x mesh.group={mesh.group})"
    need(mesh.data in (-1, rest), "mesh.data", f"{wants}, {rest}, or -1")
    split, rows = f"{parts} parts (mesh.data x mesh.fsdp)", config.eval.batch_size
    near = f"for instance {-(-rows // parts) * parts}"
    need(rows % parts == 0, "eval.batch_size", f"a multiple of {split}, {near}")
    unit, times = t.accumulation * parts, f"train.accumulation={t.accumulation} x {split}"
    near = f"for instance {-(-t.batch_size // unit) * unit}"
    need(t.batch_size % unit == 0, "train.batch_size", f"a multiple of {times}, {near}")
    several = f"0 where {jax.process_count()} processes train together"
    need(not config.eval.sample or jax.process_count() == 1, "eval.sample", several)


def _unread_stability(config: Any) -> dict[str, str]:
    if not kind_of(config).stages:
        reason = f"model.kind={config.model.kind!r} has no stages to measure"
        return {field.name: reason for field in STABILITY.fields if field.name != "every"}
    unread = ("low", "high", "weight") if config.stability.regulariser == "none" else ()
    return dict.fromkeys(unread, "stability.regulariser='none'")


def _check_stability(config: Any, need: Need) -> None:
    from ngc_jax.training.stability_metrics import PROBES  # it takes a second

    s, m, loop = config.stability, config.model, has_loop(config)
    wants = f"0 where model.kind={m.kind!r} has no stages to measure"
    need(kind_of(config).stages or s.every == 0, "stability.every", wants)
    wants = f"some of {','.join(PROBES)}, for instance 'rounds,tokens'"
    need(set(s.measures.split(",")) <= set(PROBES), "stability.measures", wants)
    wants = f"below stability.high={s.high}, for instance {s.high - 1}"
    need(s.low < s.high, "stability.low", wants)
    wants = "'none' where the model has no loop of 2 rounds or more (model.core, rounds)"
    need(s.regulariser == "none" or (loop and m.rounds > 1), "stability.regulariser", wants)
    need(s.jacobian == 0 or loop, "stability.jacobian", f"0 where {NO_LOOP}")


def _divisors(*counts: int) -> list[int]:
    return [n for n in range(1, min(counts) + 1) if not any(count % n for count in counts)]


# fmt: off
RUN = Section("", "The run.", [
    Field("seed", 0, "seed of parameters and of the order of the data", SEEDS),
])
REWIRE = Section("rewire", "How model.wiring 'dynamic' and 'dynamic_ports' change in training.", [
    Field("channels", 4, "groups that a group hears in the end", "[1, inf)", "groups"),
    Field("begin", 0.0, "part of the updates before the first change", "[0, 1)"),
    Field("end", 0.75, "part of the updates after which the wiring is final", "[0, 1]"),
    Field("every", 50, "updates between two changes", "[1, inf)", "updates"),
    Field("exchange", 0.3, "part of a group's edges replaced at first; it falls to 0", "[0, 1]"),
    Field("regrow", "gradient", "what chooses new edges: gradient, correlation, chance", REGROW),
], _check_rewire, _unread_rewire)
ITERATION = Section("iteration", "Rounds in training; evaluation and sampling run model.rounds.", [
    Field("rounds", "fixed", "of an update: model.rounds, drawn, or an example's marks", DRAWS),
    Field("mark", 0, "token that is a mark ('marked')", "[0, inf)"),
    Field("low", 1, "fewest rounds, unless 'fixed'", "[1, inf)", "rounds"),
    Field("high", 8, "most rounds, unless 'fixed'", "[1, inf)", "rounds"),
    Field("mean", 4.0, "mean of 'lognormal_poisson' before it is cut", "(1, inf)", "rounds"),
    Field("backprop", 0, "last ones that gradients go through; 0 = all", "[0, inf)", "rounds"),
    Field("noise", 0.0, "noise after each round, over the size of the state", "[0, inf)"),
    Field("supervise_every", 0, "between two with a loss; 0 = the last", "[0, inf)", "rounds"),
    Field("supervise_weight", 1.0, "of a loss before the last round, whose is 1", "(0, inf)"),
], _check_iteration, _unread_iteration)
TRAIN = Section("train", "Updates: batches, optimizer, learning rates, what to do in trouble.", [
    Field("steps", 1000, "updates of a run", "[1, inf)", "updates"),
    Field("batch_size", 16, "a multiple of accumulation x data x fsdp", "[1, inf)", "windows"),
    Field("accumulation", 1, "parts of a batch, computed one after another", "[1, inf)"),
    Field("init_from", "", "work directory, or DIR:STEP, that a run begins with; '' = drawn"),
    Field("teacher", "", "work directory of a model whose output is learned; '' = the data"),
    Field("imitate", "outputs", "of the teacher; 'stream': after each stage, too", IMITATED),
    Field("temperature", 1.0, "that divides the logits of teacher and model", "(0, inf)"),
    Field("optimizer", "adamw", "'muon': adamw for embeddings and scales", ("adamw", "muon")),
    Field("learning_rate", 1e-2, "peak, of all but neuron states; 0 = they stay", "[0, inf)"),
    Field("state_learning_rate", 1e-2, "peak, of neuron states", "(0, inf)"),
    Field("schedule", "cosine", "cosine, or stable and then a linear decay", ("cosine", "wsd")),
    Field("warmup_steps", 100, "updates of linear warm-up", "[0, inf)", "updates"),
    Field("decay_fraction", 0.2, "part of the updates in which 'wsd' decays", "(0, 1]"),
    Field("final_fraction", 0.1, "learning rate at the end, over the peak", "[0, 1]"),
    Field("weight_decay", 0.1, "of matrices and states, per unit of learning rate", "[0, inf)"),
    Field("b1", 0.9, "decay of AdamW's first moment", "[0, 1)"),
    Field("b2", 0.99, "decay of AdamW's second moment", "[0, 1)"),
    Field("clip_norm", 1.0, "greatest norm of the whole gradient", "(0, inf)"),
    Field("compute_dtype", "float32", "of activations and gradients, not of parameters", DTYPES),
    Field("label_smoothing", 0.0, "part of a target that goes to all tokens alike", "[0, 1)"),
    Field("ema", 0.0, "decay of a mean of parameters, which is evaluated; 0 = none", "[0, 1)"),
    Field("patience", 0, "evaluations without a better loss that end a run; 0 = none", "[0, inf)"),
    Field("spike", 0.0, "deviations above the mean loss, skipped as spike; 0 = off", "[0, inf)"),
    Field("max_bad_steps", 20, "skipped in a row that are trouble", "[1, inf)", "updates"),
    Field("max_rewinds", 2, "times that trouble sends a run back to a checkpoint", "[0, inf)"),
    Field("hang_minutes", 0.0, "without progress, a hang; 0 = off", "[0, inf)", "minutes"),
    Field("hang_exit", False, "whether a hang ends the process, to be started again"),
    Field("log_every", 20, "updates between rows of metrics", "[1, inf)", "updates"),
    Field("trackers", "tensorboard", "what shows rows too, by commas: tensorboard, trackio, wandb, "
          "your own; '' = none"),
    Field("profile", "", "updates to trace into DIR/profile: '10:20', from 1 on; '' = none"),
], _check_train, _unread_train)
EVAL = Section("eval", "The loss on held-out data, and samples.", [
    Field("every", 200, "updates between evaluations; the last has one", "[1, inf)", "updates"),
    Field("windows", 512, "windows or problems, evenly spread; 0 = all", "[0, inf)", "windows"),
    Field("batch_size", 32, "at a time, a multiple of data x fsdp of mesh", "[1, inf)", "windows"),
    Field("sample", 0, "of text, drawn at each evaluation; 0 = none", "[0, inf)", "tokens"),
    Field("prompt", "", "text that samples continue; '' = the start of a document"),
], _check_eval, _unread_eval)
CHECKPOINT = Section("checkpoint", "Saved states of a run.", [
    Field("every_steps", 200, "updates between checkpoints", "[1, inf)", "updates"),
    Field("every_minutes", 10.0, "a checkpoint at least this often", "(0, inf)", "minutes"),
    Field("keep", 3, "newest checkpoints kept; two at least, since one may be damaged", "[2, inf)"),
    Field("best", False, "whether that of the least held-out loss is kept too, and preferred"),
])
MESH = Section("mesh", "Devices (docs/meshes.md). Their number is data x fsdp x group.", [
    Field("data", -1, "parts of the batch; -1 = as many as devices are left", "[-1, inf)"),
    Field("fsdp", 1, "parts of the batch, the parameters and the optimizer", "[1, inf)"),
    Field("group", 1, "parts of the groups, a divisor of model.heads", "[1, inf)"),
], _check_mesh)
STABILITY = Section("stability", "Measured in training, held by the loss (docs/stability.md).", [
    Field("every", 200, "updates between measurements; 0 = none", "[0, inf)", "updates"),
    Field("measures", "rounds,tokens,departure,exponents", "what to measure, by commas"),
    Field("tokens", 1024, "held-out tokens to measure on", "[1, inf)", "tokens"),
    Field("rounds", 8, "rounds that the exponent per round follows", "[1, inf)", "rounds"),
    Field("regulariser", "none", "what the loss holds between low and high", REGULARISERS),
    Field("low", -2.0, "lower end of the band, a natural logarithm", unit="per round"),
    Field("high", 0.0, "upper end of the band", unit="per round"),
    Field("weight", 1.0, "of each squared unit outside the band", "[0, inf)", "nats/token"),
    Field("jacobian", 0.0, "of |Jacobian of a round|^2 / width; 0 = off", "[0, inf)", "nats/token"),
], _check_stability, _unread_stability)
# fmt: on
