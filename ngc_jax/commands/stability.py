"""How stable a trained model is, as a page: `python -m ngc_jax.stability --workdir=DIR`.

For: writing OUT/index.html. Not for: what is measured or said (`ngc_jax/analysis/`).
"""

from ngc_jax.commands.arguments import PLACES, command, held_out, opened, page_folder, parser, read
from ngc_jax.report.figures import matplotlib
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.files import expand
from ngc_jax.runtime.output import doing

LEAST_TOKENS = 4  # of a window: a slope along tokens after the first needs three
OPTIONS = (
    Field("sequences", 16, "held-out windows to measure on", "[2, inf)"),
    Field("rounds", 16, "to follow the loop for", "[2, inf)"),
)


def main() -> None:
    """Writes the page and prints its headline numbers."""
    arguments, where = parser(__doc__, *OPTIONS, *PLACES), "of the page; default: DIR/stability"
    arguments.add_argument("--out", type=expand, help=f"directory {where}")
    args = read(arguments)
    from ngc_jax.analysis import page
    from ngc_jax.analysis.stability import measure
    from ngc_jax.nn.settings import tokens_of

    matplotlib()
    trained = opened(args)
    config, decoder, context = trained.config, trained.decoder, tokens_of(trained.config)
    batch = held_out(trained, args.sequences)
    if context < LEAST_TOKENS:
        more = f"measures along tokens need a run with {LEAST_TOKENS} or more"
        raise UserError(f"{context} tokens of an example (data.context, model.patch): {more}")
    out = page_folder(args, "stability")  # before minutes are spent on measuring
    with doing("measuring"):
        measured = measure(decoder, trained.params, batch, args.rounds)
    count = len(batch.inputs)
    what, each = ("images",) * 2 if config.data.kind == "images" else ("text", "windows")
    tokens = f"{count * context:,} tokens of held-out {what}: {count} {each} of {context}"
    about = f"Checkpoint of update {trained.step:,}, measured on {tokens}, evenly spread."
    about = f"{page.describe(config)} {about}"
    title = f"Stability of {args.workdir.resolve().name}, step {trained.step}"
    for row in page.write(out, measured, trained.tokenizer, title, about):
        interval = f"{page.number(row.mean)} [{page.number(row.low)}, {page.number(row.high)}]"
        print(f"{row.kind + ', ' + row.where:56} {interval:28} {row.unit}")
    print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
    command(main, goes_on=True)
