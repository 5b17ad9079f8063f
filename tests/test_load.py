"""A run in Python: trained, opened, asked for text, loss, activations, and with groups silenced."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WHOLE, python

import ngc_jax
from ngc_jax.analysis.probes import silenced
from ngc_jax.commands import sample
from ngc_jax.config import base, make_model
from ngc_jax.core.rules import RULES
from ngc_jax.data.batches import Batch
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.settings import OUTSIDE, withhold
from ngc_jax.data.tasks import TASKS
from ngc_jax.data.tokenizer import Symbols
from ngc_jax.nn.sampling import Sampling
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import read_rows
from ngc_jax.training.load import Trained
from ngc_jax.training.writer import Writer

TEXT = "group state signal\nround port weight\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture(scope="module")
def made():
    return list[Trained]()


@pytest.fixture
def run(home, tiny, made):
    """A trained run with a prelude, a loop and a coda, made once."""
    tiny.update_from_flattened_dict({**WHOLE, "stability.every": 0})
    if not made:
        made.append(ngc_jax.train(tiny, str(home)))
    return made[0]


def test_a_run_is_trained_and_opened_by_strings(run, home, tiny):
    opened = ngc_jax.load(str(home), trust=True)
    assert (run.step, opened.step) == (30, 30)
    assert ngc_jax.load(str(home), step=25).step == 25
    assert opened.config.to_dict() == tiny.to_dict()
    jax.tree.map(np.testing.assert_array_equal, run.params, opened.params)


def test_a_run_of_other_devices_is_opened(run, home, tmp_path):
    shutil.copytree(home, tmp_path / "run")
    stored = json.loads((home / "config.json").read_text())
    stored["mesh"] |= {"data": 3, "group": 4}  # which no machine of one device has
    stored["train"]["learning_rate"] = 1e20  # and what only a float can be
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"learning_rate was 0\.\d+, is 1e\+20"):
        ngc_jax.load(tmp_path / "run")
    stored["train"] = json.loads((home / "config.json").read_text())["train"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert ngc_jax.load(tmp_path / "run").generate("a", tokens=9) == run.generate("a", tokens=9)


def test_a_run_writes_on(run):
    said = run.generate("group ", tokens=30, temperature=0)
    assert set(said) <= set("abcdefghijklmnopqrstuvwxyz \n")
    assert run.generate("group ", tokens=30, seed=1) != run.generate("group ", tokens=30, seed=2)
    # The likeliest token each time is what the logits of the whole text say.
    raw = ("group " + said).encode()
    likeliest = jnp.argmax(run.logits(raw), axis=-1)
    assert bytes(np.asarray(likeliest[6:-1], np.uint8)) == raw[6:]


def test_a_text_longer_than_the_window_goes_on_from_its_end(run):
    """When the window is full, its last half is read again, and no more is known."""
    context = run.config.data.context
    whole = run.generate("group ", tokens=context + 9, temperature=0)
    full = context - len("group ") - 1  # tokens until the window is full
    end = np.frombuffer(("group " + whole[:full]).encode(), np.uint8)[-context // 2 :]
    writer = Writer(run)
    writer.read(end)
    assert whole[full:] == "".join(writer.write(len(whole) - full, Sampling(0.0)))


def test_a_text_is_read_in_any_pieces_and_its_end_where_it_is_too_long(run):
    text, told = run.encode("a group of groups " * 9), []
    for parts, whole in (([text], True), ([text], False), ([text[:100], text[100:]], False)):
        writer = Writer(run)
        for part in parts:
            writer.read(part, ahead=5, whole=whole)
        assert len(writer.text) + 5 <= run.config.data.context
        told.append("".join(writer.write(5, Sampling(0.0))))
    assert len({*told[:2]}) == 1
    assert all(told)


def test_a_text_ends_before_a_stop_string_and_no_part_of_it_is_said(run):
    whole = run.generate("group ", tokens=40, temperature=0)
    for stop in (whole[9:12], whole[20:21], whole[:3]):
        pieces = [*run.stream("group ", tokens=40, temperature=0, stop=["QQ", stop])]
        assert "".join(pieces) == whole[: whole.index(stop)]
    # What only begins like one is said.
    unlike = whole[5:8] + "Q"
    assert run.generate("group ", tokens=40, temperature=0, stop=[unlike]) == whole


def test_logits_are_of_a_text_or_of_tokens(run):
    mark = run.tokenizer.mark
    tokens = np.array([mark, *TEXT.encode()])
    np.testing.assert_array_equal(run.logits(TEXT), run.logits(tokens))
    both = run.logits([tokens, tokens[::-1]])
    assert both.shape == (2, len(tokens), run.tokenizer.vocab)
    np.testing.assert_allclose(both[0], run.logits(TEXT), atol=1e-5)


def test_the_loss_of_the_held_out_text_is_that_of_training(run, home):
    stream = run.data().validation.tokens  # all of it: also less than a window at its end
    assert stream[0] == run.tokenizer.mark
    loss, final = run.loss(bytes(stream[1:].tolist())), read_rows(home)[-1]
    assert loss.nats_per_token == pytest.approx(final["final/loss"], abs=1e-5)
    assert loss.bits_per_byte == pytest.approx(final["final/bits_per_byte"], abs=1e-5)


def test_the_loss_of_a_short_text_is_of_its_own_tokens(run):
    log_likely = jax.nn.log_softmax(run.logits("group")[:-1])
    nats = -np.mean([log_likely[t, token] for t, token in enumerate(b"group")])
    assert run.loss("group").nats_per_token == pytest.approx(nats, abs=1e-5)


def test_activations_are_the_stream_by_stage_and_round(run):
    found, model = run.activations(TEXT), run.decoder
    rounds = [(f"core 1, round {turn}", f"round {turn}") for turn in (1, 2)]
    assert [*found] == ["embedding", "prelude 1", *itertools.chain(*rounds), "coda 1"]
    batch = Batch(jnp.array([[run.tokenizer.mark, *TEXT.encode()]]))
    stream = model.stream(run.params, model.embed(run.params, batch))[0]
    np.testing.assert_allclose(found["coda 1"], stream[0], atol=1e-5)
    np.testing.assert_array_equal(found["embedding"], run.params["embed"][batch.inputs[0]])
    # What the loop keeps of a round is not what its stage gives out.
    assert not np.allclose(found["core 1, round 1"], found["round 1"])


def test_silencing_nothing_changes_nothing(run):
    np.testing.assert_array_equal(run.silence().logits(TEXT), run.logits(TEXT))


def test_silencing_every_channel_is_the_model_without_messages(run):
    groups = range(run.decoder.shape.groups)
    silent = run.silence(channels=[*itertools.product(groups, groups)])
    without = dataclasses.replace(run, params=silenced(run.decoder, run.params, "messages"))
    np.testing.assert_array_equal(silent.logits(TEXT), without.logits(TEXT))
    assert silent.loss(TEXT).nats_per_token != run.loss(TEXT).nats_per_token
    assert silent.generate("group ", tokens=5) == without.generate("group ", tokens=5)


def test_silencing_a_group_is_silencing_its_channels(run):
    others = [(listener, 2) for listener in range(run.decoder.shape.groups) if listener != 2]
    silent = run.silence(groups=[2])
    np.testing.assert_array_equal(silent.logits(TEXT), run.silence(channels=others).logits(TEXT))
    assert not np.array_equal(silent.logits(TEXT), run.logits(TEXT))
    with pytest.raises(ValueError, match="group 4: the model has groups 0 to 3"):
        run.silence(groups=[4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, "tokens=0: must be 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"seed": -1}, "seed=-1: must be from 0"),
        ({"top_k": -1}, "top_k=-1: must be 0, for all, or more"),
        ({"min_p": 1.5}, "min_p=1.5: must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be 0 or more"),
        ({"stop": ["a", ""]}, "must be strings that are not empty"),
        ({"rounds": 0}, "rounds=0: must be 1 or more"),
    ],
)
def test_values_out_of_range_are_refused(run, given, message):
    with pytest.raises(UserError, match=message):
        run.generate("a", **given)


def test_an_empty_text_has_no_loss(run):
    with pytest.raises(UserError, match="text='': must have a token or more"):
        run.loss("")


@pytest.mark.parametrize("given", [b"\xff", "\udcff"])
def test_byte_pairs_are_of_utf_8(run, given):
    pairs = dataclasses.replace(run, tokenizer=BPE(BPE.train(["a"], 258)))
    with pytest.raises(UserError, match=r"text=.* must be UTF-8, as data.tokenizer='bytes'"):
        pairs.encode(given)


def test_a_model_of_a_task_reads_tokens_and_no_text(tiny, tmp_path):
    tiny.data.task = "parity"
    symbols = Symbols(TASKS["parity"].symbols)
    model = make_model(tiny, symbols.vocab)
    params = jax.jit(model.init)(jax.random.key(0))
    of_task = Trained(tmp_path, tiny, model, params, symbols, 0, None, {})
    assert of_task.logits([0, 1, 0]).shape == (3, symbols.vocab)
    with pytest.raises(UserError, match="reads no text"):
        of_task.generate("0 1")


def test_what_a_directory_names_is_read_only_where_its_user_says_so(run, home, text, tmp_path):
    """A copy of a run of someone else, whose config names what is this user's."""
    config = json.loads((home / "config.json").read_text())
    theirs = copy_of(home, tmp_path, {"data": {**config["data"], "cache_dir": str(tmp_path / "x")}})
    opened = ngc_jax.load(theirs)
    assert [opened.config.data[name] for name in OUTSIDE] == [""] * len(OUTSIDE)
    with pytest.raises(UserError) as refused:
        opened.data()
    for said in (f"data.path='{text}'", "--data_path=", "--tfds_dir=", "--trust"):
        assert said in str(refused.value)
    typed = ngc_jax.load(theirs, data_path=str(text))
    typed.config.data.cache_dir = run.config.data.cache_dir  # not this user's
    assert typed.data().fingerprint == run.data().fingerprint
    (tmp_path / "other").write_text(TEXT * 100)
    other = ngc_jax.load(theirs, data_path=str(tmp_path / "other"))
    other.config.data.cache_dir = run.config.data.cache_dir
    with pytest.raises(UserError, match="this is not what"):
        other.data()
    assert not (tmp_path / "x").exists()
    assert ngc_jax.load(theirs, trust=True).data().fingerprint == run.data().fingerprint
    assert (tmp_path / "x").exists()
    for place in ("tfds_dir", "validation_path"):
        with pytest.raises(UserError, match=f"{place}='/a': must not be given, since the run has"):
            ngc_jax.load(theirs, **{place: "/a"})


def test_a_held_out_text_of_ones_own_is_where_its_user_says():
    places = dict.fromkeys(OUTSIDE, "") | {"path": "a", "validation_path": "b"}
    stored = base().data
    stored.update(places)
    for given, wants in (({}, ""), ({"path": "c"}, "and --validation_path=FILE")):
        data = stored.copy_and_resolve_references()
        assert wants in withhold(data, **given)
        assert data.validation_path == ""
    data = stored.copy_and_resolve_references()
    assert withhold(data, path="c", validation_path="d") == ""
    assert (data.path, data.validation_path) == ("c", "d")


def copy_of(home, tmp_path, sections):
    """A copy of a run with other sections in its config."""
    theirs = tmp_path / "theirs"
    shutil.copytree(home, theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, **sections}))
    return theirs


def test_a_set_that_a_directory_names_runs_no_code(run, home, tmp_path, monkeypatch):
    """The config names a TFDS set whose description names a module in the current folder."""
    config = json.loads((home / "config.json").read_text())
    folder = tmp_path / "sets" / "poems" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text('{"pythonClassName": "stranger.X"}')
    info = {"name": "poems", "version": "1.0.0", "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "stranger.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    fields = {"path": "", "tfds_name": "poems", "tfds_data_dir": str(tmp_path / "sets")}
    theirs = copy_of(home, tmp_path, {"data": {**config["data"], **fields}})
    shutil.rmtree(theirs / "checkpoints" / "25")
    with pytest.raises(UserError, match=r"data.tfds_name was '', is 'poems'"):
        ngc_jax.load(theirs)
    monkeypatch.setattr("ngc_jax.training.load.comparable", lambda config: {})  # as if all agreed
    with pytest.raises(
        UserError, match=r"names the text data.tfds_name='poems', which is not read"
    ):
        ngc_jax.load(theirs).data()
    for said in ({"tfds_dir": str(tmp_path / "sets")}, {"trust": True}):
        with pytest.raises(UserError, match=r"names code to import, 'stranger.X'"):
            ngc_jax.load(theirs, **said).data()
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(theirs)
    fields = {"path": "", "tfds_name": "huggingface:poems"}
    network = ngc_jax.load(
        copy_of(home, tmp_path, {"data": {**config["data"], **fields}}), trust=True
    )
    with pytest.raises(UserError, match="is not prepared"):
        network.data()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("", "cannot be read"),
        ("[" * 10**5, "nested too deeply"),
        ("3", "cannot be read"),
        ('{"model": 3}', "cannot be read"),
        ('{"seed": {"a": 1}}', "cannot be read"),
        ('{"model": {"width": [1]}}', "cannot be read"),
        ('{"model": {"width": 1e999}}', "is out of range"),
        ('{"model": {"width": NaN}}', "is out of range"),
        ('{"model": {"width": 10000000000000000}}', "is out of range"),
        ('{"model": {"prelude": 10000}}', "model.prelude=10000: must be from 0 to 1,000"),
        ('{"model": {"width": "16"}}', "cannot be read"),
        ('{"model": {"width": 0}}', "model.width=0: must be 1 or more"),
        ('{"model": {"widht": 16}}', 'Did you mean "model.width"'),
        ('{"modle": {"width": 16}}', "there is no field 'modle'"),
        ('{"data": {"tokenizer": "x/../../escaped/tok"}}', "data.tokenizer='x/../../escaped/tok'"),
        ('{"data": {"task": "parity", "low": 0}}', "data.low=0: must be 1 or more"),
        (json.dumps({"data": {"path": "x" * 2**20}}), "more than the 1048576 allowed"),
    ],
)
def test_a_stored_config_is_checked_as_a_typed_one(tmp_path, stored, message):
    (tmp_path / "config.json").write_text(stored)
    with pytest.raises(UserError, match=re.escape(message)):
        ngc_jax.load(tmp_path)


def test_a_stored_config_that_is_a_link_or_a_pipe_is_not_followed(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "config.json").symlink_to("real.json")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        ngc_jax.load(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config.json is no file"):
        ngc_jax.load(tmp_path)


def test_a_stopped_run_is_saved_and_said(tiny, tmp_path, monkeypatch):
    from test_train import stop_when_shown

    tiny.stability.every = 0
    stop_when_shown(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt, match="is saved, and the same call continues"):
        ngc_jax.train(tiny, tmp_path / "run")
    assert ngc_jax.load(tmp_path / "run").step == 7


OWN_RULE = """
from ngc_jax.config import base
from ngc_jax.core.rules import RULES
from ngc_jax.core.rules.signal import Broadcast


class Mine(Broadcast):
    pass


RULES["mine"] = Mine()


def get_config():
    config = base()
    config.update_from_flattened_dict({fields})
    return config
"""


@pytest.mark.slow
def test_a_rule_of_ones_own_is_trained_and_sampled_by_its_file(
    text, cache, tmp_path, monkeypatch, capsys
):
    fields = {**WHOLE, "train.steps": 4, "train.warmup_steps": 1, "stability.every": 0}
    fields |= {"data.path": str(text), "data.cache_dir": str(cache), "model.rule": "mine"}
    own, home = tmp_path / "own.py", tmp_path / "run"
    own.write_text(OWN_RULE.replace("{fields}", repr(fields)))
    # also without a stray warning
    script = f"import ngc_jax\nrun = ngc_jax.train({str(own)!r}, {str(home)!r})\n"
    script += "run.loss('a group'), run.activations('a')\n"
    script += "run.silence(groups=[0]).generate('a', tokens=2)"
    done = python("-W", "error", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    missing = "model.rule='mine', which is not registered here: .* --extend=FILE.py"
    with pytest.raises(UserError, match=missing):
        ngc_jax.load(home)
    monkeypatch.setattr("sys.argv", ["sample", f"--workdir={home}", "--prompt=a g", "--tokens=4"])
    with pytest.raises(UserError, match=missing):
        sample.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, f"--extend={own}"])
    monkeypatch.setitem(RULES, "mine", None)  # removes the file's entry afterwards
    sample.main()
    assert capsys.readouterr().out.startswith("a g")
    assert ngc_jax.train(str(own), home).step == 4, "a config's path will do"
    monkeypatch.setattr("sys.argv", [*sys.argv, "--extend=nothing.py"])
    with pytest.raises(UserError, match=r"--extend=nothing.py cannot be read: .*No such file"):
        sample.main()
