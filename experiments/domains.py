"""Texts of three domains, for the studies of conversion: to calibrate on, and to test on.

    python -m experiments.domains --verse=FILE --law=/usr/share/common-licenses --out=texts

code.txt and code2.txt are the files of this Python's library that runs train on and hold out;
verse.txt and verse2.txt the first nine tenths of a text and its rest; law2.txt all files of a
folder, which calibration never sees. For: a table that others can make again, as the checksums
say. Not for: texts of one's own, which the studies take by path.
"""

import argparse
import hashlib
import pathlib

from ngc_jax.commands.arguments import command
from ngc_jax.data.corpus import stdlib_documents
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand, write_durably


def texts(verse: pathlib.Path, law: pathlib.Path) -> dict[str, bytes]:
    """The text of each file, by its name. Raises OSError, and UserError where `law` is empty."""
    code = {split: b"".join(text for _, text in of) for split, of in stdlib_documents().items()}
    lines = verse.read_bytes().splitlines(keepends=True)
    cut = len(lines) * 9 // 10
    licences = [path for path in sorted(law.iterdir()) if path.is_file() and not path.is_symlink()]
    if not licences:
        raise UserError(f"--law={law}: holds no file; a folder of texts of a third kind would do")
    return {
        "code.txt": code["train"],
        "code2.txt": code["validation"],
        "verse.txt": b"".join(lines[:cut]),
        "verse2.txt": b"".join(lines[cut:]),
        "law2.txt": b"".join(path.read_bytes() for path in licences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--verse", required=True, type=expand, help="a text of verse")
    parser.add_argument("--law", required=True, type=expand, help="a folder of licences")
    parser.add_argument("--out", type=expand, default=pathlib.Path("texts"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts(args.verse, args.law).items():
        write_durably(args.out / name, text)
        print(f"{args.out / name}: {len(text):,} bytes, SHA-256 {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    command(main)
