"""What a work directory holds: `python -m ngc_jax.inspect --workdir=DIR`.

For: checkpoints and whether they are sound, the parameter table with stored against generated
weights, and the SHA-256 of a state. Changes nothing, and may run beside the training. Not for: how
good the model is (`evaluate.py`).
"""

import math
from typing import Any

from flax.traverse_util import flatten_dict

from ngc_jax import count
from ngc_jax.commands.arguments import command, parser, read
from ngc_jax.nn.model import LanguageModel
from ngc_jax.runtime.checkpoint import Checkpoints, digest
from ngc_jax.training.load import load


def parameter_table(params: Any, model: LanguageModel) -> str:
    """One line a parameter: path, shape, kind, numbers stored, and weights generated from them.

    A synapse's weights stand in the line of its last part.
    """
    rows = [("parameter", "shape", "kind", "stored", "generated per forward")]
    info, made = flatten_dict(model.param_info()), model.generated()
    last: dict[tuple[str, str], int] = {}  # the last line of each synapse in each stack
    for path, leaf in flatten_dict(params).items():
        for synapse in made.get(path[0], {}).keys() & set(path):
            if info[path].kind == "state":
                last[path[0], synapse] = len(rows)
        size, shape = f"{math.prod(leaf.shape):,}", "x".join(map(str, leaf.shape))
        rows.append(("/".join(path), shape, info[path].kind, size, ""))
    generated = {line: made[stack][synapse] for (stack, synapse), line in last.items()}
    rows = [
        (*row[:4], f"{generated[i]:,}") if i in generated else row for i, row in enumerate(rows)
    ]
    total = count.parameters(params, model.param_info())
    rows.append(("total", "", "", f"{total.total:,}", f"{sum(generated.values()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> None:
    """Prints checkpoints, the parameter table, and the digest of the state."""
    args = read(parser(__doc__))
    trained = load(args.workdir, args.step)
    checkpoints = Checkpoints(args.workdir / "checkpoints", read_only=True)
    for step in checkpoints.steps():
        print(f"checkpoint {step}: {checkpoints.fault(step) or 'sound'}")
    checkpoints.close()
    print(parameter_table(trained.params, trained.model))
    print(f"state at step {trained.step}, sha256 {digest(trained.state)}")


if __name__ == "__main__":
    command(main)
