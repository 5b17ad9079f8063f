"""The page of the lens: what is said at each place, what groups are for, and what excites them.

For: its content, in order, of what was measured. Not for: measuring (`lens.py`, `excitation.py`),
or HTML (`report/`).
"""

import pathlib
from typing import NamedTuple

import numpy as np

from ngc_jax.analysis.excitation import BEFORE, CLASSES, Excitation
from ngc_jax.analysis.lens import Patched, Said, Unit
from ngc_jax.analysis.stability import interval
from ngc_jax.data.tokenizer import Tokenizer
from ngc_jax.report import page
from ngc_jax.report.blocks import Block, Shade, grid, heading, paragraph, table

SHOWN = 64  # tokens of the text whose readings are shown
TEXTS = 3  # of these for each unit


class Looked(NamedTuple):
    """What was measured of a model. Axes: B sequences, T tokens, U units."""

    said: dict[str, Said]  # by place, of the first sequences
    tuned: dict[str, Said]  # the same by the tuned lens
    tokens: np.ndarray  # [B, T] read there
    units: list[Unit]
    added: np.ndarray  # [U, B, T] nats that silence of a unit adds
    whole: np.ndarray  # [sites, B, T] and of all groups of a site, in the same order
    targets: np.ndarray  # [B, T] classes of what is to be said
    written: np.ndarray  # [U] mean share of the right token's logit, centred
    excited: Excitation


class Prompts(NamedTuple):
    """Two prompts [T] of as many tokens, and what the first restores in the second."""

    tokens: np.ndarray
    other: np.ndarray
    places: list[str]  # of `patched`
    patched: Patched


def write(
    out: pathlib.Path,
    looked: Looked,
    prompts: Prompts | None,
    tokenizer: Tokenizer,
    title: str,
    about: str,
) -> None:
    """Writes OUT/index.html. Raises OSError."""
    blocks = [paragraph(about), *_said(looked, tokenizer)]
    blocks += _patched(prompts, tokenizer) if prompts else []
    blocks += [*_for(looked), *_excited(looked, tokenizer)]
    page.write(out, "index", title, blocks, markdown=False)


def spelt(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Tokens as one line: an end of a line is ⏎, a token without text, as a document's mark, ▮."""
    each = (tokenizer.decode([int(token)]) or "▮".encode() for token in tokens)
    return b"".join(each).decode(errors="replace").replace("\n", "⏎").replace("\t", "⇥")


def _said(looked: Looked, tokenizer: Tokenizer) -> list[Block]:
    rows = []
    for place, said in looked.said.items():
        mean, low, high = interval(np.asarray(said.nats).mean(1))
        same = np.mean(np.asarray(said.top) == np.asarray([*looked.said.values()][-1].top))
        rows.append([place, f"{mean:.3f}", f"{low:.3f} to {high:.3f}"])
        far = (np.asarray(of[place].divergence).mean() for of in (looked.said, looked.tuned))
        rows[-1] += [*(f"{nats:.3f}" for nats in far), f"{100 * same:.0f}%"]
    head = ["place", "nats per token", "95% interval", "nats from the output", "tuned"]
    head += ["same token"]
    caption = (
        "What the model would say if it ended at each place: its stream there is read by the last "
        "norm and the matrix of logits. Nats per token: the loss of that. Nats from the output: "
        "the divergence KL of the model's own output from it; tuned: after an affine map of the "
        "stream that was learned on other text: what the place knows, in whatever basis. Same "
        "token: how often its likeliest token is that of the output."
    )
    read = looked.tokens[0][:SHOWN]
    columns = [spelt(tokenizer, token[None]) for token in read]
    shades = []
    for place, said in looked.said.items():
        top, share = np.asarray(said.top)[0], np.asarray(said.share)[0]
        nats = np.asarray(said.nats)[0]
        cells = [
            Shade(
                spelt(tokenizer, top[t : t + 1]),
                float(share[t]),
                f"{place}: after {columns[t]!r} says {spelt(tokenizer, top[t : t + 1])!r} "
                f"with {share[t]:.2f}; what came costs {nats[t]:.2f} nats",
            )
            for t in range(len(read))
        ]
        shades.append((place, cells))
    words = (
        "The first held-out tokens, one a column, and the likeliest next token at each place below "
        "it; the redder, the likelier. Hover over a cell for its numbers. "
        "⏎ is the end of a line, ▮ the beginning of a document."
    )
    return [
        heading("What is said at each place"),
        table(head, rows, caption),
        grid(["read", *columns], shades, words),
    ]


def _patched(prompts: Prompts, tokenizer: Tokenizer) -> list[Block]:
    patched = prompts.patched
    own, others = ([spelt(tokenizer, t[None]) for t in of] for of in prompts[:2])
    right, wrong = (spelt(tokenizer, np.asarray(t)[None]) for t in (patched.right, patched.wrong))
    columns = [a if a == b else f"{b}→{a}" for a, b in zip(own, others, strict=True)]
    rows = [
        (
            place,
            [
                Shade(f"{x:.2f}", x, f"{place}, token {t + 1} ({columns[t]}): {x:.3f} restored")
                for t, x in enumerate(map(float, row))
            ],
        )
        for place, row in zip(prompts.places, np.asarray(patched.restored), strict=True)
    ]
    caption = (
        f"After the first prompt the model says {right!r}, after the other one {wrong!r}. In a "
        "run on the other prompt the stream of one token, after one place, is replaced by that of "
        "the first prompt. A cell says how much of the difference of the two logits this restores: "
        "1 is all, 0 nothing. So one sees at which token and place the deciding fact stands."
    )
    return [heading("Where two prompts part"), grid(["patched", *columns], rows, caption)]


def _for(looked: Looked) -> list[Block]:
    mean, low, high = interval(looked.added.mean(2).T)
    most = max(1e-9, float(np.abs(mean).max()))
    groups = max(sum(1 for u in looked.units if u[:2] == one[:2]) for one in looked.units)
    silence, wrote = dict[str, list[Shade]](), dict[str, list[Shade]]()
    loudest = max(1e-9, float(np.abs(looked.written).max()))
    for i, unit in enumerate(looked.units):
        row, told = f"{unit.place}, {unit.site}", f"{unit}: "
        between = f"{mean[i]:+.4f} nats, {low[i]:+.4f} to {high[i]:+.4f}"
        shade = Shade(f"{mean[i]:.3f}", float(mean[i]) / most, told + between)
        silence.setdefault(row, []).append(shade)
        share = float(looked.written[i])
        shade = Shade(f"{share:.2f}", share / loudest, f"{told}{share:+.3f} of the right logit")
        wrote.setdefault(row, []).append(shade)
    whole = interval(looked.whole.mean(2).T)
    for row, middle, least, greatest in zip(silence, *whole, strict=True):
        told = f"all groups, {row}: {middle:+.4f} nats, {least:+.4f} to {greatest:+.4f}"
        silence[row].append(Shade(f"{middle:.3f}", float(middle) / most, told))
    head = ["stage and site", *(f"group {i}" for i in range(groups))]
    one = (
        "Nats per token that are added if a group writes its mean activity in place of its own "
        "there (mean ablation; 95% intervals by sequences are in the text of hover). Groups of "
        "attention are of the channels that heads give, of exchange of hidden neurons. All: what "
        "the site is worth; more than the sum of a row where groups stand in for one another."
    )
    two = (
        "What a group adds by itself to the logit of the token that came, less the mean of all "
        "logits: the terms of a sum, with the embedding, whose total is that logit."
    )
    needed = np.argsort(-mean)[:12]
    used = [c for c in range(len(CLASSES)) if np.any(looked.targets == c)]
    shades = []
    for i in needed:
        own = [float(looked.added[i][looked.targets == c].mean()) for c in used]
        cells = [
            Shade(f"{x:.2f}", x / max(1e-9, max(map(abs, own))), f"{looked.units[i]}: {x:+.4f}")
            for x in own
        ]
        shades.append((str(looked.units[i]), cells))
    three = (
        "The groups whose silence costs most, and what it costs by the class of the token that is "
        "to be said, in nats. One dark cell in a row: the group serves that class."
    )
    return [
        heading("What groups are for"),
        grid([*head, "all"], [*silence.items()], one),
        grid(["group", *(CLASSES[c] for c in used)], shades, three),
        heading("What groups write to the output"),
        grid(head, [*wrote.items()], two),
    ]


def _excited(looked: Looked, tokenizer: Tokenizer) -> list[Block]:
    excited, told = looked.excited, looked.excited.selected()
    rows = []
    for i, unit in enumerate(looked.units):
        order = sorted(range(len(CLASSES)), key=lambda c: -abs(excited.auroc[i, c] - 0.5))
        sure = [c for c in order if told[i, c]][:3]
        classes = ", ".join(f"{CLASSES[c]} {excited.auroc[i, c]:.2f}" for c in sure)
        found = []
        for tokens in excited.context[i, :TEXTS]:
            parts = tokens[:BEFORE], tokens[BEFORE : BEFORE + 1], tokens[BEFORE + 1 :]
            before, own, after = (spelt(tokenizer, part[part >= 0]) for part in parts)
            found.append(f"{before}⟦{own}⟧{after}")
        rows.append([f"{unit.name}, {unit.site}\n{unit.place}", classes, "\n".join(["", *found])])
    count = int(excited.counts.sum())
    caption = (
        f"Over {count:,} held-out tokens. Classes of the token that is read: the chance that one "
        "of the class excites the group more than another token does (AUROC: 0.5 says nothing, 1 "
        "always, 0 never); only what differs from 0.5 at 5%, corrected for all groups and classes. "
        "Texts: those that excite the group most, ⟦the token⟧ in its surroundings."
    )
    head = ["group", "classes", "texts"]
    return [heading("What excites groups"), table(head, rows, caption, stacked=True)]
