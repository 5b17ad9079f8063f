"""Settings of the data, `config.data`: the table of fields, and which values go together.

For: the defaults, ranges and help of these fields. Not for: reading them.
"""

from typing import Any

from ngc_jax.data.tasks import TASKS
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import SEEDS, Field, Need, Section

# fields that lead out of a run
OUTSIDE = ("path", "validation_path", "tokenizer_path", "tfds_name", "tfds_data_dir", "cache_dir")


# fields that images read as well as text does, and that they alone read
SHARED = (
    *("kind", "path", "validation_path", "validation_fraction", "cache_dir"),
    *("tfds_name", "tfds_data_dir", "train_split", "validation_split"),
)
IMAGES = (
    *("image_size", "colours", "resize", "split_seed"),
    *("flip", "shift", "crop", "cutout", "mixup"),
)


def _unread(config: Any) -> dict[str, str]:
    images = config.data.kind == "images"
    names = [f.name for f in DATA.fields if f.name not in SHARED and (f.name in IMAGES) != images]
    return dict.fromkeys(names, f"data.kind={config.data.kind!r}")


def _check(config: Any, need: Need) -> None:
    d = config.data
    need(d.colours in (1, 3), "data.colours", "1 or 3")
    need(d.shift < d.image_size, "data.shift", f"less than data.image_size={d.image_size}")
    need(d.cutout <= d.image_size, "data.cutout", f"at most data.image_size={d.image_size}")
    both = d.kind == "images" and d.path and d.tfds_name
    need(not both, "data.tfds_name", "'' where data.path names images")
    enough = d.tokenizer != "bpe" or d.vocab_size >= 258
    need(enough, "data.vocab_size", "258 or more where data.tokenizer='bpe', for instance 4096")
    need(bool(d.path) or not d.validation_path, "data.validation_path", "'' without data.path")
    unread = d.tokenizer_path and (d.task or d.tokenizer != "given")
    need(not unread, "data.tokenizer_path", "'' where data.tokenizer is not 'given'")
    names = special_names(d)
    need(
        not names or (d.tokenizer in ("bpe", "given") and not d.task),
        "data.special_tokens",
        "'' where data.tokenizer is not 'bpe' or 'given'",
    )
    fit = all(names) and len({*names}) == len(names) and not any(map(str.isspace, "".join(names)))
    need(fit, "data.special_tokens", "different names without spaces, such as '<|user|>,<|end|>'")
    if d.tokenizer == "tokens":
        need(bool(d.path), "data.tokenizer", "'bytes' or 'bpe' where data.path names no tokens")
        need(not d.isolate_documents, "data.isolate_documents", "False for data.tokenizer='tokens'")
    whole = d.tokenizer != "tokens" and config.iteration.rounds != "marked" and not d.task
    need(d.packing == "stream" or whole, "data.packing", "'stream' where there are no documents")
    plain = d.path and not d.task and d.tokenizer != "tokens" and d.packing == "stream"
    wants = "True where data.path names no plain text, or data.packing is 'best-fit'"
    need(d.prepare or bool(plain), "data.prepare", wants)
    if not d.task:
        return
    task, where = TASKS[d.task], f"where data.task={d.task!r}"
    text, isolated = d.path or d.tfds_name, "data.isolate_documents"
    need(not text, "data.task", "'' where data.path or data.tfds_name gives a text")
    need(not d.isolate_documents, isolated, "False where data.task has no documents")
    need(d.low >= task.lowest, "data.low", f"{task.lowest} or more ({task.unit}) {where}")
    need(d.high <= task.highest, "data.high", f"at most {task.highest} ({task.unit}) {where}")
    need(d.low <= d.high, "data.low", f"at most data.high={d.high}")


def counted(data: Any) -> tuple[str, int]:
    """What a run counts of its data, "tokens" or "images", and how many an example has."""
    return ("images", 1) if data.kind == "images" else ("tokens", data.context)


def special_names(data: Any) -> list[str]:
    """The names in `data.special_tokens`."""
    return data.special_tokens.split(",") if data.special_tokens else []


def withhold(
    data: Any, path: str = "", tfds_dir: str = "", trust: bool = False, validation_path: str = ""
) -> str:
    """Leaves in a stored `config.data` only the places that a user types, or trusts it with.

    Returns why its text may not be read, or "". Raises UserError for a place that nothing reads.
    """
    for flag, given, unread in (
        ("data_path", path, data.task),
        ("validation_path", validation_path, not data.validation_path),
        ("tfds_dir", tfds_dir, not data.tfds_name),
    ):
        if given and unread:
            what = ("task", "validation_path", "tfds_name")
            has = ", ".join(f"data.{name}={data[name]!r}" for name in what)
            raise UserError(f"{flag}={given!r}: must not be given, since the run has {has}")
    named = [name for name in ("path", "validation_path", "tfds_name") if data[name]]
    stored = [f"data.{name}={data[name]!r}" for name in named]
    places = {name: data[name] if trust else "" for name in OUTSIDE}
    if path:
        places |= {"path": path, "tfds_name": ""}
    if tfds_dir:
        places |= {"tfds_name": data.tfds_name, "tfds_data_dir": tfds_dir}
    if validation_path:
        places["validation_path"] = validation_path
    held = bool(places["validation_path"]) or "validation_path" not in named
    data.update(places)
    if not stored or trust or ((path or tfds_dir) and held):
        return ""
    return (
        f"its config.json names the text {' and '.join(stored)}, which is not read unless you say "
        f"so: give --data_path=FILE{'' if held else ' and --validation_path=FILE'} or "
        "--tfds_dir=FOLDER, or --trust to read what the directory names (ngc_jax.load: data_path, "
        "validation_path, tfds_dir, trust=True)"
    )


# fmt: off
DATA = Section("data",
    "What the model learns: a text, the problems of a reasoning task (docs/tasks.md), or images.", [
    Field("kind", "text", "'images' = classes of images (docs/vision.md)", ("text", "images")),
    Field("task", "", "reasoning task to learn; '' = a text", lambda: ("", *TASKS)),
    Field("low", 1, "least difficulty of a problem; docs/tasks.md says what it counts"),
    Field("high", 10, "greatest difficulty; its longest problem must fit into context"),
    Field("problems", 100_000, "problems to train on", "[1, inf)", "problems"),
    Field("problem_seed", 0, "seed of the problems", SEEDS),
    Field("path", "", "text, or folder of texts; a mixture: 'A:0.7,B:0.3'; '' = the source of "
          "Python's library (docs/data.md)"),
    Field("validation_path", "", "held-out text of your own; '' = a part of path"),
    Field("text_column", "text", "column of JSONL, Parquet and Arrow files that holds the text"),
    Field("tfds_name", "", "prepared TFDS text set in place of path, such as 'lm1b'; '' = none"),
    Field("tfds_data_dir", "", "folder of TFDS sets; '' = the default of TFDS"),
    Field("train_split", "train", "split of the TFDS set; slices work: 'train[:95%]'"),
    Field("validation_split", "validation", "held-out split of the TFDS set"),
    Field("text_key", "text", "feature of the TFDS set that holds the text"),
    Field("validation_fraction", 0.1, "part of path to hold out, by bytes; of a task, of the "
          "number of problems", "(0, 0.5]"),
    Field("tokenizer", "bytes", "'bpe' = byte pairs, learned on the text; 'given' = that of a "
          "pretrained model; 'tokens' = path holds tokens", ("bytes", "bpe", "given", "tokens")),
    Field("tokenizer_path", "", "tokenizer.json, or .tiktoken file, of 'given'; '' = that of the "
          "pretrained model"),
    Field("special_tokens", "", "names that are one token each where they are spelt out in a text "
          "or prompt, with commas: '<|user|>,<|end|>'; of 'bpe' and 'given'"),
    Field("vocab_size", 4096, "vocabulary of 'bpe', 258 or more, 'given' or 'tokens'; that of "
          "'bytes' is 257", "[1, 1e6]", "tokens"),
    Field("context", 128, "length of a window, or of the longest problem", "[1, 1e9]", "tokens"),
    Field("prepare", True, "whether tokens are made and kept before training; False: when they are "
          "read, from plain files"),
    Field("packing", "stream", "what a window to train on is of: 'stream' = all text in a row; "
          "'best-fit' = whole documents", ("stream", "best-fit")),
    Field("isolate_documents", False, "whether a token attends to its own document only"),
    Field("cache_dir", "", "folder of prepared text and tokens; '' = ~/.cache/ngc_jax"),
    Field("image_size", 8, "of an image's side", "[1, 4096]", "pixels"),
    Field("colours", 1, "numbers of a pixel: 1 = grey, 3 = RGB", "[1, 3]", "colours"),
    Field("resize", False, "whether images of other sizes are scaled and their middle is cut out"),
    Field("split_seed", 0, "seed of the images held out, where none are given", SEEDS),
    Field("flip", False, "whether half of the images to train on are mirrored"),
    Field("shift", 0, "by which they are moved at most, each way", "[0, inf)", "pixels"),
    Field("crop", 1.0, "least side, over the whole, of a square that is cut out and scaled up",
          "(0, 1]"),
    Field("cutout", 0, "side of a square that is blotted out; 0 = none", "[0, inf)", "pixels"),
    Field("mixup", 0.0, "Beta(a, a) of the shares of two images in one; 0 = off", "[0, inf)"),
], _check, _unread)
# fmt: on
