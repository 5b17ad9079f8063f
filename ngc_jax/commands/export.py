"""Write a run as others read models: `ngc export --workdir=DIR --to=FOLDER`.

For: a dense decoder without a loop, as safetensors that transformers opens; of a converted one the
weights are formed, or its factors written (docs/pretrained.md). Any other for PyTorch or XLA
(docs/handing_on.md). Not for: the files (`convert/source.py`), or their names (`convert/names.py`).
"""

from ngc_jax.commands.arguments import command, parser, read
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.output import now

FORMS = ("formed", "factored", "torch", "stablehlo")
OPTIONS = (
    Field("to", "", "folder to write, which must not exist"),
    Field("form", "formed", "formed, factored: as published; torch, stablehlo: alone", FORMS),
    Field("dtype", "float32", "of the tensors", ("float32", "bfloat16")),
)


def main() -> None:
    """Prints where the model was written."""
    args = read(parser(__doc__, *OPTIONS))
    if not args.to:
        raise UserError("--to is missing: give a folder to write, which must not exist")
    from ngc_jax.convert.convert import formed
    from ngc_jax.convert.pretrained import export
    from ngc_jax.convert.source import PACKAGES
    from ngc_jax.convert.standalone import export_stablehlo, export_torch
    from ngc_jax.training.load import load

    trained, standalone = load(args.workdir, args.step), args.form in ("torch", "stablehlo")
    if standalone and args.dtype != "float32":
        raise UserError(f"--dtype={args.dtype}: must be 'float32' where --form={args.form!r}")
    trained.needs_text("export")
    now("writing")
    converted, factored = standalone or bool(trained.decoder.shape.apart), args.form == "factored"
    if factored and not converted:
        raise UserError("--form=factored: must be 'formed' for a model that is not converted")
    try:
        if standalone:
            (export_torch if args.form == "torch" else export_stablehlo)(trained, args.to)
        else:
            export(formed(trained) if converted and not factored else trained, args.to, args.dtype)
    except ImportError as error:
        raise UserError(f"--form={args.form}: {error}: {PACKAGES}") from error
    print(f"{args.workdir} is written to {args.to}")


if __name__ == "__main__":
    command(main, goes_on=True)
