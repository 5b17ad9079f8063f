"""The training loop: `run(config, workdir)`, read from top to bottom in the order in which things happen.

For: the order, and what happens between updates. Not for: what an update is (`steps.py`).

The run's one counter is the number of updates made. Update s reads batch s - 1 at learning rate s - 1; row s and
checkpoint s are made after it. Rows are on disk before the checkpoint of their step, so whatever checkpoint a run
goes on from, no row before it is missing, and the rows after it are dropped and made again.
"""

import pathlib
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import ngc_jax
from ngc_jax import budget, card, count
from ngc_jax import mesh as meshes
from ngc_jax.checkpoint import Checkpoints
from ngc_jax.config import make_model, validate
from ngc_jax.data.batches import Windows, train_batches
from ngc_jax.data.tokens import load_tokens
from ngc_jax.errors import UserError
from ngc_jax.evaluate import compile_eval, compile_watch, held_out
from ngc_jax.metrics import Clock, Metrics, Progress, duration
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.preemption import Preemption
from ngc_jax.rewire import changes, compile_rewire, pruned
from ngc_jax.stability.regulariser import make_penalty
from ngc_jax.steps import init_state, make_train_step
from ngc_jax.workdir import abstract_state, claim


class Diverged(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


def run(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Train from scratch, or go on from the newest sound checkpoint in `workdir`. True: done; False: asked to stop.

    Raises UserError for what the user can mend, before anything is written, and Diverged.
    """
    train, data = config.train, config.data

    # ---- What is asked for -------------------------------------------------------------------------------------
    validate(config)
    budget.resolve(config)
    tokens = load_tokens(data)
    model = make_model(config, tokens.tokenizer.vocab)
    mesh = meshes.make_mesh(config.mesh)
    claim(workdir, config, tokens.tokenizer)
    print(f"data: {tokens.summary}")

    # ---- Compile, before anything is allocated -----------------------------------------------------------------
    like = meshes.place(mesh, abstract_state(model, config))
    batch = jax.ShapeDtypeStruct((train.batch_size, data.context + 1), jnp.int32, sharding=meshes.rows(mesh))
    decoder = model if isinstance(model, Decoder) else None  # no other model has stages that could be watched
    penalty = make_penalty(decoder, config.stability) if decoder else None
    step_function = make_train_step(model, train, tokens.tokenizer.mark, data.isolate_documents, penalty)
    began = time.monotonic()
    lies = meshes.shardings(like)
    jitted = jax.jit(meshes.on(mesh, step_function), out_shardings=(lies, meshes.whole(mesh)), donate_argnums=0)
    update = jitted.lower(like, batch).compile()
    rewire = compile_rewire(model, config, mesh, tokens.tokenizer.mark, like, batch)
    evaluate = compile_eval(model, config, mesh, tokens)
    watch = compile_watch(decoder, config, mesh, tokens) if decoder and config.stability.every else None
    print(costs(model, like, batch, update) + f"; compiled in {time.monotonic() - began:.1f} s on {devices(mesh)}")

    # ---- Where to start from: this directory's newest sound checkpoint, else step 0 ------------------------------
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    start, faults = checkpoints.newest_sound()
    for step, fault in faults.items():
        print(f"checkpoint {step} is passed over: {fault}; moved to {checkpoints.set_aside(step)}")
    if start is None:
        # It runs once: at optimization level 1 it compiles three times faster, to the same bits.
        options = {"xla_backend_optimization_level": 1}
        init = jax.jit(lambda: init_state(model, train, config.seed), out_shardings=lies, compiler_options=options)
        step, state, spent = 0, init(), 0.0
        print(f"starting from step 0 in {workdir}")
    else:
        step, state, meta = checkpoints.restore(start, like)
        spent = meta["seconds"]
        if meta["data"] != tokens.fingerprint:
            raise UserError(
                f"the text has changed since checkpoint {step} of --workdir={workdir}: fingerprint "
                f"{tokens.fingerprint[:16]}, was {meta['data'][:16]}; give the same text (for the library source: the "
                "same Python), or another --workdir"
            )
        print(f"going on from checkpoint {step} of {train.steps} in {workdir}")
        if meta["versions"] != versions():
            print(f"it was made with {meta['versions']}, this is {versions()}: equal to rounding, not to the bit")

    # ---- The loop ------------------------------------------------------------------------------------------------
    metrics, progress, clock = Metrics(workdir, step), Progress(train.steps), Clock(spent)
    last_save = time.monotonic()
    late: tuple[int, Any] | None = None  # the update whose scalars are still on the device
    broken = 0  # updates skipped in a row
    warned = 0  # the update at which the standing warning of divergence began; 0 = none stands

    def settle() -> None:
        """Read the scalars of the update before this one, log them, and stop where training has broken down."""
        nonlocal late, broken, warned
        if late is None:
            return
        (at, scalars), late = late, None
        row = {name: value.item() for name, value in jax.device_get(scalars).items()}
        broken = row["train/bad_in_a_row"]
        if broken or at == 1 or at % train.log_every == 0 or at == train.steps:
            per_step = clock.lap(at)
            speed = train.batch_size * data.context / per_step
            metrics.write({"step": at, **row, "tokens_per_second": speed, "seconds": clock.seconds()})
            progress.show(at, row["train/loss"], speed, per_step)
        likely = row["stability/warning"] > 0
        if likely and not warned:
            change = f"the parameters change by {row['stability/relative_update']:.1%} in an update"
            progress.say(f"step {at}: divergence likely: {change}; a smaller learning rate is safer")
        warned = (warned or at) if likely or (broken and warned) else 0
        if broken:
            progress.say(f"step {at}: loss {row['train/loss']}, gradient norm {row['train/grad_norm']}: update skipped")
        if broken >= train.max_bad_steps:
            checkpoints.wait()
            sound, _ = checkpoints.newest_sound()
            foretold = f"the warning stood from step {warned} on" if warned else "no warning came before it"
            raise Diverged(
                f"stopped at step {at}: loss or gradient was not finite {broken} times in a row; last sound "
                f"checkpoint: {sound}; {foretold}; try a smaller train.learning_rate={train.learning_rate:g} or "
                f"train.state_learning_rate={train.state_learning_rate:g}, or more "
                f"train.warmup_steps={train.warmup_steps}, in a new --workdir"
            )

    def measure(name: str, limit: int) -> None:
        with clock:
            result = held_out(evaluate, state.params, config, mesh, tokens, limit)
            metrics.write({"step": step} | {f"{name}/{k}": v for k, v in result.items()})
            kind = "held-out" if name == "eval" else "held-out, whole text"
            progress.say(
                f"step {step}: {kind} loss {result['loss']:.4f} nats, {result['bits_per_byte']:.4f} bits per byte"
            )

    batches = train_batches(
        Windows(tokens.train, data.context),
        batch_size=train.batch_size,
        seed=config.seed,
        start=step,
        stop=train.steps,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    with Preemption() as asked_to_stop:
        clock.start(step)
        for windows in batches:
            placed = meshes.put_rows(mesh, windows)
            with jax.transfer_guard("disallow"):
                state, scalars = update(state, placed)
            settle()  # of the update before, while this one runs
            step, late = step + 1, (step + 1, scalars)
            checkpoints.check()

            if rewire and changes(config).due(step):
                settle()
                state, changed = rewire(state, placed, step)
                metrics.write({"step": step, **changed})

            last = step == train.steps
            stop = bool(asked_to_stop)  # once: asked after the save, the run would leave with a step unsaved
            if last or step % config.eval.every == 0:
                settle()
                measure("eval", config.eval.windows)
            if watch and (last or step % config.stability.every == 0):
                settle()
                with clock:
                    metrics.write({"step": step, **watch(state.params)})
            if last:
                measure("final", 0)
            minutes = (time.monotonic() - last_save) / 60
            due = step % config.checkpoint.every_steps == 0 or minutes > config.checkpoint.every_minutes
            if last or due or stop:
                settle()
                # While updates are skipped nothing is saved: the checkpoints stay those from before the trouble.
                if last or stop or not broken:
                    with clock:
                        metrics.sync()
                        meta = {"seconds": clock.seconds(), "data": tokens.fingerprint, "versions": versions()}
                        checkpoints.save(step, state, meta)
                    last_save = time.monotonic()
            if stop:
                break
        checkpoints.close()

    # ---- The end ---------------------------------------------------------------------------------------------------
    metrics.close()
    if step < train.steps:
        progress.say(f"asked to stop: step {step} is saved; the same command goes on from there")
        return False
    stored = count.parameters(jax.eval_shape(lambda params: pruned(model, params, config, step)[1], like.params))
    card.write(workdir, config, tokens.summary, stored, count.generated_weights(model.shape))
    progress.say(f"done: {train.steps} steps in {duration(clock.seconds())} of training; see {workdir / 'card.md'}")
    return True


def costs(model: LanguageModel, like: Any, batch: Any, compiled: Any) -> str:
    """What the run costs, in one line: counted parameters and FLOPs, and the compiled step's memory."""
    stored = count.parameters(like.params)
    inputs = jax.ShapeDtypeStruct((batch.shape[0], batch.shape[1] - 1), batch.dtype)
    # A step's FLOPs by the usual convention: the backward pass is twice the forward; recomputation is not counted.
    flops = 3 * count.forward_flops(model.apply, like.params, inputs)
    return (
        f"model: {stored.total:,} parameters, {stored.matrices:,} in matrices, {stored.embeddings:,} in embeddings; "
        f"{count.generated_weights(model.shape):,} weights generated per forward; {flops / 1e9:.2f} GFLOPs per step; "
        f"{count.peak_memory(compiled) / 2**20:.0f} MiB peak per device"
    )


def devices(mesh: Mesh) -> str:
    """For instance "8 x cpu (data 4, group 2)"."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {jax.devices()[0].device_kind}" + (f" ({axes})" if axes else "")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {module.__name__: module.__version__ for module in (ngc_jax, jax, flax, optax)}
