"""MkDocs hooks: pages of the site that are files elsewhere in the repository, and links to them.

Pages link to files of the repository, so that links also work where the repository is browsed. Here
each such file becomes a page: Markdown as it is, notebooks with their outputs, examples as code.
"""

import importlib
import inspect
import json
import posixpath
import re
from pathlib import Path

import griffe
import latex2mathml.converter
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
MARKDOWN = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples/index.md",
}
SHIM = "https://unpkg.com/iframe-worker/shim"  # in the pages of the plugin `offline`
API = re.compile(r"^<!-- public names of ([\w.]+) -->$", re.M)
FENCE = re.compile(r"(^(`{3,}).*?^\2`*$)", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?!\w)", re.S)


def pages():
    """Map each file of the repository that is a page of the site to the page's name in the site."""
    found = {f"docs/{page.name}": page.name for page in (ROOT / "docs").glob("*.*")}
    found |= {f"docs/api/{page.name}": f"api/{page.name}" for page in (ROOT / "docs/api").iterdir()}
    found |= MARKDOWN
    for file in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("examples/*.py")]:
        found[file.relative_to(ROOT).as_posix()] = f"{file.parent.name}/{file.stem}.md"
    return found


# -------------------------------------------------------------------------------------------------
# What MkDocs calls
# -------------------------------------------------------------------------------------------------


def on_files(files, config):
    """Add the pages whose files are not in docs/."""
    for source, page in pages().items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, page, content=as_markdown(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """List the public names of a module, and turn links between files into links between pages."""
    markdown = API.sub(lambda match: public_names(match[1]), markdown)
    targets = pages()
    sources = {page: source for source, page in targets.items()}
    source = sources[page.file.src_uri]

    def relink(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if target not in targets:
            return match[0]
        here = posixpath.dirname(page.file.src_uri)
        anchor = re.sub(r"[^\w#-]", "", (match[2] or "").lower())  # Jupyter's are not lower case
        return f"]({posixpath.relpath(targets[target], here or '.')}{anchor})"

    parts = FENCE.split(markdown)  # text, block, its fence, text, ...
    texts = (LINK.sub(relink, text) for text in parts[::3])
    blocks = [*parts[1::3], ""]
    return "".join(text + block for text, block in zip(texts, blocks, strict=True))


def on_post_page(output, page, config):
    """Replace the script that lets search work from disk, which would come from another host."""
    return output.replace(SHIM, get_relative_url("search_from_disk.js", page.url))


def on_post_template(output_content, template_name, config):
    """Do the same in the page for addresses that do not exist."""
    return output_content.replace(SHIM, "/search_from_disk.js")


# -------------------------------------------------------------------------------------------------
# The API
# -------------------------------------------------------------------------------------------------


def public_names(module_name):
    """Write a table of a module's public names, and a section for each of them."""
    module = importlib.import_module(module_name)
    names = {
        name: getattr(module, name)
        for name in sorted(getattr(module, "__all__", ()), key=str.lower)
    }
    rows = [
        f"| [`{name}`](#{module_name}.{name}) | {_first_sentence(value)} |"
        for name, value in names.items()
    ]
    sections = [_section(module_name, name, value) for name, value in names.items()]
    table = (
        ["| name | summary |", "|---|---|", *rows]
        if rows
        else ["This module has no public names yet."]
    )
    return "\n".join([*table, "", *sections])


def _first_sentence(value):
    text = (inspect.getdoc(value) or "").split("\n\n")[0]
    return " ".join(text.split("::")[0].split()).replace("|", "\\|")


def _section(module_name, name, value):
    if inspect.ismodule(value):
        path = value.__name__
        if (ROOT / "docs/api" / f"{name}.md").exists():
            return f"## {name} {{ #{path} }}\n\nSee [`{path}`]({name}.md).\n"
    else:
        path = f"{value.__module__}.{value.__qualname__}"
    # The name under which it is public; griffe takes `jax_lora.merge` for the file merge.py.
    return f'<a id="{module_name}.{name}"></a>\n\n::: {path}\n'


# -------------------------------------------------------------------------------------------------
# Files as Markdown
# -------------------------------------------------------------------------------------------------


def as_markdown(file):
    """Write a file of the repository as a page."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "\n\n".join(map(_cell, json.loads(text)["cells"]))
    if file.suffix == ".py":
        return f"---\nsearch: {{boost: 0.5}}\n---\n\n# {file.name}\n\n{_fenced(text, 'python')}"
    return text


def _cell(cell):
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return FORMULA.sub(_as_mathml, text)
    return "\n\n".join([_fenced(text, "python"), *map(_output, cell.get("outputs", []))])


def _output(output):
    data = output.get("data", {})
    if "image/png" in data:
        return f"![A figure of this notebook](data:image/png;base64,{data['image/png'].strip()})"
    if "application/vnd.jupyter.widget-view+json" in data:
        return "*An interactive widget: open the notebook in Jupyter to use it.*"
    if "text/html" in data:
        return "".join(data["text/html"])
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return _fenced(text, "{.text .output}") if text else ""


def _as_mathml(match):
    display = "inline" if match["inline"] else "block"
    return latex2mathml.converter.convert(match["inline"] or match["block"], display=display)


def _fenced(text, language):
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


# -------------------------------------------------------------------------------------------------
# Docstrings
# -------------------------------------------------------------------------------------------------


class Examples(griffe.Extension):
    """Let griffe read `Example:` as the section that it calls `Examples:`."""

    def on_object(self, *, obj, **kwargs):
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
            )
