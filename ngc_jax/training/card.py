"""The card of a finished run: what was trained, on what, how, how good, and how to use it.

For: writing card.md from the config and the rows of a run. Not for: measuring anything.
"""

from typing import Any

import jax

from ngc_jax.count import Parameters
from ngc_jax.runtime.files import Path, write_durably
from ngc_jax.runtime.metrics import Row, duration, read_rows

HELD_OUT = {
    "final/loss": "loss, all that was held out (nats per target)",
    "final/bits_per_byte": "bits per byte, whole held-out text",
    "final/exact": "share of held-out problems solved",
}


def write(workdir: Path, config: Any, data: str, stored: Parameters, generated: int) -> None:
    """Write DIR/card.md."""
    rows = read_rows(workdir)
    # the latest value of every name
    last = {name: value for row in rows for name, value in row.items()}
    m, t = config.model, config.train
    i = config.iteration
    drawn = "" if i.rounds == "fixed" else f" ({i.low} to {i.high} in training, {i.rounds})"
    stages = f"Stages: {m.prelude}, then {m.core} in {m.rounds} rounds{drawn}, then {m.coda}."
    form, sizes = {
        "decoder": ("decoder", f"{m.heads} heads.\n{stages}"),
        "recurrent": ("recurrent model", f"{m.core} cells in {m.rounds} rounds a token."),
        "bdh": ("BDH (arXiv 2509.26507)", f"{m.heads} heads.\nOne layer, {m.rounds} times."),
    }[m.kind]
    if m.kind == "bdh" or m.rule == "dense":
        kind = f"a dense {form}, for comparison"
    else:
        intra = "none" if m.p_intra == 0 else f"up to {m.p_intra} numbers a neuron"
        kind = (
            f"a Neuronal Group Communication {form}: {m.groups} groups, intra-group part: {intra}; between groups: "
            f"{m.rule} with {m.p_inter} numbers, message activation {m.message_activation}"
        )
    stability = [
        f"| {name} | {_number(last[name])} |"
        for name in sorted(last)
        if name.startswith("stability/")
    ]
    held_out = [
        f"| {said} | {_number(last[name])} |" for name, said in HELD_OUT.items() if name in last
    ]
    use = 'sample --workdir={} --prompt="def " --tokens=200'
    limits = "Trained on this text alone, without alignment or filtering: it continues text, and states no facts."
    if config.data.task:
        use, limits = "solve --workdir={}", "Trained on this task alone; it knows no other."
    seen = t.steps * t.batch_size * config.data.context / 1e6
    text = f"""# {workdir.name}

**What.** A model trained from scratch, {kind}.
Width {m.width}, hidden {m.hidden}, {sizes}
Parameters: {stored.total:,} stored, {stored.matrices:,} of them in matrices and {stored.embeddings:,} in embeddings;
{generated:,} weights are generated in a forward pass.

**Data.** {data}. Tokens: {config.data.task or config.data.tokenizer}; windows of {config.data.context}.

**How.** {t.steps:,} updates of {t.batch_size} windows ({seen:.2f} M tokens), {t.optimizer},
peak learning rate {t.learning_rate:g} (neuron states {t.state_learning_rate:g}), {t.schedule}, weight decay
{t.weight_decay:g}, {t.compute_dtype}, seed {config.seed}. {duration(last["seconds"])} of training on
{jax.device_count()} x {jax.devices()[0].device_kind} with jax {jax.__version__}.
Updates skipped: {last["train/skipped"]}; batches passed over by rewinding: {last.get("train/passed", 0)}.

**How good**, at the end, on what was not trained on:

| measure | value |
| --- | --- |
{_lines(held_out + stability)}
{_curve(rows)}
**Use.**

    python -m ngc_jax.{use.format(workdir)}
    python -m ngc_jax.evaluate --workdir={workdir}
    python -m ngc_jax.inspect --workdir={workdir}

**Limits.** {limits}
"""
    write_durably(workdir / "card.md", text)


def _number(value: float | None) -> str:
    # rows hold null for what is not finite
    return "not finite" if value is None else f"{value:.4f}"


def _lines(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _curve(rows: list[Row]) -> str:
    points = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    return (
        "Held-out loss on the way: "
        + ", ".join(f"{_number(loss)} at {step}" for step, loss in points)
        + ".\n"
    )
