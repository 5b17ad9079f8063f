"""The training loop: `run(config, workdir)`, read from top to bottom in the order in which things
happen.

For: the order, and what happens between updates. Not for: what an update is (`steps.py`).

The run's one counter is the number of updates made. Update s reads batch s - 1 + passed at learning
rate s - 1; row s and checkpoint s are made after it. Rows are on disk before the checkpoint of
their step, so whatever checkpoint a run goes on from, no row before it is missing but of an
evaluation that was abandoned, which is made first; and the rows after it are dropped and made
again. `passed` counts the batches that rewinding left out, as Chowdhery et al. 2022 (PaLM, arXiv
2204.02311, 5.1) did by hand: back to a checkpoint from before the trouble, on with the batches
after it.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import make_model, validate
from ngc_jax.data.batches import batch_like, train_batches
from ngc_jax.data.tokens import load_data
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.runtime import multihost
from ngc_jax.runtime.checkpoint import Checkpoints
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path
from ngc_jax.runtime.metrics import Clock, Metrics, Progress, duration
from ngc_jax.runtime.preemption import Asked, Preemption
from ngc_jax.runtime.profiler import Profile
from ngc_jax.runtime.watchdog import Watchdog
from ngc_jax.training import card
from ngc_jax.training import match_size as budget
from ngc_jax.training.costs import costs, devices, peak, update_flops, versions
from ngc_jax.training.evaluation import compile_eval, compile_watch, held_out
from ngc_jax.training.penalty import make_penalty
from ngc_jax.training.rewiring import changes, compile_rewire, pruned
from ngc_jax.training.rounds import make_iteration, mark_of, marked
from ngc_jax.training.step import TrainState, abstract_state, init_state, make_train_step
from ngc_jax.training.workdir import claim

# kinds of rows that are made of the state between two updates
MEASURED = {"eval", "stability", "final"}


class Diverged(RuntimeError):
    """Too many updates in a row were skipped, as not finite or as spikes, and going back did not
    help.
    """


@dataclasses.dataclass
class Position:
    """Where a run is: all that changes from one update to the next, and that going back replaces."""

    step: int  # updates made
    state: TrainState  # after them
    batches: Iterator[Any]  # of the updates to come
    metrics: Metrics
    unmeasured: Collection[str]  # kinds of rows that were not made of this state yet
    rewinds: int  # times gone back
    passed: int  # batches left out by that
    saved: int  # the last step that was saved
    settled: int  # the last update whose scalars were read
    late: tuple[int, Any] | None = None  # the update whose scalars are still on the device
    # by any of many processes, when the last update that was read began
    wanted: tuple[bool, ...] = (False, False)
    broken: int = 0  # updates skipped in a row, up to `settled`
    warned: int = 0  # the update at which the standing warning of divergence began; 0 = none stands


def run(config: ConfigDict, workdir: Path) -> bool:
    """Train from scratch, or go on from the newest sound checkpoint in `workdir`. True: done;
    False: asked to stop.

    Raises UserError for what the user can mend, before anything is written, and Diverged.
    """
    train, data = config.train, config.data

    # ---- What is asked for -----------------------------------------------------------------------
    with multihost.agreed():
        validate(config)
        budget.resolve(config)
        source = load_data(data, mark_of(config))
    multihost.same(
        config=config.to_json(sort_keys=True), text=source.fingerprint, software=str(versions())
    )
    model = make_model(config, source.tokenizer.vocab)
    mesh = meshes.make_mesh(config.mesh)
    profile = Profile(train.profile, workdir / "profile")
    claim(workdir, config, source.tokenizer)
    print(f"data: {source.summary}")

    # ---- Compile, before anything is allocated ---------------------------------------------------
    like = abstract_state(model, train, mesh)
    batch = meshes.abstract_batch(mesh, batch_like(source.train, train.batch_size))
    # no other model has stages that could be watched
    decoder = model if isinstance(model, Decoder) else None
    penalty = make_penalty(decoder, config.stability) if decoder else None
    iteration = make_iteration(model, config)
    step_function = make_train_step(model, train, penalty, iteration, config.seed)
    began = time.monotonic()
    lies = meshes.shardings(like)

    def voting(state: TrainState, batch: Any, cast: Any) -> tuple[TrainState, Any]:
        after, scalars = step_function(state, batch)
        return after, (scalars, multihost.tally(cast))

    jitted = jax.jit(
        meshes.with_mesh(mesh, voting),
        out_shardings=(lies, meshes.replicated(mesh)),
        donate_argnums=0,
    )
    update = jitted.lower(like, batch, multihost.ballots(mesh, False, False)).compile()
    rewire = compile_rewire(model, config, mesh, like, batch)
    evaluate = compile_eval(model, config, mesh, source, marked(model, config))
    watch = (
        compile_watch(decoder, config, mesh, source) if decoder and config.stability.every else None
    )
    flops, most = update_flops(model, like.params, batch, iteration), peak(train.compute_dtype)
    costing = costs(model, like.params, flops, update)
    print(f"{costing}; compiled in {time.monotonic() - began:.1f} s on {devices(mesh)}")

    # ---- Where to start from: this directory's newest sound checkpoint, else step 0 --------------
    progress = Progress(train.steps)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)

    def newest(among: Collection[int]) -> int | None:
        """The newest sound checkpoint of these; one that is not sound is named and set aside."""
        sound, faults = checkpoints.newest_sound(among) if multihost.first() else (None, {})
        for bad, fault in faults.items():
            progress.say(
                f"checkpoint {bad} is passed over: {fault}; moved to {checkpoints.set_aside(bad)}"
            )
        (sound, *_) = multihost.exchange(sound)
        checkpoints.reload()
        return sound

    def begin(step: int, state: TrainState, rewinds: int = 0, passed: int = 0) -> Position:
        """Be at a checkpoint, or at step 0."""
        jax.block_until_ready(state)
        metrics = Metrics(workdir, step)
        batches = train_batches(
            source.train,
            batch_size=train.batch_size,
            seed=config.seed,
            start=step + passed,
            stop=train.steps + passed,
            rows=meshes.local_batch_rows(mesh, train.batch_size),
        )
        # What was due after this step and was abandoned has yet to be made.
        unmeasured = MEASURED - metrics.measured
        return Position(
            step, state, batches, metrics, unmeasured, rewinds, passed, saved=step, settled=step
        )

    start = newest(checkpoints.steps())
    seconds = 0.0  # of training, in earlier starts
    if start is None:
        # It runs once: at optimization level 1 it compiles three times faster, to the same bits.
        options = {"xla_backend_optimization_level": 1}
        init = jax.jit(
            lambda: init_state(model, train, config.seed),
            out_shardings=lies,
            compiler_options=options,
        )
        here = begin(0, init())
        print(f"starting from step 0 in {workdir}")
    else:
        step, state, meta = checkpoints.restore(start, like)
        if meta["data"] != source.fingerprint:
            raise UserError(
                f"the text has changed since checkpoint {step} of --workdir={workdir}: fingerprint "
                f"{source.fingerprint[:16]}, was {meta['data'][:16]}; give the same text (for the library source: the "
                "same Python; for a task: the same ngc_jax), or another --workdir"
            )
        here, seconds = (
            begin(step, state, meta.get("rewinds", 0), meta.get("passed", 0)),
            meta["seconds"],
        )
        print(f"going on from checkpoint {step} of {train.steps} in {workdir}")
        if meta["versions"] != versions():
            print(
                f"it was made with {meta['versions']}, this is {versions()}: equal to rounding, not to the bit"
            )

    # ---- The loop --------------------------------------------------------------------------------
    clock, last_save = Clock(seconds), time.monotonic()
    asked_to_stop = Preemption()
    report = workdir / ("hang.txt" if multihost.first() else f"hang_{jax.process_index()}.txt")
    watchdog = Watchdog(train.hang_minutes, train.hang_exit, report)

    def wishes() -> tuple[bool, bool]:
        """Whether this process was asked to stop, and whether it is time to save."""
        return bool(asked_to_stop), (
            time.monotonic() - last_save
        ) / 60 > config.checkpoint.every_minutes

    def settle() -> None:
        """Read the scalars of the update before this one and log them; in trouble, no further than
        to its last.
        """
        if here.late is None or here.broken >= train.max_bad_steps:
            return
        (at, on_device), here.late = here.late, None
        scalars, wanted = jax.device_get(on_device)
        here.wanted = tuple(map(bool, wanted))
        row = {name: value.item() for name, value in scalars.items()}
        watchdog.beat()
        here.settled, here.broken = at, row["train/bad_in_a_row"]
        if here.broken or at == 1 or at % train.log_every == 0 or at == train.steps:
            per_step = clock.lap(at)
            speed = {"tokens_per_second": train.batch_size * data.context / per_step}
            if most:
                speed["mfu"] = flops / per_step / (most * mesh.size)
            here.metrics.write({"step": at, **row, **speed, "seconds": clock.seconds()})
            progress.show(at, row["train/loss"], speed, per_step)
        likely = row["stability/warning"] > 0
        if likely and not here.warned:
            change = f"the parameters change by {row['stability/relative_update']:.1%} in an update"
            progress.say(
                f"step {at}: divergence likely: {change}; a smaller learning rate is safer"
            )
        here.warned = (here.warned or at) if likely or (here.broken and here.warned) else 0
        if here.broken:
            loss, norm = row["train/loss"], row["train/grad_norm"]
            fault = "a spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
            progress.say(f"step {at}: loss {loss}, gradient norm {norm}, {fault}: update skipped")

    def measure(kinds: Iterable[str]) -> bool:
        """Write the rows of these kinds; False: asked to stop meanwhile, and abandoned."""

        def between() -> None:
            watchdog.beat()
            if any(multihost.exchange(bool(asked_to_stop))):
                raise Asked

        def hold_out(kind: str) -> dict[str, float]:
            limit, part = (
                (config.eval.windows, "held-out") if kind == "eval" else (0, "all held-out")
            )
            rows = config.eval.batch_size
            result = held_out(
                evaluate, here.state.params, mesh, source.validation, rows, limit, between
            )
            said = ", ".join(
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items()
            )
            progress.say(f"step {here.step}: {part} {said}")
            return {f"{kind}/{name}": value for name, value in result.items()}

        with clock, contextlib.suppress(Asked):
            for kind in kinds:
                between()
                measures = (
                    watch(here.state.params) if watch and kind == "stability" else hold_out(kind)
                )
                here.metrics.write({"step": here.step, **measures})
            return True
        return False

    @contextlib.contextmanager
    def saving(ending: bool = False) -> Iterator[None]:
        """A save that fails is shouted of and training goes on, unless it ends here or there are
        many processes.
        """
        try:
            yield
        except OSError as error:
            last_sound, _ = checkpoints.newest_sound()
            kept = f"the last sound checkpoint, {last_sound}, is kept"
            if ending or jax.process_count() > 1:
                raise OSError(
                    f"{error}; {kept}; make room and give the same command again"
                ) from error
            again = (
                here.step
                - here.step % config.checkpoint.every_steps
                + config.checkpoint.every_steps
            )
            soon = f"next try after step {again}, or in {config.checkpoint.every_minutes:g} minutes"
            progress.say(f"NOT SAVED: {error}; training goes on; {kept}; {soon}")

    def rewind() -> Position:
        """Back to a checkpoint from before the trouble, and on with the batches after it. Raises
        Diverged.
        """
        with saving():
            checkpoints.wait()
        jax.block_until_ready(here.state)
        before = [at for at in checkpoints.steps() if at <= here.settled - here.broken]
        # Not one that a signal or the clock made: also a run that was never stopped must find it.
        planned = [at for at in before if at % config.checkpoint.every_steps == 0]
        sound = newest(planned or before)
        if sound is None or here.rewinds == train.max_rewinds:
            foretold = (
                f"the warning stood from step {here.warned} on"
                if here.warned
                else "no warning came before it"
            )
            raise Diverged(
                f"stopped at step {here.settled}: {here.broken} updates in a row were skipped, not finite or spikes; "
                f"rewound {here.rewinds} times; last sound checkpoint: {sound}; {foretold}; try a smaller "
                f"train.learning_rate={train.learning_rate:g} or "
                f"train.state_learning_rate={train.state_learning_rate:g}, or more "
                f"train.warmup_steps={train.warmup_steps}, in a new --workdir"
            )
        rewinds, left_out = here.rewinds + 1, here.settled - sound
        progress.say(
            f"step {here.settled}: rewound to checkpoint {sound}, {rewinds} of at most {train.max_rewinds} times; "
            f"the {left_out} batches since then are passed over"
        )
        checkpoints.drop_after(sound)
        here.metrics.close()
        del here.state  # its memory is needed
        back = begin(*checkpoints.restore(sound, like)[:2], rewinds, here.passed + left_out)
        row = {
            "train/rewinds": rewinds,
            "train/passed": back.passed,
            "train/rewound_from": here.settled,
        }
        # of what comes now: a run that goes on from `sound` redoes it
        back.metrics.write({"step": sound + 1, **row})
        clock.start(sound)
        watchdog.beat()
        return back

    with asked_to_stop, watchdog, profile:
        clock.start(here.step)
        while True:
            # What comes after update `here.step`, the one that this start goes on from as well.
            step, last = here.step, here.step == train.steps
            profile.turn(step, here.state)
            stop, overdue = wishes() if jax.process_count() == 1 else here.wanted
            due = {
                "eval": step > 0 and (last or step % config.eval.every == 0),
                "stability": step > 0
                and watch is not None
                and (last or step % config.stability.every == 0),
                "final": last,
            }
            kinds = [kind for kind in due if due[kind] and kind in here.unmeasured]
            save = last or step % config.checkpoint.every_steps == 0 or overdue
            if kinds or save or stop:
                settle()
            if here.broken >= train.max_bad_steps:
                here = rewind()
                continue
            measured = measure(kinds)
            # not asked anew: a step whose row is not written is not saved
            stop = stop or not measured
            # While updates are skipped nothing is saved: the checkpoints stay those from before the
            # trouble.
            if step > here.saved and (last or stop or (save and not here.broken)):
                with clock, saving():
                    checkpoints.wait()  # for the save before this one
                with clock, saving(ending=last or stop):
                    here.metrics.sync()
                    meta = {
                        "seconds": clock.seconds(),
                        "data": source.fingerprint,
                        "versions": versions(),
                    }
                    checkpoints.save(
                        step, here.state, meta | {"rewinds": here.rewinds, "passed": here.passed}
                    )
                    if last or stop:
                        checkpoints.wait()
                here.saved, last_save = step, time.monotonic()
                here.wanted = (False, False)
                watchdog.beat()
            if last or stop:
                break

            placed = meshes.put_batch(mesh, next(here.batches))
            cast = multihost.ballots(mesh, *wishes())
            with jax.transfer_guard("disallow"):
                here.state, scalars = update(here.state, placed, cast)
            settle()  # of the update before, while this one runs
            here.step, here.late, here.unmeasured = step + 1, (step + 1, scalars), MEASURED
            if rewire and changes(config).due(here.step):
                settle()
                here.state, changed = rewire(here.state, placed, here.step)
                here.metrics.write({"step": here.step, **changed})
            with saving():
                checkpoints.check()
        checkpoints.close()

    # ---- The end ---------------------------------------------------------------------------------
    here.metrics.close()
    if step < train.steps or not measured:
        kept = f"step {step} is saved" if step else "before the first update"
        progress.say(f"asked to stop: {kept}; the same command goes on from there")
        return False
    # Without the slots that a changing wiring has left empty.
    ended = jax.eval_shape(lambda params: pruned(model, params, config, step)[1], like.params)
    stored = count.parameters(ended, model.param_info())
    if multihost.first():
        card.write(workdir, config, source.summary, stored, count.generated_weights(model))
    progress.say(
        f"done: {train.steps} steps in {duration(clock.seconds())} of training; see {workdir / 'card.md'}"
    )
    return True
