"""Rules of the house that a reader relies on."""

import ast
import configparser
import re
import subprocess
import sys

import pytest
from conftest import ROOT, python
from packaging.requirements import Requirement

PACKAGE = sorted((ROOT / "ngc_jax").rglob("*.py"))
STUDIES = sorted(p for room in ("experiments", "benchmarks") for p in (ROOT / room).glob("*.py"))


@pytest.mark.slow
def test_tensorflow_is_never_imported(tiny_flags, tmp_path):
    # A module of that name that fails stands in its place, so that an installed TensorFlow could
    # not hide an import.
    (tmp_path / "tensorflow.py").write_text("raise SystemError('tensorflow was imported')\n")
    script = (
        "import sys; sys.argv = ['launch.py', *sys.argv[1:]]\n"
        "import runpy, atexit\n"
        "atexit.register(lambda: print('tensorflow' in sys.modules))\n"
        "runpy.run_path('launch.py', run_name='__main__')\n"
    )
    flags = [
        *tiny_flags,
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = python("-c", script, *flags, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def rooms():
    """The table of docs/architecture.md: room -> the rooms that it may import from."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/?` \| [^|]+ \| ([^|]+) \|$", text, re.M)
    return {room: {name.strip() for name in allowed.split(",")} for room, allowed in rows}


def imports(path):
    """The modules of this repository that a file imports, dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(path):
    """The folder or file of ngc_jax that a file is in."""
    return path.relative_to(ROOT / "ngc_jax").parts[0].removesuffix(".py")


def test_a_room_imports_from_lower_rooms_only():
    table = rooms()
    assert set(table) == {room_of(path) for path in PACKAGE} - {"__init__"}
    assert len(table) <= 16
    order = list(table)  # from the highest down
    for room, allowed in table.items():
        assert allowed - {"nothing"} <= set(order[order.index(room) + 1 :]), room
    upwards = set()
    for path in PACKAGE:
        room = room_of(path)
        names = {m.split(".")[1] for m in imports(path) if m.startswith("ngc_jax.")}
        seen = names & set(table) - {room}
        if room != "__init__":
            upwards |= {(room, other) for other in seen - table[room]}
    assert upwards == {("config", "training")}  # its settings, which are tables


def test_the_drawing_of_the_rooms_shows_their_table():
    table = {room: allowed - {"nothing"} for room, allowed in rooms().items()}
    arrows = {(room, other) for room, allowed in table.items() for other in allowed}
    implied = {(room, last) for room, other in arrows for last in table[other]}
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"^ +(\w+)(?:\[.*\])? --> (\w+)$", text, re.MULTILINE)
    assert sorted(drawn) == sorted(arrows - implied)


def test_the_config_imports_settings_and_none_of_their_readers():
    told = {m for m in imports(ROOT / "ngc_jax" / "config.py") if m.startswith("ngc_jax.")}
    of_training = {m for m in told if m.startswith("ngc_jax.training")}
    assert all(m.startswith("ngc_jax.training.settings") for m in of_training)
    assert not any("decoder" in m or "loop" in m for m in told)


def test_files_import_each_other_in_no_circle():
    files = {f"{p.relative_to(ROOT).with_suffix('')}".replace("/", "."): p for p in PACKAGE}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    lean = {}  # what is imported when a module is: not inside functions
    for name, path in files.items():
        nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)]
        told = {n.module for n in nodes} | {f"{n.module}.{a.name}" for n in nodes for a in n.names}
        lean[name] = (told & set(files)) - {name}
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, [*under_way, name]
        if name not in done:
            under_way.append(name)
            for other in lean[name]:
                if not name.startswith(other + "."):  # a package is there before its modules
                    visit(other)
            done.add(under_way.pop())

    for name in files:
        if files[name].name != "__init__.py":
            visit(name)


def test_studies_and_timings_do_not_import_each_other():
    for folder, other in (("experiments", "benchmarks"), ("benchmarks", "experiments")):
        for path in (ROOT / folder).glob("*.py"):
            assert not any(m.split(".")[0] == other for m in imports(path)), path


def test_flax_is_imported_where_parameters_are_held_only():
    users = {p.relative_to(ROOT).as_posix() for p in PACKAGE if "flax.linen" in p.read_text()}
    held = {f"ngc_jax/nn/{name}.py" for name in ("layers", "params", "recurrent", "synapse")}
    assert users == held


def test_nobody_reads_what_a_parameter_is_from_its_name():
    # A digest, and the tree that a checkpoint is bound to, are of names and say nothing else.
    users = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE
        if re.search(r"_with_path|keystr|DictKey", path.read_text())
    }
    assert users == {"ngc_jax/runtime/checkpoint.py"}


def test_files_can_be_read_in_one_sitting():
    for path in [*PACKAGE, *STUDIES]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path
        assert max(map(len, lines), default=0) <= 100, path
    assert len((ROOT / "launch.py").read_text().splitlines()) <= 80
    # The house itself, and the room of pretrained models.
    others = [path for path in PACKAGE if room_of(path) == "convert"]
    for paths, most in ((set(PACKAGE) - set(others), 17_519), (others, 2_796)):
        assert sum(len(path.read_text().splitlines()) for path in paths) <= most


def test_a_file_says_first_what_it_is_for():
    for path in [*PACKAGE, *STUDIES]:
        told = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        assert told, path
        if path in PACKAGE and path.stem != "__init__":
            assert "For: " in told, path
            assert "Not for: " in told, path


def test_links_between_pages_lead_somewhere():
    def anchors(page):
        heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}

    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
    ]
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`\n]*`|^    [^\n]*$", "", page.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            file, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = page.parent / file if file else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_importing_the_package_is_quiet():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import ngc_jax, ngc_jax.training.loop"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_locked_releases_are_within_bounds_that_are_closed_above():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    apart = {"docs", "trackio", "wandb", "lm_eval"}  # of which CI installs none
    listed = [setup["options"]["install_requires"], *(extras[e] for e in extras if e not in apart)]
    lines = [line for text in listed for line in text.splitlines() if line]
    for asked in (Requirement(line) for e in apart for line in extras[e].split("\n") if line):
        assert {"<"} & {bound.operator for bound in asked.specifier}, f"{asked}: no end"
    lock = (ROOT / ".ci" / "lock.txt").read_text()
    assert "://" not in lock  # a registry's address would be of one place only
    locked = re.findall(r"^([\w-]+)==(\S+)(?: ; .*)? \\\n +--hash=sha256:\w{64}", lock, re.M)
    for asked in map(Requirement, lines):
        if asked.name == "ngc_jax" or asked.extras & {"tpu", "cuda12", "cuda13"}:
            continue  # this package, and jax again
        found = [version for name, version in locked if name == asked.name.replace("_", "-")]
        assert found, f"{asked.name}: run .ci/lock"
        assert all(map(asked.specifier.contains, found)), f"{asked} but {found}: run .ci/lock"
        assert {"<", "=="} & {bound.operator for bound in asked.specifier}, f"{asked}: no end"
