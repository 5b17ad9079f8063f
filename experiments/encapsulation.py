"""What do gates over groups change?

The questions of structured neuron encapsulation, for a dense model and NGC, each with and without
gates, on two texts. On the library's source: held-out loss, variety and repetition of sampled text,
divergence of attention between successive stages. On sums of digits modulo five: how often a sum
has the same answer when its terms change order. For both: time and memory of an update, relative to
the model without gates. Learning rates are those of earlier studies, equal with and without gates.

    python -m experiments.run encapsulation
"""

import pathlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

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
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.sampling import Sampling, generate
from ngc_jax.report.blocks import Block, paragraph
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
TEXTS, PROMPT, LENGTH = 128, 32, 256  # continuations of held-out text; bytes of each part
TIME, MEMORY = "update time (without gates = 1)", "peak memory (without gates = 1)"
WORDS = 40  # compared of each text, the same number for all: the measures depend on length
TERMS, ASKED = (1, 2, 3, 4), (4, 5)  # terms of the sums in training, in the test


def lexical(texts: Sequence[bytes]) -> dict[str, float]:
    """Variety of texts, by their first words; a text without words (blank lines) is left out."""
    found = [words(text.decode(errors="replace"))[:WORDS] for text in texts]
    return {
        "distinct-1": distinct(found, 1),
        "distinct-2": distinct(found, 2),
        "type-token ratio": float(np.nanmean([type_token_ratio(text) for text in found])),
        "repeated 3-grams": float(np.nanmean([repetition(text, 3) for text in found])),
    }


def passages(trained: Trained) -> tuple[np.ndarray, list[bytes]]:
    """Held-out prompts [TEXTS, PROMPT], evenly spaced, and the original continuations."""
    windows = trained.data().validation
    assert isinstance(windows, Windows)
    text = windows.tokens
    starts = np.linspace(0, len(text) - PROMPT - LENGTH, TEXTS).astype(int)
    chosen = np.stack([text[at : at + PROMPT + LENGTH] for at in starts]).astype(np.int32)
    return chosen[:, :PROMPT], [
        trained.tokenizer.decode(row) for row in chosen[:, PROMPT:].tolist()
    ]


def spoken(trained: Trained) -> dict[str, float]:
    """Measures of a model's text, sampled as by `python -m ngc_jax.sample`, and of its attention on
    the prompts.
    """
    prompts, _ = passages(trained)
    key = jax.random.key(0)
    said = generate(
        trained.model, trained.state.params, jnp.asarray(prompts), LENGTH, key, Sampling()
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
    """For held-out sums: the fraction of right answers, and the agreement between two orders of one
    sum.
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
    """The measures that belong to a run's text."""
    trained = load(workdir, trust=True)  # `run` has just trained it as the study says
    return answered(trained) if trained.config.data.path else spoken(trained)


def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
    """The cost of an update relative to the same model without gates."""
    found = []
    for config in configs:
        plain = config.copy_and_resolve_references()
        plain.model.gates = False
        (more,) = overhead(plain, [config]) if config.model.gates else [Overhead(1.0, 1.0, 0)]
        found.append({TIME: f"{more.time:.2f}", MEMORY: f"{more.memory:.2f}"})
    return found


def answer(results: Results) -> list[Block]:
    """Variety of the original text."""
    trained = next(iter(results.workdirs(results.groups[0]).values()), None)
    if trained is None:
        return []
    real = lexical(passages(load(trained))[1])
    said = "; ".join(f"{what}: {value:.3f}" for what, value in real.items())
    return [paragraph(f"The original held-out text. {said}.")]


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
    legend={
        "distinct-1": "different words as a fraction of all words, over all texts",
        "distinct-2": "different pairs of words as a fraction of all pairs",
        "type-token ratio": "different words of a text as a fraction of its words, mean over texts",
        "repeated 3-grams": "fraction of triples of words that occurred before in the text",
        "divergence of attention": "between successive stages, Jensen-Shannon, in bits",
        "right, 4 terms": "fraction of right answers for sums of 4 terms; 5 terms likewise",
        "alike, 4 terms": "fraction of pairs of orders with equal answers; 5 terms likewise",
        TIME: "measured on the same machine",
        MEMORY: "of the compiled update",
    },
    answer=answer,
)
