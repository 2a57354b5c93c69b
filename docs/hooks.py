"""Hooks of the documentation build: notebooks, help texts of the command line, checks of the pages.

- The notebooks of ``notebooks/`` become pages without a copy in ``docs/``.
- A line ``<!-- help: ptq -->`` is replaced by what ``quantflow ptq --help`` prints.
- Roles such as ``:func:`` in docstrings are removed, since the pages are Markdown.
- The loaders of MathJax and Mermaid are removed from notebooks, which use neither.
- A public name without an entry in ``reference/`` is a warning, and so is a script, style sheet or image that a page would
  load from another host. ``mkdocs build --strict`` fails on warnings.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks.quantflow")
ROOT = Path(__file__).resolve().parent.parent
# Packages whose ``__all__`` is public.
PUBLIC = (
    "quantflow",
    "quantflow.analysis",
    "quantflow.evaluation",
    "quantflow.mixed_precision",
    "quantflow.observers",
    "quantflow.ptq",
    "quantflow.training",
    "quantizers",
)
_HELP = re.compile(r"^<!-- help: ?(\w*) ?-->$", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(?=<code>|`)")
_LOADERS = re.compile(r"<script\b(?:(?!</script>).)*?(?:mathjax|mermaid)(?:(?!</script>).)*?</script>", re.I | re.S)
_LOADED = re.compile(
    r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]*[^>]*>"
    r"|\bimport\(?\s*[\"']https?:[^\"']*",
    re.I,
)
_NOT_LOADED = re.compile(r"rel=[\"']?(?:canonical|alternate|prev|next)", re.I)


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the help texts."""
    return _HELP.sub(lambda found: f"```text\n{_help(found[1])}\n```", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove Sphinx roles, and scripts of notebooks that would load others."""
    return _LOADERS.sub("", _ROLE.sub("", html))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of what the page would load from another host."""
    for tag in _LOADED.finditer(output):
        if not _NOT_LOADED.search(tag[0]):
            LOG.warning("%s loads from another host: %s", page.file.src_uri, tag[0][:160])
    return output


def on_post_build(config: Any) -> None:
    """Warn of public names without an entry in the reference."""
    pages = "\n".join(path.read_text() for path in (Path(config["docs_dir"]) / "reference").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    for package in PUBLIC:
        for name in _names_in_all(ROOT.joinpath(*package.split("."), "__init__.py")):
            if name not in documented:
                LOG.warning("%s.%s has no entry in docs/reference/", package, name)


def _names_in_all(path: Path) -> list[str]:
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in statement.targets):
            return ast.literal_eval(statement.value)
    return []


def _help(name: str) -> str:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from click import Context

    from quantflow.cli import main

    group = Context(main, info_name="quantflow", terminal_width=80, max_content_width=80)
    if not name:
        return main.get_help(group)
    command = main.get_command(group, name)
    assert command is not None, name
    return command.get_help(Context(command, info_name=name, parent=group, terminal_width=80, max_content_width=80))
