"""Convert a dense run to fewer numbers: `ngc convert --workdir=DIR --to=NEW --text=FILE`.

For: calibration on a text, then a method and a share. Not for: either (`convert/calibrate.py`,
`convert/convert.py`).
"""

from typing import TYPE_CHECKING

from ngc_jax.commands.arguments import PLACES, command, mesh_of, opened, parser, read
from ngc_jax.convert.methods import FORMS, METHODS
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.output import doing, now

if TYPE_CHECKING:
    from ngc_jax.data.batches import Batch, Examples
    from ngc_jax.training.load import Trained

OPTIONS = (
    Field("to", "", "work directory to make, which must not exist"),
    Field("text", "", "files to calibrate on, with commas; default: what the run trained on"),
    Field("tokens", 12_288, "tokens to calibrate on, in windows spread evenly", "[1, inf)"),
    Field("method", "ngc", "how matrices are made smaller", METHODS),
    Field("kept", 0.8, "share of the numbers in matrices that stays", "(0, 1)"),
    Field("share", False, "whether the price chooses which members of a stage have one signal"),
    Field("form", "low_rank", "of each matrix; others have a metric of their own", FORMS),
    Field("groups", 0, "of forms 'ports' and 'blocks', a divisor of all sides", "[0, inf)"),
    Field("synapses", 0.4, "share of a matrix in single synapses, of form 'synapses'", "(0, 1)"),
    Field("mesh", "data:1", "devices that share the windows of calibration, such as data:8"),
    Field("calibration", "", "folder that keeps what is measured; default: WORKDIR/calibration"),
)


def main() -> None:
    """Prints the predicted loss and what is kept, by both counts."""
    args = read(parser(__doc__, *OPTIONS, *PLACES))
    if not args.to:
        raise UserError("--to is missing: give a work directory to make, which must not exist")
    from ngc_jax.convert.calibrate import calibrate
    from ngc_jax.convert.convert import convert, fit
    from ngc_jax.convert.forms import fit_form
    from ngc_jax.nn import mesh as meshes

    mesh = mesh_of(args.mesh)
    teacher = opened(args, mesh)
    teacher.needs_text("conversion")
    batch = examples(teacher, args.text.split(",") if args.text else [], args.tokens)
    home = files.place(args.calibration or args.workdir / "calibration")
    home.mkdir(parents=True, exist_ok=True)
    with doing("calibrating"):
        means = calibrate(teacher, batch, home, meshes.num_shards("window", mesh), mesh=mesh)
    with doing("converting"):
        if args.form == "low_rank":
            found, how = fit(teacher, means, args.method, args.kept, args.share, batch), args.method
        else:
            form = args.form, args.kept, args.groups, args.synapses
            teacher, found = fit_form(teacher, means, *form)
            how = f"form={args.form}"
    numbers = found.numbers
    kept = ", ".join(
        f"{numbers[name] / numbers['dense']:.4f} ({name})" for name in ("led", "factored")
    )
    print(f"predicted by {how}: {found.predicted:.4f}; numbers kept: {kept}")
    origin = f"{args.workdir}, {how}, kept {args.kept}, on {batch.inputs.size} tokens"
    now("writing")
    convert(teacher, found, files.place(args.to), origin)
    print(f"{args.to}: {origin}")


def examples(trained: "Trained", texts: list[str], count: int) -> "Batch":
    """Examples of about `count` tokens, spread evenly over texts, else over what was trained on.

    Raises UserError where there is none, or a text is shorter than a window.
    """
    import jax
    import numpy as np

    from ngc_jax.data.batches import held_out_batches

    context, found = trained.config.data.context, []
    for source in [_text(trained, path) for path in texts] or [trained.data().train]:
        wanted = max(1, round(count / context / max(1, len(texts))))
        chosen = min(wanted, len(source))
        (batch, _), *_ = held_out_batches(source, batch_size=chosen, limit=chosen)
        found.append(batch)
    made: Batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *found)
    widest = max(inputs for _, inputs in trained.decoder.shape.sizes.values())
    if made.inputs.size < widest:
        print(f"warning: {made.inputs.size} tokens are fewer than the {widest} inputs of a matrix")
    return made


def _text(trained: "Trained", path: str) -> "Examples":
    import numpy as np

    from ngc_jax.data.batches import Windows
    from ngc_jax.data.tokenizer import Symbols

    if isinstance(trained.tokenizer, Symbols):
        task = trained.config.data.task
        raise UserError(f"--text={path}: must not be given for a model of data.task={task!r}")
    try:
        tokens = np.asarray(trained.tokenizer.encode(files.expand(path).read_bytes()), np.int32)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text={path} cannot be read: {error}") from error
    context = trained.config.data.context
    if len(tokens) <= context:
        raise UserError(f"--text={path} has {len(tokens)} tokens: must be {context + 1} or more")
    return Windows(tokens, context, trained.tokenizer.mark, trained.boundary)


if __name__ == "__main__":
    command(main, goes_on=True)
