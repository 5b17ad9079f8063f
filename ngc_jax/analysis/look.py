"""All that the page of the lens shows of a trained model, measured.

For: which instruments, on which text. Not for: the instruments (`lens.py`, `excitation.py`), or
the page (`lens_page.py`).
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.analysis import excitation, lens
from ngc_jax.analysis.lens_page import Looked
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Tokenizer
from ngc_jax.nn.decoder import Decoder
from ngc_jax.runtime.output import come, doing


def look(
    model: Decoder,
    params: dict[str, Any],
    batch: Batch,
    tuning: Iterable[Batch],
    rest: Iterable[tuple[Batch, np.ndarray]],
    count: int,
    tokenizer: Tokenizer,
) -> Looked:
    """The lens on a batch [B, T], and what excites groups in `count` batches and which rows count.

    tuning: batches of other text, on which the lens is tuned.

    Raises ValueError for a model whose logits are no sum (`lens.attribution`).
    """
    groups, sites = lens.units(model), lens.units(model, "site")
    classes = excitation.class_of_tokens(tokenizer)
    batch = jax.tree.map(jnp.asarray, batch)
    with doing("reading each place"):
        read = jax.jit(lens.logit_lens, static_argnums=0)
        said = read(model, params, batch)
        tuned = read(model, params, batch, lens.tuned_lens(model, params, tuning))
        found = jax.jit(partial(lens.attribution, centred=True), static_argnums=0)(
            model, params, batch, batch.targets
        )
    parts = [found.written[u.place, u.site][..., u.first : u.first + u.size] for u in groups]
    written = np.array([float(jnp.mean(jnp.sum(part, axis=-1))) for part in parts])
    with doing("silencing groups"):
        fill = jax.jit(lens.means, static_argnums=0)(model, params, batch)
        nats = []
        silent = [*groups, *sites]
        for i, one in enumerate(lens.silenced_nats(model, params, batch, silent, fill)):
            nats.append(one)
            come(i, len(silent))
    with doing("looking for what excites groups"):

        def shown() -> Iterator[tuple[Batch, np.ndarray]]:
            for i, one in enumerate(rest):
                come(i, count)
                yield one

        excited = excitation.excitation(model, params, groups, shown(), classes)
    added, whole = np.split(np.stack(nats[1:]) - nats[0], [len(groups)])
    targets = classes[np.maximum(np.asarray(batch.targets), 0)]
    tokens = np.asarray(batch.inputs)
    return Looked(said, tuned, tokens, groups, added, whole, targets, written, excited)
