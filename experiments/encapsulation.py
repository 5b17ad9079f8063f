"""What do gates over groups change? The questions of structured neuron encapsulation, in one command:

    python -m experiments.encapsulation --steps=600 --workdir=runs/encapsulation --jobs=1

For: a dense model and NGC, each with gates and without, three seeds each, on two texts. On the default text: held-out
loss, how varied and how repetitive sampled text is, how differently successive stages look back. On sums of digits
modulo five: how often a sum is answered alike in another order of its terms. And what gates add to the time and memory
of an update. Killed, it goes on where it was. Writes results.md beside the runs. Not for: tuning; learning rates are
those of earlier studies, the same with gates and without.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.overhead import overhead
from experiments.runs import flags, options, train
from experiments.stats import interval
from experiments.sums import reordered, sums
from experiments.text_measures import agreement, attention_divergence, distinct, repetition, type_token_ratio, words
from ngc_jax import budget
from ngc_jax.config import base
from ngc_jax.data.batches import Windows
from ngc_jax.data.tokens import Bytes, load_data
from ngc_jax.sample import generate
from ngc_jax.stability import attention_shares
from ngc_jax.workdir import Trained, open_trained

SEEDS = (0, 1, 2)
COMMON = {"data.context": 64, "model.width": 64, "model.hidden": 192, "stability.every": 0}
DENSE = {"model.rule": "dense", "model.prelude": 4, "model.core": 0, "model.coda": 0}
RATES = {"train.learning_rate": 3e-3, "train.state_learning_rate": 3e-3}
GATED = {"model.gates": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, **RATES},
    "dense with gates": {**DENSE, **RATES, **GATED},
    "NGC": {},
    "NGC with gates": GATED,
}
PAIRS = (("dense", "dense with gates"), ("NGC", "NGC with gates"))
TEXTS, PROMPT, LENGTH = 128, 32, 256  # continuations of held-out text, and their bytes
WORDS = 40  # of each that are compared: as many for all, since what is counted depends on length
TERMS, ASKED = (1, 2, 3, 4), (4, 5)  # of the sums that are learned, and of those that are asked for
Found = dict[str, list[float]]  # a measure's value for each seed


def lexical(texts: Sequence[bytes]) -> dict[str, float]:
    """How varied texts are, by their first words; a text without any, blank lines of code, says nothing."""
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
    return chosen[:, :PROMPT], [trained.tokenizer.decode(row) for row in chosen[:, PROMPT:].tolist()]


def spoken(trained: Trained) -> dict[str, float]:
    """What a model's text is like, sampled as `python -m ngc_jax.sample` does; and its attention, on the prompts."""
    prompts, _ = passages(trained)
    key, temperature, top_p = jax.random.key(0), jnp.float32(0.8), jnp.float32(0.95)
    said = generate(trained.model, trained.state.params, jnp.asarray(prompts), LENGTH, key, temperature, top_p)
    look = jax.jit(attention_shares, static_argnums=0)(trained.decoder, trained.state.params, jnp.asarray(prompts))
    return {
        **lexical([trained.tokenizer.decode(row) for row in said.tolist()]),
        "divergence of attention": attention_divergence([np.asarray(shares) for shares in look.values()]),
    }


def answered(trained: Trained) -> dict[str, float]:
    """Of held-out sums: how many answers are right, and how often those of one sum in two orders agree."""
    answer = jax.jit(lambda params, prompts: jnp.argmax(trained.model.apply(params, prompts)[0][:, -1], axis=-1))
    found: dict[str, float] = {}
    for terms in ASKED:
        sets = reordered(sums(6000, (terms,), seed=1, held_out=True))
        lines = [line for same in sets for line in same]
        prompts = [Bytes().encode(f"\n{line[:-1]}".encode()) for line in lines]
        given = np.asarray(answer(trained.state.params, np.array(prompts, np.int32)))
        right = given == np.array([ord(line[-1]) for line in lines])
        by_set = np.split(given, np.cumsum([len(same) for same in sets])[:-1])
        found |= {f"right, {terms} terms": float(right.mean()), f"alike, {terms} terms": agreement(by_set)}
    return found


def table(found: dict[str, Found]) -> list[str]:
    """Markdown: each model's measures, and beneath each pair what gates changed, paired by seed."""
    names = list(next(iter(found.values())))
    lines = ["| model | " + " | ".join(names) + " |", "| --- " * (1 + len(names)) + "|"]
    for plain, gated in PAIRS:
        for model in (plain, gated):
            lines.append(f"| {model} | " + " | ".join(interval(found[model][name]) for name in names) + " |")
        changes = [np.subtract(found[gated][name], found[plain][name]).tolist() for name in names]
        lines.append("| *change by gates* | " + " | ".join(map(interval, changes)) + " |")
    return lines


def costs(fields: dict[str, Any]) -> list[str]:
    """Markdown: what gates add to parameters, and to the time and memory of an update."""
    lines = ["| model | parameters in matrices | time of an update | peak memory |", "| --- | --- | --- | --- |"]
    for pair in PAIRS:
        plain, gated = base(), base()
        for config, model in zip((plain, gated), pair, strict=True):
            config.update_from_flattened_dict({**fields, **MODELS[model]})
        (more,) = overhead(plain, [gated])
        lines += [
            f"| {pair[0]} | {budget.cost(plain):,} | 1 | 1 |",
            f"| {pair[1]} | {budget.cost(gated):,} | {more.time:.2f} | {more.memory:.2f} |",
        ]
    return lines


def main() -> None:
    parser = options(__doc__, "runs/encapsulation")
    parser.add_argument("--steps", type=int, default=600, help="updates of each run, of 16 windows of 64 bytes")
    args = parser.parse_args()
    home, steps = args.workdir.absolute(), args.steps
    home.mkdir(parents=True, exist_ok=True)
    task = home / "sums.txt"
    task.write_text("\n".join(sums(300_000, TERMS, seed=0, held_out=False)) + "\n")
    sources: dict[str, dict[str, Any]] = {"text": {}, "sums": {"data.path": task}}
    fields = {**COMMON, "train.steps": steps, "train.warmup_steps": steps // 10}
    rare = {"eval.every": steps, "checkpoint.every_steps": steps}

    def name(source: str, model: str, seed: int) -> str:
        return f"{source}-{model.replace(' ', '-')}-seed{seed}"

    def run(source: str, model: str, seed: int) -> list[str]:
        return flags("configs/ngc_small.py", {"seed": seed, **fields, **rare, **sources[source], **MODELS[model]})

    which = list(itertools.product(sources, MODELS, SEEDS))
    losses = train(home, {name(*one): run(*one) for one in which}, args.jobs)

    def over_seeds(source: str, model: str, measure: Callable[[Trained], dict[str, float]]) -> Found:
        names = [name(source, model, seed) for seed in SEEDS]
        rows = [{"loss": losses[of], **measure(open_trained(home / of))} for of in names]
        return {what: [row[what] for row in rows] for what in rows[0]}

    said, learned = (
        {model: over_seeds(source, model, measure) for model in MODELS}
        for source, measure in (("text", spoken), ("sums", answered))
    )
    real = lexical(passages(open_trained(home / name(*which[0])))[1])
    lines = [
        f"Made by `python -m experiments.encapsulation --steps={steps}`; means and 95% intervals over seeds 0, 1, 2.",
        "",
        *table(said),
        "| *the text itself* | | " + " | ".join(f"{value:.3f}" for value in real.values()) + " | |",
        "",
        "Sums of digits modulo five, held out, asked in two or more orders of their terms:",
        "",
        *table(learned),
        "",
        "Of an update, as multiples of that without gates:",
        "",
        *costs(fields),
    ]
    (home / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
