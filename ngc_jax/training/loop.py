"""The training loop: `run(config, workdir)`, read from top to bottom as things happen.

For: the order of things. Not for: an update (`step.py`), or what is between two (`run.py`).
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import make_model
from ngc_jax.data.batches import batch_like
from ngc_jax.data.tokenizer import Symbols
from ngc_jax.data.tokens import Data, load_data
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.runtime import files, metrics, multihost, profiler, trackers
from ngc_jax.runtime.metrics import amount
from ngc_jax.runtime.output import now
from ngc_jax.training import begin, card, match_size, rewiring
from ngc_jax.training.evaluation import compile_eval, compile_watch
from ngc_jax.training.rounds import make_iteration, mark_of, marked
from ngc_jax.training.run import Programs, Run
from ngc_jax.training.stability_metrics import make_penalty
from ngc_jax.training.step import SELDOM, abstract_state, init_state, make_train_step
from ngc_jax.training.workdir import claim, versions, write_config

if TYPE_CHECKING:
    from ngc_jax.training.load import Trained


def run(config: ConfigDict, workdir: files.Path) -> bool:
    """Trains from scratch, or continues from the newest sound checkpoint in `workdir`.

    Returns True where it is done, False where it was asked to stop. Raises UserError for what the
    user can mend, before anything is written, and Diverged.
    """
    # ---- What is asked for -----------------------------------------------------------------------
    with multihost.agreed():
        now("checking the config" if not config.model.match else "matching sizes")
        match_size.prepare(config)
        now("preparing the text or the problems")
        mesh = meshes.make_mesh(config.mesh)
        begun, teacher = (begin.opened(config, field, mesh) for field in ("init_from", "teacher"))
        tokenizer = begin.tokenizer_of(config, begun or teacher, workdir)
        data = load_data(config.data, mark_of(config), tokenizer)
    told = config.to_json(sort_keys=True)
    multihost.same(config=told, text=data.fingerprint, software=str(versions()))
    model = make_model(config, data.tokenizer.vocab)
    begins = ""
    if begun:
        begun, begins = begin.fitted(begun, model, data.tokenizer, config, mesh)
    if teacher:
        begin.check_teacher(teacher, data.tokenizer, config, begun)
    trackers.listed(config.train.trackers)
    if config.eval.sample and not isinstance(data.tokenizer, Symbols):
        data.tokenizer.encode(config.eval.prompt.encode())  # or it raises UserError
    profile = profiler.Profile(config.train.profile, workdir / "profile")
    claim(workdir, config, data.tokenizer, data.fingerprint)
    print(f"data: {data.summary}")

    # ---- Compile, before anything is allocated; then begin at the newest sound checkpoint --------
    programs = compile_programs(model, config, mesh, data, begun, teacher)
    del begun, teacher  # the programs hold what they need of them
    now("opening the newest checkpoint, or beginning")
    this = Run(config, workdir, data, mesh, programs)
    if begins and not this.step:
        print(begins)
    if multihost.first():
        write_config(workdir, config)
    changes = rewiring.changes(config) if programs.rewire else None

    # ---- Train -----------------------------------------------------------------------------------
    now("training")
    with this.checkpoints, this.asked_to_stop, this.watchdog, profile:
        this.clock.lap(this.step)
        while True:
            # What comes after update `this.step`, also after that which this start continues from.
            profile.turn(this.step, this.state)
            stop, save = this.wishes() if jax.process_count() == 1 else this.votes
            save = save or this.last or this.step % config.checkpoint.every_steps == 0
            if this.due() or save or stop:
                this.log()
            if this.broken >= config.train.max_bad_steps:
                this.rewind()
                continue
            measured = this.measure()
            # Not asked anew: a step whose row is not written is not saved.
            ending = this.last or stop or not measured
            # While updates are skipped nothing is saved: the checkpoints stay those from before.
            wanted = (save or this.improved) and not this.broken
            if this.step > this.saved and (ending or wanted):
                this.save(ending)
            if ending:
                break

            batch = meshes.put_batch(mesh, next(this.batches))
            ballots = multihost.ballots(mesh, *this.wishes())
            with jax.transfer_guard("disallow"):
                this.state, outputs = programs.update(this.state, batch, ballots)
            this.log()  # of the update before, while this one runs
            this.advance(outputs)
            if programs.rewire and changes and changes.due(this.step):
                this.log()
                this.state, row = programs.rewire(this.state, batch, this.step)
                this.metrics.write({"step": this.step, **row})
            with this.saving():
                this.checkpoints.check()

    # ---- End -------------------------------------------------------------------------------------
    now("ending")
    this.metrics.close()
    if not this.last or not measured:
        kept = f"step {this.step} is saved" if this.step else "before the first update"
        this.say(f"asked to stop: {kept}; the same command continues from there")
        return False
    if multihost.first():
        # Without the slots that a changing wiring has left empty.
        trim = lambda params: rewiring.pruned(model, params, config, this.step)[1]  # noqa: E731
        final = jax.eval_shape(trim, programs.state.params)
        stored = count.parameters(final, model.param_info())
        card.write(workdir, config, data.summary, stored, count.generated_weights(model))
    took = metrics.duration(this.clock.seconds())
    early = f"; train.patience={config.train.patience} is at its end" if this.early else ""
    done = f"done: {this.step} steps in {took} of training{early}"
    this.say(f"{done}; see {workdir / 'card.md'}")
    return True


def compile_programs(
    model: LanguageModel,
    config: ConfigDict,
    mesh: Mesh,
    data: Data,
    begun: "Trained | None" = None,
    teacher: "Trained | None" = None,
) -> Programs:
    """Compiles what a run computes, and prints what it costs; it allocates a teacher alone."""
    train = config.train
    state = abstract_state(model, train, mesh)
    batch = meshes.abstract_batch(mesh, batch_like(data.train, train.batch_size))
    penalty = watch = None
    if isinstance(model, Decoder):  # only a decoder has stages
        penalty = make_penalty(model, config.stability)
        watch = compile_watch(model, config, mesh, data) if config.stability.every else None
    iteration = make_iteration(model, config)
    taught = teacher.model if teacher else None
    step = make_train_step(model, train, penalty, iteration, config.seed, taught)
    known = () if teacher is None else (begin.put_params(mesh, teacher),)
    began, shardings = time.monotonic(), meshes.shardings(state)

    def voting(state: Any, batch: Any, ballots: Any, *known: Any) -> tuple[Any, Any]:
        after, scalars = step(state, batch, *known)
        return after, (scalars, multihost.tally(ballots))

    placed, program = (shardings, meshes.replicated(mesh)), meshes.with_mesh(mesh, voting)
    update = jax.jit(program, out_shardings=placed, donate_argnums=0)
    now("compiling the update")
    compiled = update.lower(state, batch, multihost.ballots(mesh, False, False), *known).compile()
    rewire = rewiring.compile_rewire(model, config, mesh, state, batch)
    evaluate = compile_eval(model, config, mesh, data, marked(model, config))
    draw = partial(init_state, model, train, config.seed)
    start = () if begun is None else (begin.put_params(mesh, begun),)
    given = {"donate_argnums": range(len(start)), "out_shardings": shardings}
    init = jax.jit(draw, compiler_options=SELDOM, **given)
    now("counting FLOPs")
    forward = count.forward_flops(model.apply, state.params, batch)  # the backward pass is twice it
    flops = iteration.flops(state.params, batch) if iteration else 3.0 * forward
    if taught:
        flops += count.forward_flops(taught.apply, *known, batch)
    stored, memory = count.parameters(state.params, model.param_info()), count.peak_memory(compiled)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    here = f"{mesh.size} x {jax.devices()[0].device_kind}" + (f" ({axes})" if axes else "")
    print(
        f"model: {stored.total:,} parameters, {stored.matrices:,} in matrices, "
        f"{stored.embeddings:,} in embeddings; {count.generated_weights(model):,} weights "
        f"generated per forward; {amount(flops, 'FLOPs')} per step; {amount(memory, 'B')} peak "
        f"per device; compiled in {time.monotonic() - began:.1f} s on {here}"
    )
    run = lambda *given: compiled(*given, *known)  # noqa: E731
    return Programs(partial(init, *start), run, rewire, evaluate, watch, state, flops)
