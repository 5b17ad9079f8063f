"""A run between two updates: where it stands, and what is done there.

For: `Run`, which logs, measures, saves and rewinds. Not for: their order (`loop.py`), or an update.
Update s reads batch s - 1 + passed; row s, then checkpoint s are made after it. Only the row of an
abandoned evaluation comes after its checkpoint. `passed` counts batches that rewinding left out.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import make_model
from ngc_jax.data.batches import train_batches
from ngc_jax.data.settings import counted
from ngc_jax.data.tokens import Data
from ngc_jax.nn import mesh as meshes
from ngc_jax.runtime import checkpoint, files, metrics, multihost, preemption, watchdog
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.output import doing, now
from ngc_jax.training import evaluation, workdir
from ngc_jax.training.optimizer import stable_updates
from ngc_jax.training.step import TrainState, evaluated

MEASURED = {"eval", "stability", "final"}  # kinds of rows made of the state between two updates


class Diverged(RuntimeError):
    """Too many updates in a row were skipped, and rewinding did not help."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a run computes, compiled for its mesh."""

    init: Callable[[], TrainState]
    update: Callable[..., Any]  # (state, batch, ballots) -> state, (scalars, votes)
    rewire: Callable[..., Any] | None  # (state, batch, step) -> state, row
    evaluate: Callable[..., Any]  # see `evaluation.held_out`
    watch: evaluation.Watch | None
    state: TrainState  # shapes, dtypes and shardings of the state
    flops: float  # of an update


class Run:
    """One start of a run: the state after `step` updates, files, clock. UserError: other data."""

    unmeasured: Collection[str]  # kinds of rows that were not made of this state yet
    logged: int  # the last update whose scalars were read
    late: tuple[int, Any] | None  # the update whose scalars are still on the device
    votes: tuple[bool, ...]  # of all processes, when the last update that was read began
    broken: int  # updates skipped in a row, up to `logged`
    warned: int  # the update at which the standing warning of divergence began; 0: none stands

    def __init__(self, config: ConfigDict, home: files.Path, data: Data, mesh: Mesh, do: Programs):
        self.config, self.home, self.data, self.mesh, self.do = config, home, data, mesh, do
        train = config.train
        self.peak = count.peak(train.compute_dtype)
        self.progress = metrics.Progress(train.steps)
        self.checkpoints = checkpoint.Checkpoints(home / "checkpoints", config.checkpoint.keep)
        self.asked_to_stop = preemption.Preemption()
        hang = "hang.txt" if multihost.first() else f"hang_{jax.process_index()}.txt"
        self.watchdog = watchdog.Watchdog(train.hang_minutes, train.hang_exit, home / hang)
        step, state, meta = self._newest() or checkpoint.Restored(0, do.init(), checkpoint.META)
        now, then, made_with = data.fingerprint, meta["data"], meta["versions"]
        if step and now != then:
            raise UserError(
                f"the text has changed since checkpoint {step} of --workdir={home}: fingerprint "
                f"{now[:16]}, was {then[:16]}; give the same text (library source: the same "
                "Python; a task: the same ngc_jax), or another --workdir"
            )
        self._stand_at(step, state, meta)
        self.clock, self.last_save = metrics.Clock(float(meta["seconds"])), time.monotonic()
        of = f"checkpoint {step} of {train.steps}"
        begins = f"continuing from {of}" if step else "starting from step 0"
        print(f"{begins} in {home}")
        metrics.note(home, step, begins, flops=do.flops)
        if train.ema:
            print(f"evaluated, and used later: the average of parameters (train.ema={train.ema})")
        here = workdir.surroundings()
        changed = {name: was for name, was in made_with.items() if was != here.get(name, "")}
        if step and changed:
            found = {name: here.get(name, "") for name in changed}
            print(f"made with {changed}, now {found}: equal up to rounding only")

    def _stand_at(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Stands after `step` updates, with the batches and rows that follow them."""
        jax.block_until_ready(state)
        train, passed = self.config.train, meta["passed"]
        counted = meta["rows"], meta["rows_sha256"]
        self.metrics = metrics.Metrics(self.home, step, *counted, train.trackers)
        span = {"start": step + passed, "stop": train.steps + passed}
        size, seed = train.batch_size, self.config.seed
        rows = meshes.local_batch_rows(self.mesh, size)
        self.batches = train_batches(self.data.train, batch_size=size, seed=seed, rows=rows, **span)
        self.step, self.state, self.rewinds, self.passed = step, state, meta["rewinds"], passed
        # What was due after this step and was abandoned has yet to be made.
        self.unmeasured = MEASURED - self.metrics.measured
        self.saved = self.logged = step
        self.late, self.votes, self.broken, self.warned = None, (False, False), 0, 0

    def _newest(self, among: Collection[int] | None = None) -> checkpoint.Restored | None:
        """The newest checkpoint of these that is this run's; others are named and set aside."""
        wanted = workdir.comparable(self.config)
        found, faults = self.checkpoints.newest(self.do.state, wanted, among)
        for bad, fault in faults.items() if multihost.first() else ():
            aside = self.checkpoints.set_aside(bad)
            self.say(f"checkpoint {bad} is skipped: {fault}; moved to {aside}")
        return found

    def say(self, text: str) -> None:
        """Prints a line that stays, and notes it for who watches the run."""
        self.progress.say(text)
        metrics.note(self.home, getattr(self, "step", 0), text)

    @property
    def last(self) -> bool:
        """Whether all updates are made, or `train.patience` is at its end."""
        return self.step == self.config.train.steps or self.early

    @property
    def early(self) -> bool:
        """Whether the last `train.patience` evaluations were no better than one before them."""
        rows, patience = self.metrics.evaluated, self.config.train.patience
        best = next(iter(metrics.best_first(rows)), 0) if patience else 0
        return 0 < patience <= sum(row["step"] > best for row in rows)

    @property
    def improved(self) -> bool:
        """Whether this state is the best so far, and such are kept (`checkpoint.best`)."""
        best = self.config.checkpoint.best and metrics.best_first(self.metrics.evaluated)
        return bool(best) and best[0] == self.step

    def wishes(self) -> tuple[bool, bool]:
        """Whether this process was asked to stop, and whether the clock asks it to save."""
        minutes = (time.monotonic() - self.last_save) / 60
        return bool(self.asked_to_stop), minutes > self.config.checkpoint.every_minutes

    def due(self) -> list[str]:
        """Kinds of rows to make of this state."""
        kinds = ["eval", "stability"] if self.do.watch else ["eval"]
        now = [kind for kind in kinds if self.last or self.step % self.config[kind].every == 0]
        due = now * (self.step > 0) + ["final"] * self.last
        return [kind for kind in due if kind in self.unmeasured]

    def advance(self, outputs: Any) -> None:
        """Notes an update that has been started; its scalars are logged later."""
        self.step, self.unmeasured = self.step + 1, MEASURED
        self.late = self.step, outputs

    def log(self) -> None:
        """Reads the scalars of the newest update, and writes its row; in trouble, no further."""
        train = self.config.train
        if self.late is None or self.broken >= train.max_bad_steps:
            return
        (at, outputs), self.late = self.late, None
        row, votes = jax.tree.map(lambda value: value.item(), jax.device_get(outputs))
        self.votes = tuple(votes)
        self.watchdog.beat()
        self.logged, self.broken = at, row["train/bad_in_a_row"]
        if self.broken or at == 1 or at % train.log_every == 0 or at == train.steps:
            per_step = self.clock.lap(at)
            unit, each = counted(self.config.data)
            speed = {f"{unit}_per_second": train.batch_size * each / per_step}
            if self.peak:
                speed["mfu"] = self.do.flops / per_step / (self.peak * self.mesh.size)
            self.metrics.write({"step": at, **row, **speed, "seconds": self.clock.seconds()})
            self.progress.show(at, row["train/loss"], speed, per_step)
        likely = row["stability/warning"] > 0
        if likely and not self.warned:
            change = f"the parameters change by {row['stability/relative_update']:.1%} in an update"
            self.progress.say(f"step {at}: divergence likely: {change}; lower the learning rate")
        self.warned = (self.warned or at) if likely or (self.broken and self.warned) else 0
        if self.broken:
            loss, norm = row["train/loss"], row["train/grad_norm"]
            fault = "a spike" if math.isfinite(loss + norm) else "not finite"
            found = f"loss {loss}, gradient norm {norm}, {fault}"
            self.progress.say(f"step {at}: {found}: update skipped")

    def measure(self) -> bool:
        """Writes the rows that are due. False: asked to stop meanwhile, and abandoned."""

        def unless_asked(program: Any, *given: Any) -> Any:
            self.watchdog.beat()
            if any(multihost.exchange(bool(self.asked_to_stop))):
                raise preemption.Asked
            return program(*given)

        step, c = partial(unless_asked, self.do.evaluate), self.config
        parts = {"eval": ("held-out", c.eval.windows), "final": ("all held-out", 0)}
        with self.clock, doing("measuring"), contextlib.suppress(preemption.Asked):
            while kinds := self.due():  # an evaluation may be the last one
                kind, params = kinds[0], evaluated(self.state)
                now("measuring stability" if kind == "stability" else "evaluating")
                if kind == "stability":
                    row = unless_asked(self.do.watch, params)
                else:
                    part, limit = parts[kind]
                    amount = self.data.validation, c.eval.batch_size, limit
                    found = evaluation.held_out(step, params, self.mesh, *amount).items()
                    shown = ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in found)
                    self.progress.say(f"step {self.step}: {part} {shown}")
                    row = {f"{kind}/{name}": value for name, value in found}
                self.metrics.write({"step": self.step, **row})
                self.unmeasured = {*self.unmeasured} - {kind}
                if kind == "eval" and c.eval.sample:
                    self.sample(params)
            return True
        return False

    def sample(self, params: Any) -> None:
        """Shows how these parameters continue `eval.prompt`, by the same draws each time."""
        from ngc_jax.training.load import Trained  # which trains by these files

        now("sampling")
        asked, model = self.config.eval, make_model(self.config, self.data.tokenizer.vocab)
        given: Any = (self.home, self.config, model, params, self.data.tokenizer, self.step, {})
        made = Trained(*given).generate(asked.prompt, tokens=asked.sample, seed=self.config.seed)
        signs = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in asked.prompt + made)
        shown = "".join(signs).replace("\n", "\n  | ")
        self.progress.say(f"step {self.step}: sample\n  | {shown}")
        metrics.note(self.home, self.step, "sample", prompt=asked.prompt, sample=made)

    def save(self, ending: bool) -> None:
        """Saves this state in the background; before the run ends, waits until it is on disk."""
        with self.clock, doing("saving"), self.saving():
            self.checkpoints.wait()  # for the save before this one
        with self.clock, doing("saving"), self.saving(ending):
            self.metrics.sync()
            meta = {"seconds": self.clock.seconds(), "data": self.data.fingerprint}
            meta |= {
                "versions": workdir.surroundings(),
                "rewinds": self.rewinds,
                "passed": self.passed,
            }
            meta |= {"config": workdir.identity(self.config), **self.metrics.written()}
            # Beside the newest: the best, and one that a longer run can go on from (longer.py).
            spared: list[Sequence[int]] = [range(stable_updates(self.config.train), 0, -1)]
            spared += [metrics.best_first(self.metrics.evaluated)] * self.config.checkpoint.best
            self.checkpoints.save(self.step, self.state, meta, spared)
            if ending:
                self.checkpoints.wait()
        self.saved, self.last_save, self.votes = self.step, time.monotonic(), (False, False)
        self.watchdog.beat()

    @contextlib.contextmanager
    def saving(self, ending: bool = False) -> Iterator[None]:
        """Reports a save that fails. Raises OSError if the run ends, or has many processes."""
        try:
            yield
        except OSError as error:
            sound = self.checkpoints.newest_sound()
            kept = f"the last sound checkpoint, {sound}, is kept" if sound else "none is sound yet"
            if ending or jax.process_count() > 1:
                raise OSError(f"{error}; {kept}; make room, give the same command again") from error
            every = self.config.checkpoint
            later = (self.step // every.every_steps + 1) * every.every_steps
            soon = f"next try after step {later}, or in {every.every_minutes:g} minutes"
            self.say(f"NOT SAVED: {error}; training continues; {kept}; {soon}")

    def rewind(self) -> None:
        """Back to a checkpoint, and past the batches since, as PaLM (2204.02311); or Diverged."""
        train, logged, every = self.config.train, self.logged, self.config.checkpoint.every_steps
        with self.saving():
            self.checkpoints.wait()
        jax.block_until_ready(self.state)
        before = [at for at in self.checkpoints.steps() if at <= logged - self.broken]
        del self.state  # its memory is needed
        # Not one that a signal or the clock made: a run that was never stopped must find it, too.
        found = self._newest([at for at in before if at % every == 0] or before)
        if found is None or self.rewinds == train.max_rewinds:
            warned = (
                f"a warning stood from step {self.warned}" if self.warned else "no warning came"
            )
            told = (
                f"stopped at step {logged}: {self.broken} updates in a row were skipped, not "
                f"finite or spikes; rewound {self.rewinds} times; last sound checkpoint: "
                f"{found and found.step}; {warned}; try a smaller "
                f"train.learning_rate={train.learning_rate:g} or train.state_learning_rate="
                f"{train.state_learning_rate:g}, or more train.warmup_steps={train.warmup_steps}, "
                "in a new --workdir"
            )
            metrics.note(self.home, logged, told)
            raise Diverged(told)
        sound, state, meta = found
        rewinds, left_out = self.rewinds + 1, logged - sound
        self.progress.say(
            f"step {logged}: rewound to checkpoint {sound}, {rewinds} of at most "
            f"{train.max_rewinds} times; the {left_out} batches since then are skipped"
        )
        self.checkpoints.drop_after(sound)
        self.metrics.close()
        self._stand_at(sound, state, {**meta, "rewinds": rewinds, "passed": self.passed + left_out})
        row = {"train/rewinds": rewinds, "train/passed": self.passed, "train/rewound_from": logged}
        # A row of the update to come: a run that continues from `sound` redoes it.
        self.metrics.write({"step": sound + 1, **row})
        self.clock.lap(sound)
        self.watchdog.beat()
