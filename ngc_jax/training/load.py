"""A trained model, opened from its work directory: text in, text out.

For: `load`, and what a `Trained` can be asked. Not for: training (`loop.py`), or what commands
print (`commands/`).
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ngc_jax.config import make_model
from ngc_jax.data.tokens import Data, Symbols, Tokenizer, load_data, load_tokenizer
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.generate import generate
from ngc_jax.nn.model import LanguageModel, Params
from ngc_jax.runtime.checkpoint import Checkpoints
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path
from ngc_jax.training.evaluation import at_rounds
from ngc_jax.training.rewiring import pruned
from ngc_jax.training.rounds import mark_of
from ngc_jax.training.step import TrainState, abstract_state
from ngc_jax.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after `step` updates, with what it takes and the state of the run it is from."""

    workdir: Path
    config: ConfigDict
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    step: int
    state: TrainState
    meta: dict[str, Any]

    @property
    def decoder(self) -> Decoder:
        """The model, where its stages are needed. Raises UserError for a model without stages."""
        if not isinstance(self.model, Decoder):
            raise UserError(
                f"model.kind={self.config.model.kind!r} has no stages to measure; 'decoder' has"
            )
        return self.model

    def data(self) -> Data:
        """What the run was trained on, and what was held out.

        Raises UserError where this is something else by now.
        """
        data = load_data(self.config.data, mark_of(self.config))
        if self.meta["data"] != data.fingerprint:
            raise UserError(
                f"this is not what {self.workdir} was trained on: fingerprint "
                f"{data.fingerprint[:16]}, trained on {self.meta['data'][:16]} (another Python "
                "version, or changed files at data.path, or another ngc_jax)"
            )
        return data

    def generate(
        self,
        prompt: str | bytes = "",
        *,
        tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        rounds: int | None = None,
    ) -> str:
        """The text that follows a prompt, `tokens` tokens long, without the prompt.

        `temperature` >= 0 divides the logits, and 0 takes the likeliest token. `top_p`, in (0, 1],
        keeps the likeliest tokens of so much probability together. `rounds` are those of the loop,
        by default `model.rounds`. Raises UserError for a value out of range, and for the model of a
        task, which reads no text.
        """
        for name, value, holds, wants in (
            ("tokens", tokens, tokens >= 1, "1 or more"),
            ("temperature", temperature, temperature >= 0, "0 or more, for instance 0.8"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1, for instance 0.95"),
            ("seed", seed, 0 <= seed < 2**32, "from 0 to 4,294,967,295"),
        ):
            if not holds:
                raise UserError(f"{name}={value}: must be {wants}")
        model = self.model if rounds is None else at_rounds(self.model, self.config, rounds)[0]
        made = generate(
            model,
            self.params,
            jnp.asarray(self._encode(prompt)[None]),
            tokens,
            jax.random.key(seed),
            jnp.float32(temperature),
            jnp.float32(top_p),
        )
        return self.tokenizer.decode(made[0].tolist()).decode(errors="replace")

    def _encode(self, text: str | bytes) -> np.ndarray:
        """The tokens of a document that begins with this text, its mark included: [T] int32."""
        if isinstance(self.tokenizer, Symbols):
            raise UserError(
                f"{self.workdir} holds a model of data.task={self.config.data.task!r}, which reads "
                "symbols and no text: ask ngc_jax.solve"
            )
        raw = text.encode() if isinstance(text, str) else text
        return np.array([self.tokenizer.mark, *self.tokenizer.encode(raw)], np.int32)


def load(workdir: Path, step: int | None = None) -> Trained:
    """Opens the newest sound checkpoint, or that of `step`. Changes nothing. Raises UserError."""
    config = read_config(workdir)
    tokenizer = load_tokenizer(workdir)
    model = make_model(config, tokenizer.vocab)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        wanted, faults = (step, {}) if step is not None else checkpoints.newest_sound()
        for bad, damage in faults.items():
            print(f"checkpoint {bad} is passed over: {damage}", file=sys.stderr)
        steps = checkpoints.steps()
        if wanted is None or wanted not in steps:
            named = "no sound checkpoint" if wanted is None else f"no checkpoint {wanted}"
            raise UserError(f"--workdir={workdir} holds {named}; there are: {steps or 'none'}")
        fault = checkpoints.fault(wanted)
        if fault is not None:
            raise UserError(f"checkpoint {wanted} in {workdir} is not sound: {fault}")
        read = checkpoints.restore(wanted, jax.tree.map(_here, abstract_state(model, config.train)))
    finally:
        checkpoints.close()
    model, params = pruned(model, read.state.params, config, wanted)
    return Trained(workdir, config, model, params, tokenizer, wanted, read.state, read.meta)


def _here(leaf: Any) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
