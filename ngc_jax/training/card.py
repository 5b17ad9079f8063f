"""The card of a finished run: what was trained, on what, how, how good it is, and how to use it.

For: writing card.md from the config and the rows of a run. Not for: measuring anything.
"""

import os
import shlex
from typing import Any

import jax

from ngc_jax.analysis.page import describe
from ngc_jax.count import Parameters
from ngc_jax.data.settings import counted
from ngc_jax.report.blocks import heading, listing, table, to_markdown
from ngc_jax.runtime.errors import plain
from ngc_jax.runtime.files import Path, write_durably
from ngc_jax.runtime.metrics import amount, best_first, duration, latest, read_rows

TFDS = "~/tensorflow_datasets"  # where TFDS keeps sets by default
HELD_OUT = {
    "final/loss": "loss, all that was held out (nats per target)",
    "final/bits_per_byte": "bits per byte, whole held-out text",
    "final/exact": "share of held-out problems solved",
    "final/accuracy": "accuracy, all held-out images",
}


def write(workdir: Path, config: Any, data: str, stored: Parameters, generated: int) -> None:
    """Writes DIR/card.md; `data` says what they are, `generated` counts weights of a forward."""
    rows = read_rows(workdir)
    last, t, task = latest(rows), config.train, config.data.task
    unit, each = counted(config.data)
    seen = last["step"] * t.batch_size * each
    measures = HELD_OUT | {name: name for name in sorted(last) if name.startswith("stability/")}
    shown = [[said, _number(last[name])] for name, said in measures.items() if name in last]
    curve = [f"{_number(r['eval/loss'])} at {r['step']}" for r in rows if "eval/loss" in r]
    best = best_first(rows)[:1] if config.checkpoint.best else []
    curve += [f"that of step {step} is kept and opened (checkpoint.best)" for step in best]
    home = quoted(str(workdir))
    use = f"sample --workdir={home} --prompt='def ' --tokens=200"
    limits = "Trained on this unfiltered text alone: it continues text, and states no facts."
    if task:
        use, limits = f"solve --workdir={home}", "Trained on this task alone; it knows no other."
    if unit == "images":
        use = f"predict --workdir={home} image.png"
        limits = "It names one of its classes for any image, also for one of none of them."
    lines = [
        f"python -m ngc_jax.{use}",
        f"python -m ngc_jax.evaluate --workdir={home}{_places(config.data)}",
        f"python -m ngc_jax.inspect --workdir={home}",
        "",
        f"run = ngc_jax.load({str(workdir)!r})",
    ]
    name = plain(os.path.basename(os.path.abspath(workdir)))  # "." is a name, too
    text = f"""{heading(name, level=1).markdown}

**What.** {to_markdown(describe(config))}
Parameters: {stored.total:,} stored, {stored.matrices:,} of them in matrices and
{stored.embeddings:,} in embeddings; {generated:,} weights are generated in a forward pass.

**Data.** {to_markdown(data)}.
{f"Tokens: {to_markdown(task or config.data.tokenizer)}." if unit == "tokens" else ""}

**How.** {amount(seen)} {unit}, {t.optimizer}, peak learning rate {t.learning_rate:g} (neuron states
{t.state_learning_rate:g}), {t.schedule}, weight decay {t.weight_decay:g}, {t.compute_dtype}, seed
{config.seed}.
{duration(last["seconds"])} of training on {jax.device_count()} x {jax.devices()[0].device_kind}
with jax {jax.__version__}.
Updates skipped: {last["train/skipped"]}; batches skipped by rewinding:
{last.get("train/passed", 0)}.

**How good**, at the end, on data that was not trained on:

{table(["measure", "value"], shown).markdown}

Held-out loss on the way: {", ".join(curve)}.

**Use**, on the command line and in Python:

{listing(lines).markdown}

**Limits.** {limits}
"""
    write_durably(workdir / "card.md", text)


def _places(data: Any) -> str:
    """The flags that say where the text is: no command takes that from the directory."""
    flags = {"data_path": data.path, "validation_path": data.validation_path}
    flags["tfds_dir"] = data.tfds_name and (data.tfds_data_dir or TFDS)
    return "".join(f" --{name}={quoted(at)}" for name, at in flags.items() if at)


def quoted(path: str) -> str:
    """A path as a shell takes it; on one line, and in letters, whatever it holds."""
    if path.isprintable():
        return shlex.quote(path)
    safe = (c if c.isprintable() and c not in "'\\" else _bytes(c) for c in path)
    return f"$'{''.join(safe)}'"


def _bytes(letter: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"  # rows hold null for such numbers
