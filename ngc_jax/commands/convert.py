"""Convert a dense run to fewer numbers: `ngc convert --workdir=DIR --to=NEW --text=FILE`.

For: calibration on a text, then a method and a share. Not for: either (`convert/calibrate.py`,
`convert/convert.py`).
"""

import numpy as np
from etils import epath

from ngc_jax.commands.arguments import command, parser, read
from ngc_jax.convert.calibrate import calibrate
from ngc_jax.convert.convert import convert, fit
from ngc_jax.convert.methods import METHODS
from ngc_jax.data.tokens import Symbols
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field
from ngc_jax.training.load import Trained, load

OPTIONS = (
    Field("to", "", "work directory to make, which must not exist"),
    Field("text", "", "file to calibrate on, not one that is tested on; several with commas"),
    Field("tokens", 12_288, "tokens to calibrate on, in windows spread evenly", "[1, inf)"),
    Field("method", "ngc", "how matrices are made smaller", METHODS),
    Field("kept", 0.8, "share of the numbers in matrices that stays", "(0, 1)"),
    Field("share", False, "whether the price chooses which members of a stage have one signal"),
    Field("calibration", "", "folder that keeps what is measured; default: WORKDIR/calibration"),
)


def main() -> None:
    """Prints the predicted loss, what is kept by both counts, and the measured loss."""
    args = read(parser(__doc__, *OPTIONS))
    for name in ("to", "text"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing: see --help")
    teacher = load(args.workdir, args.step)
    tokens = windows(teacher, args.text.split(","), args.tokens)
    home = epath.Path(args.calibration or args.workdir / "calibration")
    home.mkdir(parents=True, exist_ok=True)
    means = calibrate(teacher, tokens, home)
    found = fit(teacher, means, args.method, args.kept, args.share, tokens)
    numbers = found.numbers
    kept = ", ".join(
        f"{numbers[name] / numbers['dense']:.4f} ({name})" for name in ("led", "factored")
    )
    print(f"predicted by {args.method}: {found.predicted:.4f}; numbers kept: {kept}")
    origin = f"{args.workdir}, {args.method}, kept {args.kept}, on {tokens.size} tokens"
    convert(teacher, found, epath.Path(args.to), origin)
    print(f"{args.to}: {origin}")


def windows(trained: Trained, paths: list[str], count: int) -> np.ndarray:
    """Windows of the run's context, spread evenly over files: [windows, T]. Raises UserError."""
    if isinstance(trained.tokenizer, Symbols):
        raise UserError(f"data.task={trained.config.data.task!r}: a task's model reads no text")
    context, found = trained.config.data.context, []
    each = max(1, round(count / context / len(paths)))
    for path in paths:
        try:
            tokens = np.asarray(trained.tokenizer.encode(files.expand(path).read_bytes()), np.int32)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text={path} cannot be read: {error}") from error
        if len(tokens) < context:
            raise UserError(f"--text={path} has {len(tokens)} tokens: must be {context} or more")
        starts = np.linspace(0, len(tokens) - context, each).astype(int)
        found += [tokens[start : start + context] for start in starts]
    made = np.stack(found)
    widest = max(trained.config.model.width, trained.config.model.hidden)
    if made.size < widest:
        print(f"warning: {made.size} tokens are fewer than the {widest} inputs of a matrix")
    return made


if __name__ == "__main__":
    command(main)
