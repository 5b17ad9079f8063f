"""Look into a trained model by the lens: `ngc lens --workdir=DIR`, one page for a browser.

For: what is said at each stage and round, what groups are for, write and are excited by. Not for:
the model as a dynamical system (`stability.py`).
"""

from typing import TYPE_CHECKING

from ngc_jax.commands.arguments import PLACES, command, held_out, opened, page_folder, parser, read
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.files import expand

if TYPE_CHECKING:
    from ngc_jax.analysis.lens_page import Prompts
    from ngc_jax.training.load import Trained

TUNING = 64  # updates of the tuned lens
OPTIONS = (
    Field("sequences", 16, "windows to silence groups on", "[2, inf)"),
    Field("windows", 0, "windows to look for excitation in; 0: all held-out text", "[0, inf)"),
    Field("prompt", "", "to patch into a run on --other, a prompt of as many tokens"),
    Field("other", "", "a prompt after which something else comes than after --prompt"),
)


def main() -> None:
    """Looks and writes the page."""
    arguments, where = parser(__doc__, *OPTIONS, *PLACES), "of the page; default: DIR/lens"
    arguments.add_argument("--out", type=expand, help=f"directory {where}")
    args = read(arguments)
    import numpy as np

    from ngc_jax.analysis import lens_page
    from ngc_jax.analysis.look import look
    from ngc_jax.analysis.page import describe, unwritable
    from ngc_jax.data.batches import held_out_batches

    trained = opened(args)
    decoder, config = trained.decoder, trained.config
    trained.needs_text("the lens")
    if config.data.task:
        raise UserError(f"data.task={config.data.task!r}: the lens reads models of text")
    prompts = _prompts(trained, args.prompt, args.other) if args.prompt or args.other else None
    batch, held = held_out(trained, args.sequences), trained.data().validation
    limit = min(args.windows or len(held), len(held))
    size = min(config.eval.batch_size, limit)
    rest, count = held_out_batches(held, batch_size=size, limit=limit), -(-limit // size)
    examples = trained.data().train
    chosen = min(len(examples), TUNING * config.eval.batch_size)
    how = {"batch_size": min(chosen, config.eval.batch_size), "limit": chosen}
    tuning = (one for one, _ in held_out_batches(examples, **how))
    out = page_folder(args, "lens")
    try:
        found = look(decoder, trained.params, batch, tuning, rest, count, trained.tokenizer)
    except ValueError as error:
        raise UserError(f"--workdir={args.workdir}: {error}") from error
    tokens = f"{batch.inputs.size:,} held-out tokens, {len(batch.inputs)} windows"
    about = f"{describe(config)} Checkpoint of update {trained.step:,}, silenced on {tokens}."
    try:
        title = f"Lens on {args.workdir.resolve().name}, step {trained.step}"
        lens_page.write(out, found, prompts, trained.tokenizer, title, about)
    except OSError as error:
        raise unwritable(out, error) from error
    for place, said in found.said.items():
        print(f"{place:24} {np.mean(np.asarray(said.nats)):.4f} nats per token")
    print(f"wrote {out / 'index.html'}")


def _prompts(trained: "Trained", prompt: str, other: str) -> "Prompts":
    """Two prompts and what one restores in the other. UserError where they do not go together."""
    import jax

    from ngc_jax.analysis.lens import patching
    from ngc_jax.analysis.lens_page import Prompts
    from ngc_jax.analysis.probes import stage_names
    from ngc_jax.data.batches import Batch

    tokens = [trained.encode(text)[None] for text in (prompt, other)]
    counts, given = [one.shape[1] for one in tokens], f"--prompt={prompt!r} and --other={other!r}"
    if len({*counts}) > 1:
        raise UserError(f"{given} have {counts[0]} and {counts[1]} tokens: must have as many")
    decoder = trained.decoder
    found = jax.jit(patching, static_argnums=0)(decoder, trained.params, *map(Batch, tokens))
    if found.right == found.wrong:
        said = trained.tokenizer.decode([int(found.right)]).decode(errors="replace")
        wants = "give one after which another comes"
        raise UserError(f"{given} are both followed by {said!r}: {wants}")
    places = ["embedding", *stage_names(decoder.shape)]
    return Prompts(tokens[0][0], tokens[1][0], places, found)


if __name__ == "__main__":
    command(main, goes_on=True)
