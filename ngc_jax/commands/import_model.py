"""Make a run of a pretrained model: `ngc import --from=FOLDER_OR_GGUF --workdir=DIR`.

For: a folder of safetensors, or a GGUF file, of the Llama family. Not for: reading it
(`convert/source.py`, `convert/names.py`).
"""

import argparse

from ngc_jax.commands.arguments import command
from ngc_jax.runtime.files import place
from ngc_jax.runtime.output import now


def main() -> None:
    """Prints what was imported."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--from", dest="source", required=True, help="folder, or .gguf file")
    arguments.add_argument("--workdir", type=place, required=True, help="a new directory")
    told = "tokens of a window; default: 512, or as many as the model takes"
    arguments.add_argument("--context", type=int, default=0, help=told)
    told = "of activations, wherever the run is used: float32 or bfloat16"
    arguments.add_argument("--compute_dtype", default="float32", help=told)
    told = "names that are one token each in a text or prompt, such as '<|im_start|>,<|im_end|>'"
    arguments.add_argument("--special_tokens", default="", help=told)
    args = arguments.parse_args()
    from ngc_jax.convert.pretrained import import_pretrained
    from ngc_jax.training.load import load

    now("importing")
    import_pretrained(
        args.source, args.workdir, args.context, args.compute_dtype, args.special_tokens
    )
    made = load(args.workdir)
    m = made.config.model
    print(f"{args.workdir}: {m.prelude} layers of width {m.width}, from {made.meta['origin']}")


if __name__ == "__main__":
    command(main, goes_on=True)
