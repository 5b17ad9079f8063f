"""What `mkdocs.yml` makes a site of: the repository's pages by their own paths, so that links hold.

And pages of the public names, from their docstrings. Not for: the theme, or the order of pages.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "LICENSE", "CITATION.cff", "docs/**/*.*", "experiments/**/*.md")
PAGES += ("experiments/**/*.png", "launch.py", "configs/*.py", "experiments/*.py")
API = {
    "python": ("A trained model", ["ngc_jax.training.load"]),
    "layers": ("Layers", ["ngc_jax.nn.layers", "ngc_jax.nn.synapse", "ngc_jax.nn.params"]),
    "rules": ("Rules", ["ngc_jax.core.rules.base", "ngc_jax.core.rules.signal"]),
    "dynamics": ("Dynamics of any map", ["ngc_jax.dynamics.lyapunov", "ngc_jax.dynamics.measures"]),
}


def on_files(files: Files, config: Any) -> Files:
    """The files of the site; called by MkDocs."""
    found = Files([file for file in files if not file.abs_src_path or _foreign(file.abs_src_path)])
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        found.append(File.generated(config, name, abs_src_path=str(path)))
    for notebook in ROOT.glob("docs/*.ipynb"):
        text, more = MarkdownExporter().from_filename(str(notebook))
        pictures = {f"docs/{name}": raw for name, raw in more["outputs"].items()}
        for name, content in {f"docs/{notebook.stem}.md": text, **pictures}.items():
            found.append(File.generated(config, name, content=content))
    for name, (title, modules) in API.items():
        text = "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
        found.append(File.generated(config, f"api/{name}.md", content=text))
    return found


def _foreign(path: str) -> bool:
    return not Path(path).is_relative_to(ROOT)
