"""Can divergence be predicted? The study behind `ngc_jax/training/monitors.py`, one command:

    python -m experiments.early_warning --workdir=runs/early_warning --jobs=2

For: many small runs with peak learning rates from stable to diverging, each with a long warm-up, so
that they diverge at different times. Statistics of earlier steps are candidate warnings. They are
selected on 48 runs and tested on 80 others; 16 runs of a dense model test the transfer. The study
continues after a kill, and writes results.md and warning.png beside the runs. All runs of a set
share one program, so they are not runs of `run.py`. Not for: the warning itself.
"""

import argparse
import concurrent.futures
import multiprocessing
import pathlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.stats import auroc
from ngc_jax.commands.arguments import command
from ngc_jax.config import base, model_shape
from ngc_jax.data.batches import Batch, train_batches
from ngc_jax.data.tokens import load_data
from ngc_jax.nn.decoder import Decoder
from ngc_jax.report.figures import BLUE, RED, figure
from ngc_jax.runtime.files import expand
from ngc_jax.training.monitors import HORIZON, THRESHOLD
from ngc_jax.training.stability_metrics import make_watch
from ngc_jax.training.step import init_state, make_train_step

STEPS, RUNS = 600, 16  # of a set
# peak learning rates of a set, reached after two thirds of the steps
RATES = np.logspace(-2.3, 0, RUNS)
SETS = {
    "selection set": [("addressed", seed) for seed in (1, 2, 3)],
    "test set": [("addressed", seed) for seed in range(100, 105)],
    "dense model": [("dense", seed) for seed in (200,)],
}
MARGIN = 0.3  # nats: a run diverges if its smoothed loss is this far above its minimum
LEAD = 50  # updates before the divergence that the AUROC may not use
Run = dict[str, np.ndarray]


# ---- The runs ------------------------------------------------------------------------------------


def settings(rule: str, cache_dir: str) -> Any:
    config = base()
    config.data.context, config.data.cache_dir = 32, cache_dir
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = 32, 64, 4, 2
    config.model.p_inter, config.model.rounds, config.model.rule = 2, 3, rule
    config.train.steps, config.train.warmup_steps, config.train.batch_size = (
        STEPS,
        STEPS * 2 // 3,
        16,
    )
    config.train.schedule = "wsd"
    return config


def simulate(rule: str, seed: int, out: pathlib.Path, cache_dir: str) -> None:
    """Train a set, 16 rates at once, on the same batches; write all signals of all steps to a file,
    [steps, runs].
    """
    config = settings(rule, cache_dir)
    data = load_data(config.data)
    model = Decoder(model_shape(config, data.tokenizer.vocab))
    watch = make_watch(model, types.SimpleNamespace(measures="rounds"))
    adam = optax.ScaleByAdamState

    def momentum(state: Any) -> Any:
        return next(
            s.mu
            for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, adam))
            if isinstance(s, adam)
        )

    def step(state: Any, rate: jax.Array, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        train = types.SimpleNamespace(
            **{**config.train.to_dict(), "learning_rate": rate, "state_learning_rate": rate}
        )
        after, scalars = make_train_step(model, train)(state, batch)
        old, new = momentum(state.optimizer), momentum(after.optimizer)
        # after clipping, times 1 - b1
        gradient = jax.tree.map(lambda n, o: n - config.train.b1 * o, new, old)
        cosine = optax.tree.vdot(gradient, old) / (
            optax.tree.norm(gradient) * optax.tree.norm(old) + 1e-12
        )
        size = {"alignment": cosine, "parameter_norm": optax.tree.norm(state.params)}
        return after, {**scalars, **watch(state.params, batch), **size}

    keys = jnp.arange(RUNS) + RUNS * seed
    state = jax.jit(jax.vmap(lambda seed: init_state(model, config.train, seed)))(keys)
    update = jax.jit(jax.vmap(step, in_axes=(0, 0, None)), donate_argnums=0)
    rows = []
    for batch in train_batches(data.train, batch_size=16, seed=seed, start=0, stop=STEPS):
        state, scalars = update(state, jnp.asarray(RATES, jnp.float32), batch)
        rows.append(scalars)
    signals = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    unfinished = out.with_suffix(".part.npz")
    np.savez_compressed(unfinished, **signals)  # type: ignore[arg-type]
    unfinished.rename(out)
    print(f"{out.stem}: {divergences(signals['train/loss'].T)} of {RUNS} runs diverge", flush=True)


# ---- The statistics ------------------------------------------------------------------------------


def smooth(values: np.ndarray, horizon: int) -> np.ndarray:
    """Moving mean over `horizon` values; at the beginning, the mean of the values so far."""
    out, level = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        level += (value - level) / min(i + 1, horizon)
        out[i] = level
    return out


def diverges(loss: np.ndarray) -> int | None:
    """The step at which the smoothed loss is MARGIN above its minimum, or None. A loss that is not
    finite counts as 20.
    """
    level = smooth(np.where(np.isfinite(loss), loss, 20.0), 20)
    risen = level > np.minimum.accumulate(level) + MARGIN
    return int(np.argmax(risen)) if risen.any() else None


def divergences(losses: Iterable[np.ndarray]) -> int:
    """The number of runs that diverge."""
    return sum(diverges(loss) is not None for loss in losses)


def logarithm(values: np.ndarray) -> np.ndarray:
    return np.log(np.nan_to_num(values, nan=1e9, posinf=1e9) + 1e-9)


MONITOR = "relative update"
STATISTICS: dict[str, Callable[[Run], np.ndarray]] = {
    MONITOR: lambda r: smooth(logarithm(r["stability/relative_update"]), HORIZON),
    "gradient norm (rival)": lambda r: smooth(logarithm(r["train/grad_norm"]), HORIZON),
    "gradient norm over its moving mean": lambda r: (
        smooth(logarithm(r["train/grad_norm"]), 5) - smooth(logarithm(r["train/grad_norm"]), 100)
    ),
    "deviation of the loss from its moving mean (rival)": lambda r: np.sqrt(
        smooth((r["train/loss"] - smooth(r["train/loss"], HORIZON)) ** 2, HORIZON)
    ),
    "loss over its moving mean": lambda r: smooth(r["train/loss"], 5) - smooth(r["train/loss"], 50),
    "gradient against momentum": lambda r: -smooth(r["alignment"], HORIZON),
    "growth of the parameters": lambda r: smooth(np.gradient(np.log(r["parameter_norm"])), HORIZON),
    "contraction per round": lambda r: smooth(
        logarithm(r["stability/contraction_per_round"]), HORIZON
    ),
    "boundedness": lambda r: smooth(logarithm(r["stability/boundedness"]), HORIZON),
    "drive ratio": lambda r: smooth(r["stability/drive_ratio"], HORIZON),
}
BEGIN = 30  # first updates, in which every run is unstable


def judge(
    runs: list[Run], statistic: Callable[[Run], np.ndarray], threshold: float | None
) -> dict[str, Any]:
    """AUROC up to LEAD updates before divergence; leads and false alarms at a threshold.

    Without a threshold, it is set where 3% of the healthy runs raise a false alarm.
    """
    ill, healthy, leads = [], [], []
    for run in runs:
        when, values = diverges(run["train/loss"]), statistic(run)
        if when is None:
            healthy.append(float(np.max(values[BEGIN:])))
        elif when - LEAD > BEGIN:
            ill.append(float(np.max(values[BEGIN : when - LEAD])))
    threshold = float(np.quantile(healthy, 0.97)) if threshold is None else threshold
    for run in runs:
        when = diverges(run["train/loss"])
        if when is not None:
            over = statistic(run)[BEGIN:when] > threshold
            leads.append(when - BEGIN - int(np.argmax(over)) if over.any() else 0)
    draws = np.random.default_rng(0)
    resampled = [
        auroc(draws.choice(ill, len(ill)), draws.choice(healthy, len(healthy))) for _ in range(1000)
    ]
    return {
        "auroc": auroc(ill, healthy),
        "interval": np.quantile(resampled, [0.025, 0.975]),
        "ill": len(ill),
        "lead": float(np.median(leads)),
        "in_time": float(np.mean(np.array(leads) >= LEAD)),
        "false": float(np.mean(np.array(healthy) > threshold)),
        "threshold": threshold,
    }


def report(home: pathlib.Path) -> str:
    """All results as Markdown."""
    runs: dict[str, list[Run]] = {}
    for name, sets in SETS.items():
        loaded = [np.load(home / f"{rule}-{seed}.npz") for rule, seed in sets]
        runs[name] = [
            {key: data[key][:, i] for key in data} for data in loaded for i in range(RUNS)
        ]
    lines = ["`python -m experiments.early_warning` makes this report.", ""]
    thresholds: dict[str, float] = {}
    for name, members in runs.items():
        diverging = divergences(run["train/loss"] for run in members)
        lines += [
            f"## {name.capitalize()}: {len(members)} runs, {diverging} diverge",
            "",
            f"| statistic | AUROC, {LEAD} updates ahead (95%) | median lead (updates) "
            f"| warned {LEAD} updates ahead | false alarms |",
            "| --- | --- | --- | --- | --- |",
        ]
        shipped = f"the monitor, at its threshold of {THRESHOLD}"
        for label, statistic in {shipped: STATISTICS[MONITOR], **STATISTICS}.items():
            found = judge(
                members, statistic, np.log(THRESHOLD) if label == shipped else thresholds.get(label)
            )
            thresholds.setdefault(label, found["threshold"])
            low, high = found["interval"]
            lines.append(
                f"| {label} | {found['auroc']:.3f} ({low:.3f} to {high:.3f}) | {found['lead']:.0f} "
                f"| {found['in_time']:.0%} | {found['false']:.0%} |"
            )
        lines.append("")
    lines.append(
        "On the selection set, a false-alarm rate of 3% corresponds to a relative update of "
        f"{np.exp(thresholds[MONITOR]):.4f}."
    )
    return "\n".join(lines) + "\n"


def draw(home: pathlib.Path) -> None:
    """Draw loss and relative update of the runs of one set, those that diverge in red."""
    data = np.load(home / f"addressed-{SETS['test set'][0][1]}.npz")

    def panels(canvas: Any) -> None:
        above, below = canvas.subplots(2, 1, sharex=True)
        for i in range(RUNS):
            loss = smooth(data["train/loss"][:, i], 20)
            when = diverges(data["train/loss"][:, i])
            colour = BLUE if when is None else RED
            above.plot(loss, color=colour, linewidth=0.8)
            moved = smooth(logarithm(data["stability/relative_update"][:, i]), HORIZON)
            below.semilogy(np.exp(moved), color=colour, linewidth=0.8)
            if when is not None:
                above.plot(when, loss[when], "o", color=colour)
                below.axvline(when, color=colour, linewidth=0.3)
        below.axhline(THRESHOLD, color="black", linewidth=0.8, linestyle="--")
        above.set(ylabel="loss (nats per byte)", ylim=(1.8, 5))
        below.set(ylabel="relative update", xlabel="updates (warm-up to 400)")
        above.set_title("16 peak learning rates. Red: diverges, at the dot. Dashed: threshold")

    made = figure("warning", "", panels, height=5.5, width=8.0)
    (home / "warning.png").write_bytes(made.files["warning.png"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", type=expand, default=pathlib.Path("runs/early_warning"))
    parser.add_argument("--jobs", type=int, default=2, help="sets at a time")
    parser.add_argument(
        "--cache_dir", default="", help="for prepared text; default: config.data.cache_dir"
    )
    args = parser.parse_args()
    home = args.workdir.absolute()
    home.mkdir(parents=True, exist_ok=True)
    missing = [
        (rule, seed, home / f"{rule}-{seed}.npz", args.cache_dir)
        for sets in SETS.values()
        for rule, seed in sets
        if not (home / f"{rule}-{seed}.npz").exists()
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for done in [pool.submit(simulate, *one) for one in missing]:
            done.result()
    (home / "results.md").write_text(report(home), encoding="utf-8")
    draw(home)
    print((home / "results.md").read_text("utf-8"))


if __name__ == "__main__":
    command(main, goes_on=True)
