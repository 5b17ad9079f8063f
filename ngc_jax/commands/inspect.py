"""What a work directory holds: `python -m ngc_jax.inspect --workdir=DIR`.

For: sound checkpoints, parameters, and a state's SHA-256. Not for: how good it is (`evaluate.py`).
"""

import math
from typing import TYPE_CHECKING, Any

from ngc_jax.commands.arguments import command, parser, read
from ngc_jax.report.blocks import aligned
from ngc_jax.runtime.errors import plain
from ngc_jax.runtime.output import now

if TYPE_CHECKING:
    from ngc_jax.nn.model import LanguageModel


def parameter_table(params: Any, model: "LanguageModel") -> str:
    """A line for each parameter; beside the last part of a synapse, how many weights it makes."""
    from flax.traverse_util import flatten_dict

    from ngc_jax import count

    info, made, rows = flatten_dict(model.param_info()), model.generated(), []
    for path, leaf in reversed(flatten_dict(params).items()):
        kind, synapses = info[path].kind, made.get(path[0], {})
        named = synapses.keys() & set(path) if kind == "state" else ()
        generated = "".join(f"{synapses.pop(name):,}" for name in named)
        shape = "x".join(map(str, leaf.shape))
        rows.append(["/".join(path), shape, kind, f"{math.prod(leaf.shape):,}", generated])
    stored = count.parameters(params, model.param_info()).total
    head = ["parameter", "shape", "kind", "stored", "generated per forward"]
    total = ["total", "", "", f"{stored:,}", f"{count.generated_weights(model):,}"]
    return aligned([head, *reversed(rows), total], 3)


def main() -> None:
    """Prints checkpoints, the parameter table, and the digest of the state."""
    args = read(parser(__doc__))
    from ngc_jax.runtime.checkpoint import Checkpoints, digest
    from ngc_jax.training.load import load

    trained = load(args.workdir, args.step)
    now("checking the checkpoints")
    with Checkpoints(args.workdir / "checkpoints", read_only=True) as checkpoints:
        for step in checkpoints.steps():
            print(f"checkpoint {step}: {plain(checkpoints.fault(step) or 'sound')}")
    print(parameter_table(trained.params, trained.model))
    now("reading the state")
    print(f"state at {trained.told}, sha256 {digest(trained.state)}")


if __name__ == "__main__":
    command(main)
