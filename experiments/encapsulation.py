"""What do gates over groups change?

The questions of structured neuron encapsulation: a dense model and NGC, each with gates and
without, on two texts. On the library's source: held-out loss, how varied and how repetitive sampled
text is, how differently successive stages look back. On sums of digits modulo five: how often a sum
is answered alike in another order of its terms. And what gates add to the time and memory of an
update, as multiples. Learning rates are those of earlier studies, the same with gates and without.

    python -m experiments.run encapsulation
"""

import pathlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.blocks import Block, Words
from experiments.overhead import Overhead, overhead
from experiments.setting import DENSE, LARGER
from experiments.study import Results, Study
from experiments.sums import keep, reordered, sums
from experiments.sweeps import cases, seeds
from experiments.text_measures import (
    agreement,
    attention_divergence,
    distinct,
    repetition,
    type_token_ratio,
    words,
)
from ngc_jax.analysis import attention_weights_by_stage
from ngc_jax.data.batches import Batch, Windows
from ngc_jax.data.tokens import Bytes, load_data
from ngc_jax.nn.generate import generate
from ngc_jax.training.load import Trained, load

STEPS = 600
COMMON = {
    "data.context": 64,
    "model.width": 64,
    "model.hidden": 192,
    "stability.every": 0,
    "train.steps": STEPS,
    "train.warmup_steps": STEPS // 10,
    "eval.every": STEPS,
    "checkpoint.every_steps": STEPS,
}
TEXTS, PROMPT, LENGTH = 128, 32, 256  # continuations of held-out text, and their bytes
WORDS = 40  # of each that are compared: as many for all, since what is counted depends on length
TERMS, ASKED = (1, 2, 3, 4), (4, 5)  # of the sums that are learned, and of those that are asked for


def lexical(texts: Sequence[bytes]) -> dict[str, float]:
    """How varied texts are, by their first words; a text without any, blank lines of code, says
    nothing.
    """
    found = [words(text.decode(errors="replace"))[:WORDS] for text in texts]
    return {
        "distinct-1": distinct(found, 1),
        "distinct-2": distinct(found, 2),
        "type-token ratio": float(np.nanmean([type_token_ratio(text) for text in found])),
        "repeated 3-grams": float(np.nanmean([repetition(text, 3) for text in found])),
    }


def passages(trained: Trained) -> tuple[np.ndarray, list[bytes]]:
    """Held-out prompts [TEXTS, PROMPT], evenly spaced, and how the text itself goes on."""
    windows = load_data(trained.config.data).validation
    assert isinstance(windows, Windows)
    text = windows.tokens
    starts = np.linspace(0, len(text) - PROMPT - LENGTH, TEXTS).astype(int)
    chosen = np.stack([text[at : at + PROMPT + LENGTH] for at in starts]).astype(np.int32)
    return chosen[:, :PROMPT], [
        trained.tokenizer.decode(row) for row in chosen[:, PROMPT:].tolist()
    ]


def spoken(trained: Trained) -> dict[str, float]:
    """What a model's text is like, sampled as `python -m ngc_jax.sample` does; and its attention,
    on the prompts.
    """
    prompts, _ = passages(trained)
    key, temperature, top_p = jax.random.key(0), jnp.float32(0.8), jnp.float32(0.95)
    said = generate(
        trained.model, trained.state.params, jnp.asarray(prompts), LENGTH, key, temperature, top_p
    )
    look = jax.jit(attention_weights_by_stage, static_argnums=0)(
        trained.decoder, trained.state.params, Batch(jnp.asarray(prompts))
    )
    return {
        **lexical([trained.tokenizer.decode(row) for row in said.tolist()]),
        "divergence of attention": attention_divergence(
            [np.asarray(shares) for shares in look.values()]
        ),
    }


def answered(trained: Trained) -> dict[str, float]:
    """Of held-out sums: how many answers are right, and how often those of one sum in two orders
    agree.
    """
    answer = jax.jit(
        lambda params, prompts: jnp.argmax(
            trained.model.apply(params, Batch(prompts))[0][:, -1], axis=-1
        )
    )
    found: dict[str, float] = {}
    for terms in ASKED:
        sets = reordered(sums(6000, (terms,), seed=1, held_out=True))
        lines = [line for same in sets for line in same]
        prompts = [Bytes().encode(f"\n{line[:-1]}".encode()) for line in lines]
        given = np.asarray(answer(trained.state.params, np.array(prompts, np.int32)))
        right = given == np.array([ord(line[-1]) for line in lines])
        by_set = np.split(given, np.cumsum([len(same) for same in sets])[:-1])
        found |= {
            f"right, {terms} terms": float(right.mean()),
            f"alike, {terms} terms": agreement(by_set),
        }
    return found


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """What the text that a run was trained on lets one ask."""
    trained = load(workdir)
    return answered(trained) if trained.config.data.path else spoken(trained)


def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
    """What an update costs against that of the same model without gates."""
    found = []
    for config in configs:
        plain = config.copy_and_resolve_references()
        plain.model.gates = False
        (more,) = overhead(plain, [config]) if config.model.gates else [Overhead(1.0, 1.0, 0)]
        found.append({"time of an update": f"{more.time:.2f}", "peak memory": f"{more.memory:.2f}"})
    return found


def answer(results: Results) -> list[Block]:
    """How varied the held-out text itself is."""
    trained = next(iter(results.workdirs(results.groups[0]).values()), None)
    if trained is None:
        return []
    real = lexical(passages(load(trained))[1])
    return [
        Words(
            "The held-out text itself: "
            + ", ".join(f"{what} {value:.3f}" for what, value in real.items())
        )
    ]


STUDY = Study(
    sweep=cases("text", {"library": {}, "sums": {"data.path": "{DIR}/sums.txt"}})
    * cases("model", {"dense": {**DENSE, "rate": 3e-3}, "NGC": {}})
    * cases("gates", {"without gates": {}, "with gates": {"model.gates": True}})
    * seeds(3),
    common=COMMON,
    larger=LARGER,
    prepare=partial(keep, terms=TERMS),
    measure=measure,
    baseline={"gates": "without gates"},
    costs=costs,
    answer=answer,
)
