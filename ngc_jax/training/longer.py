"""A run made longer: `train.steps` grows in the same work directory.

For: what it goes on from, and what becomes of the end that it had. Not for: another change of a
config, which begins another run (`begin.py`).
"""

import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from ngc_jax.core.wiring import DYNAMIC
from ngc_jax.runtime import files
from ngc_jax.runtime.checkpoint import Checkpoints
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.optimizer import schedule, stable_updates

KEPT = ("config.json", "tokenizer.json", "metrics.jsonl", "card.md")


def lengthen(home: files.Path, old: ConfigDict, new: ConfigDict, text: str = "") -> None:
    """Makes ready for more updates, and says what follows. Raises UserError where it cannot be.

    Under 'wsd' a run goes on from before its decay, where there is a checkpoint, as if it had been
    as long from the start; the end that it had becomes a work directory inside. A kill does no
    harm: the same command does it again. Else it goes on from its newest checkpoint. Nothing moves
    where the run was on a text of another fingerprint than `text`: `Run` will refuse it.
    """
    was, now, kind = old.train.steps, new.train.steps, old.model.wiring
    if kind in DYNAMIC:
        wants = f"must stay {was} where model.wiring={kind!r} changes by parts of it"
        raise UserError(f"train.steps={now}: {wants}; or begin another run by --init_from={home}")
    longer, wsd = f"train.steps: {was} -> {now}", old.train.schedule == "wsd"
    with Checkpoints(home / "checkpoints", read_only=True) as checkpoints:
        steps = checkpoints.steps()
        early = [step for step in steps if wsd and step <= stable_updates(old.train)]
        stable = [step for step in early if not checkpoints.fault(step)]
        if stable and text not in ("", checkpoints.meta(stable[-1])["data"]):
            return
    if not steps or (wsd and steps[-1:] == stable[-1:]):
        print(f"{longer}: nothing has decayed, so it is as if it had been {now} from the start")
    elif stable:
        ended = home / f"ended_{was}"
        (ended / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (home / name).exists():
                epath.Path(home / name).copy(ended / name, overwrite=True)
        for step in (step for step in steps if step > stable[-1]):
            files.move(home / "checkpoints" / str(step), ended / "checkpoints" / str(step))
        begun = f"goes on from checkpoint {stable[-1]}, before the decay, as one of {now} would"
        print(f"{longer}: {begun}; the end that it had is kept in {ended}")
    else:
        at = jnp.asarray(steps[-1])
        low, high = (c.train.learning_rate * float(schedule(c.train, at)) for c in (old, new))
        rates = f"the learning rate goes from {low:.3g} to {high:.3g} at step {steps[-1]}"
        why = "no checkpoint is from before the decay" if wsd else "the cosine is drawn out"
        other = "" if wsd else "; 'wsd' can be made longer without that"
        print(f"{longer}: {why}: {rates}, unlike in a run of that length from the start{other}")
