"""Write a run as others publish models: `ngc export --workdir=DIR --to=FOLDER`.

For: a dense decoder without a loop, as safetensors that transformers opens; of a converted one the
weights are formed. Not for: the files (`convert/source.py`), or their names (`convert/names.py`).
"""

from ngc_jax.commands.arguments import command, parser, read
from ngc_jax.convert.convert import formed
from ngc_jax.convert.pretrained import export
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field
from ngc_jax.training.load import load

TO = Field("to", "", "folder to write, which must not exist")


def main() -> None:
    """Prints where the model was written."""
    args = read(parser(__doc__, TO))
    if not args.to:
        raise UserError("--to is missing: give a folder to write, which must not exist")
    trained = load(args.workdir, args.step)
    export(formed(trained) if trained.decoder.shape.apart else trained, args.to)
    print(f"{args.workdir} is written to {args.to}")


if __name__ == "__main__":
    command(main)
