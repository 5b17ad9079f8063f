"""A trained model, opened from its work directory: text in, text out.

For: `load`, and what a `Trained` can be asked. Not for: the loop, or what commands print.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ngc_jax import config as configs
from ngc_jax.analysis import probes
from ngc_jax.data.batches import Batch, Windows, filled, held_out_batches, segments_of
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.settings import withhold
from ngc_jax.data.tasks import boundary
from ngc_jax.data.tokenizer import Symbols, Tokenizer, given_in, load_tokenizer
from ngc_jax.data.tokens import Data, load_data
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel, Params
from ngc_jax.runtime import checkpoint, files, metrics, output
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.output import doing
from ngc_jax.training import loop, rewiring
from ngc_jax.training.evaluation import at_rounds
from ngc_jax.training.rounds import Apply, mark_of
from ngc_jax.training.step import abstract_state, evaluated, nats_of, predict
from ngc_jax.training.workdir import comparable, hold, read_config
from ngc_jax.training.writer import Writer, sampled

Array = jax.Array
LEAN = "optimizer"  # what is left out of a state: twice what its parameters are
Text = str | bytes | Sequence[int] | np.ndarray | Array


class Loss(NamedTuple):
    """The mean loss of a text."""

    nats_per_token: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after `step` updates, with what it takes and the state of the run it is from.

    A text is read as a document that begins with it, so its first token is a document's mark.
    Tokens, [T] or [B, T], are read as they are. Axes: B sequences, T tokens, D width, V vocabulary.
    """

    workdir: files.Path
    config: ConfigDict
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    step: int
    meta: dict[str, Any]
    withheld: str = ""  # why its text may not be read; "": it may

    @functools.cached_property
    def state(self) -> Any:
        """The run's `TrainState`, read when it is asked for: the optimizer's is twice the model."""
        config = read_config(self.workdir)
        return _restored(self.workdir, config, self.tokenizer.vocab, self.step, without="").state

    @property
    def told(self) -> str:
        """Which parameters these are, in words: "step 20, the least held-out loss"."""
        best = self.config.checkpoint.best and metrics.best_first(metrics.read_rows(self.workdir))
        told = ", the least held-out loss" * (bool(best) and best[0] == self.step)
        ema = self.config.train.ema
        return f"step {self.step}{told}" + (f", averaged (train.ema={ema})" if ema else "")

    @property
    def decoder(self) -> Decoder:
        """The model, where its stages are needed. Raises UserError for a model without stages."""
        if not isinstance(self.model, Decoder):
            raise UserError(f"model.kind={self.config.model.kind!r} has no stages; 'decoder' has")
        return self.model

    def needs_text(self, what: str) -> None:
        """Raises UserError for a model of images, of which this cannot be asked."""
        if self.config.data.kind != "text":
            told = f"--workdir={self.workdir} holds a model of images: {what} is for models of text"
            raise UserError(f"{told}; ask ngc predict, evaluate or stability")

    def data(self) -> Data:
        """The data trained on and held out. Raises UserError: changed since, or `withheld`."""
        if self.withheld:
            raise UserError(f"--workdir={self.workdir}: {self.withheld}")
        own, config = self.tokenizer, self.config
        # Of a run that begins with another, or has a teacher, it may be theirs.
        others = config.train.init_from or config.train.teacher
        given = own if others and isinstance(own, BPE) else given_in(self.workdir, config)
        with doing("preparing the text or the problems"):
            data = load_data(config.data, mark_of(config), given)
        trained_on = self.meta["data"]
        if trained_on not in ("", data.fingerprint):  # "": a pretrained model, on what is not known
            raise UserError(
                f"this is not what {self.workdir} was trained on (another Python or ngc_jax, or a "
                f"changed data.path): fingerprint {data.fingerprint[:16]}, was {trained_on[:16]}"
            )
        return data

    def generate(self, prompt: str | bytes = "", **how: Any) -> str:
        """The text that follows a prompt, without it, as `stream` writes it."""
        return "".join(self.stream(prompt, **how))

    def stream(
        self,
        prompt: str | bytes = "",
        *,
        tokens: int = 200,
        seed: int = 0,
        rounds: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """The text that follows a prompt, `tokens` tokens long, in pieces as they are made.

        It ends before one of the strings `stop`. `rounds`: of the loop; None: `model.rounds`.
        `sampling`: fields of `nn.sampling.Sampling`. Raises UserError for a value out of range, and
        for the model of a task, which reads no text.
        """
        drawn = sampled(tokens=tokens, seed=seed, stop=stop, **sampling)
        start, writer = self.encode(prompt), Writer(self, rounds)
        writer.read(start, tokens)
        return writer.write(tokens, drawn, seed, stop)

    def logits(self, text: Text) -> Array:
        """Logits [T, V], or [B, T, V], in float32; those at t predict token t + 1."""
        found: Array = self._ask(partial(_logits, self.apply, self.params), text)
        return found

    def loss(self, text: str | bytes) -> Loss:
        """The loss of a text, in windows like the run's. Raises UserError for an empty one."""
        tokens, context = self.encode(text), self.config.data.context
        if len(tokens) < 2:
            raise UserError(f"text={text!r}: must have a token or more")
        windows = filled(Windows(tokens, context, self.tokenizer.mark, self.boundary))
        size, found = min(len(windows), self.config.eval.batch_size), []
        for batch, real in held_out_batches(windows, batch_size=size):
            dtype = self.config.train.compute_dtype
            logits = _logits(self.apply, self.params, batch, dtype)
            nats, counts = jax.device_get(nats_of(logits, batch.targets))
            counts = counts & real[:, None]
            length = np.asarray(self.tokenizer.lengths)[batch.targets[counts]]  # bytes
            found.append(np.stack([nats[counts].astype(np.float64), length]))
        nats, length = np.concatenate(found, axis=1)
        of_bytes = np.sum(nats) / (np.sum(length) or math.nan) / math.log(2)
        return Loss(float(np.mean(nats)), float(of_bytes))

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities [B, V] of the classes `tokenizer.symbols` of images, uint8 [B, S, S, C]."""
        batch = Batch(self.tokenizer.normalise(pixels))  # type: ignore[union-attr]
        logits = _logits(self.apply, self.params, batch, self.config.train.compute_dtype)
        return np.asarray(jax.nn.softmax(logits[:, 0]))

    def activations(self, text: Text) -> dict[str, Array]:
        """The stream [T, D], or [B, T, D], after the embedding, each stage and round, by name."""
        found: dict[str, Array] = self._ask(partial(_activations, self.decoder, self.params), text)
        return found

    def silence(
        self, groups: Collection[int] = (), channels: Collection[tuple[int, int]] = ()
    ) -> "Trained":
        """The same run in which `groups`, and `channels` (listener, speaker), send nothing.

        UserError for a model without stages, ValueError for what cannot be silenced.
        """
        params = probes.silenced_channels(self.decoder, self.params, groups, channels)
        return dataclasses.replace(self, params=params)

    @property
    def apply(self) -> Apply:
        """The forward pass of evaluation, (params, batch) -> logits and more."""
        return at_rounds(self.model, self.config, None)[1] or self.model.apply

    @property
    def boundary(self) -> int | None:
        """The token across which attention does not look, as in training."""
        mark, data = mark_of(self.config), self.config.data
        ends = self.tokenizer.mark if data.isolate_documents else boundary(data.task)
        return ends if mark is None else mark

    def _ask(self, program: Callable[[Batch], Any], text: Text) -> Any:
        """program(batch): its results [B, ...], without the axis B unless the tokens have it."""
        given = self.encode(text) if isinstance(text, str | bytes) else np.asarray(text, np.int32)
        tokens = np.atleast_2d(given)
        found = program(Batch(tokens, segments=segments_of(tokens, self.boundary)))
        return found if given.ndim == 2 else jax.tree.map(lambda a: a[0], found)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The tokens of a document that begins with this text, its mark included: [T] int32."""
        self.needs_text("encode")
        if isinstance(self.tokenizer, Symbols):
            task = self.config.data.task
            raise UserError(f"a model of data.task={task!r} reads no text: ask ngc_jax.solve")
        try:
            raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
            return np.array([max(self.tokenizer.mark, 0), *self.tokenizer.encode(raw)], np.int32)
        except UnicodeError as error:
            kind = f"data.tokenizer={self.config.data.tokenizer!r}"
            raise UserError(f"text={text!r:.80}: must be UTF-8, as {kind} wants it") from error


def train(config: ConfigDict | str, workdir: str | os.PathLike[str]) -> Trained:
    """Trains, or continues a run that was stopped, and opens it when it is done.

    config: also the path of a file, or a name in `configs/`. Raises KeyboardInterrupt where asked
    to stop (Ctrl-C, SIGTERM), once saved; UserError for what the user can mend; and Diverged.
    """
    home = files.place(workdir)
    with output.tolerated(), hold(home), jax.enable_x64(False):
        config = configs.named(config) if isinstance(config, str) else config
        if not loop.run(config.copy_and_resolve_references(), home):
            raise KeyboardInterrupt(f"asked to stop: {home} is saved, and the same call continues")
    return load(home, trust=True)  # its config was typed


def load(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    *,
    data_path: str = "",
    validation_path: str = "",
    tfds_dir: str = "",
    trust: bool = False,
    mesh: Mesh | None = None,
) -> Trained:
    """Opens the newest sound checkpoint, or that of `step`. Changes nothing. Raises UserError.

    Under `checkpoint.best` that of the least held-out loss comes first. The parameters, under
    `train.ema` their average, are put on a device, or on a mesh, whose devices read their parts.
    Its text, for `Trained.data`, is at `data_path`, and at `validation_path` where the run has one,
    or a TFDS set in `tfds_dir`. The places that the directory itself names are read, and written,
    only with `trust` (docs/trust.md).
    """
    home = files.place(workdir)
    config = read_config(home)
    stored, tokenizer = config.copy_and_resolve_references(), load_tokenizer(home, config.data)
    withheld = withhold(config.data, data_path, tfds_dir, trust, validation_path)
    with doing(f"opening {home}"):
        read = _restored(home, stored, tokenizer.vocab, step, mesh)
    model = configs.make_model(config, tokenizer.vocab)
    model, params = rewiring.pruned(model, evaluated(read.state), config, read.step)
    return Trained(home, config, model, params, tokenizer, read.step, read.meta, withheld)


def _restored(
    workdir: files.Path, config: Any, vocab: int, step: Any, mesh: Any = None, without: str = LEAN
) -> checkpoint.Restored:
    """The newest sound checkpoint, or that of `step`. Raises UserError."""
    model, run = configs.make_model(config, vocab), comparable(config)
    kept = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True, without=without)
    with jax.enable_x64(False), kept as checkpoints:  # whatever the caller's arrays have
        abstract = abstract_state(model, config.train, mesh or meshes.single_device())
        steps = checkpoints.steps()
        if not steps or step not in (None, *steps):
            missing = "no checkpoint" if step is None else f"no checkpoint {step}"
            raise UserError(f"--workdir={workdir} holds {missing}; there are: {steps or 'none'}")
        chosen = _best(workdir, config, steps) if step is None else [step]
        try:
            read, faults = checkpoints.newest(abstract, run, chosen)
            if read is None and chosen != steps and step is None:
                read, others = checkpoints.newest(abstract, run)
                faults |= others
        except UserError as error:
            raise UserError(f"--workdir={workdir}: {error}") from error
        if read is None:
            found = "; ".join(f"checkpoint {bad}: {fault}" for bad, fault in faults.items())
            raise UserError(f"--workdir={workdir} holds no sound checkpoint: {found}")
        for bad, fault in faults.items():
            print(f"checkpoint {bad} is skipped: {fault}", file=sys.stderr)
    return read


def _best(workdir: files.Path, config: Any, steps: list[int]) -> list[int]:
    """Of these, the step of the least held-out loss, where `checkpoint.best` asks for it."""
    best = metrics.best_first(metrics.read_rows(workdir)) if config.checkpoint.best else []
    return [step for step in best if step in steps][:1] or steps


_activations = jax.jit(probes.activations, static_argnums=0)


@partial(jax.jit, static_argnames=("apply", "dtype"))
def _logits(apply: Apply, params: Params, batch: Batch, dtype: str = "float32") -> Array:
    return predict(apply, params, batch, jnp.dtype(dtype))[0]
