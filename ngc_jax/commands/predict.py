"""The classes of image files: `python -m ngc_jax.predict --workdir=DIR image.png ...`.

For: images of any size, which are scaled, and whose middle is cut out; `--json` for programs. Not
for: how good a model is (`evaluate.py`).
"""

import json
import pathlib
from typing import TYPE_CHECKING

from ngc_jax.commands.arguments import command, parser, read
from ngc_jax.runtime.errors import UserError, plain
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.files import expand

if TYPE_CHECKING:
    import numpy as np

    from ngc_jax.data.image_files import Fit

OPTIONS = (
    Field("top", 3, "classes of each image, the likeliest first", "[1, inf)"),
    Field("json", False, "print a line of JSON for each image"),
)


def main() -> None:
    """Prints a line for each image."""
    arguments = parser(__doc__, *OPTIONS)
    arguments.add_argument("images", nargs="+", type=expand, help="files: PNG, JPEG and others")
    args = read(arguments)
    import numpy as np

    from ngc_jax.data.image_files import Fit
    from ngc_jax.training.load import load

    trained = load(args.workdir, args.step)
    data, names = trained.config.data, getattr(trained.tokenizer, "symbols", ())
    if data.kind != "images":
        raise UserError(f"--workdir={args.workdir} holds a model of text: ask ngc sample")
    fit = Fit(data.image_size, data.colours, resize=True)
    pixels = [_opened(fit, path) for path in args.images]
    for path, shares in zip(args.images, trained.classify(np.stack(pixels)), strict=True):
        best = np.argsort(-shares, kind="stable")[: args.top]
        said = {names[i]: round(float(shares[i]), 6) for i in best}
        if args.json:
            print(json.dumps({"image": str(path), "classes": said}))
        else:
            print(f"{path}:", ", ".join(f"{plain(n)} {share:.1%}" for n, share in said.items()))


def _opened(fit: "Fit", path: pathlib.Path) -> "np.ndarray":
    try:
        image = fit.file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if image is None:
        raise UserError(f"{path}: must be an image that Pillow can read; it is empty or damaged")
    return image


if __name__ == "__main__":
    command(main)
