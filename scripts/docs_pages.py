"""What mkdocs adds to docs/ when it builds the site (`make docs`): pages made of the code, so that they cannot drift.

index.md, changelog.md, contributing.md   README.md, CHANGELOG.md and CONTRIBUTING.md
reference/commands.md                     every command, from click
reference/python.md, modules.md           the public names, and the modules that the docs name, from their docstrings
reference/server.md                       the routes, from the OpenAPI document
"""

import json
import posixpath
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hookmap
import hookmap.errors
from hookmap.capture.options import CaptureOptions, options_of
from hookmap.cli.main import main

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
}
OBJECTS = (
    "model.HookedModel",
    "stores.interface.Store",
    "capture.estimate.Estimate",
    "analysis.grid.Grid",
    "services.ray.model.RayModel",
    "services.nnsight_server.RemoteModel",
)
"""what the public functions return, beside the public names"""
MODULES = {
    "Maps without torch": ("light",),
    "Inputs": ("datasets", "datasets.records", "datasets.pairs", "datasets.ioi", "demo", "activations"),
    "Looking and changing": (
        "capture.interventions.documents",
        "capture.interventions.functions",
        "analysis.metrics",
        "analysis.gradients",
        "analysis.patching",
        "analysis.lens",
        "analysis.attribution",
        "analysis.charts",
        "analysis.effect_charts",
        "analysis.steering",
        "analysis.gguf",
    ),
    "Over many texts": (
        "analysis.reductions.statistics",
        "analysis.outliers",
        "analysis.examples.result",
        "analysis.examples.page",
        "analysis.dictionaries.dictionary",
        "analysis.dictionaries.loading",
        "analysis.dictionaries.saving",
        "analysis.dictionaries.evaluating",
    ),
    "On vLLM": ("vllm.model", "vllm.discover"),
    "Sharing": ("analysis.hub",),
    "Stores": ("stores.folder", "stores.memory", "stores.background", "stores.manifest", "stores.copying"),
    "Probes": ("analysis.probes", "analysis.probes.run", "analysis.probes.saved"),
    "Evaluation": ("evaluation.gsm8k", "evaluation.gsm8k.run", "evaluation.gsm8k.task", "evaluation.gsm8k.results"),
    "Experiments": ("evaluation.experiments", "evaluation.experiments.document", "evaluation.experiments.run"),
}
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)([^)]*)\)")


def on_files(files: "Files", *, config: "MkDocsConfig") -> "Files":
    """Adds the pages that are in no file of docs/."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in FROM_ROOT.items()}
    pages |= {
        "reference/commands.md": commands_page(),
        "reference/python.md": python_page(),
        "reference/modules.md": modules_page(),
        "reference/server.md": server_page(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Turns links that hold in the repository into links that hold in the site."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    if page.file.src_uri == "index.md":  # the picture has the whole width
        page.meta["hide"] = ["navigation", "toc"]
    folder = "" if page.file.src_uri in FROM_ROOT.values() else "docs"
    return _LINK.sub(lambda link: _moved(link, folder), markdown)


def _moved(link: re.Match[str], folder: str) -> str:
    """A link to a file that is not in the site becomes its text; mkdocs refuses one that leads nowhere."""
    text, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(folder, target))
    if not (ROOT / path).exists():
        return link[0]
    inside = FROM_ROOT.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    return f"[{text}]({inside}{anchor})" if inside else text


def commands_page() -> str:
    """What `--help` says of every command, those of groups after their group."""
    intro = "# Every command\n\nWhat `--help` says. What each writes, and where to: [the command line](../cli.md).\n"
    context = click.Context(main, info_name="hookmap", terminal_width=100, **main.context_settings)
    return "\n".join([intro, *_helps(main, context)])


def _helps(command: click.Command, context: click.Context) -> list[str]:
    texts = [f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            one = command.get_command(context, name)
            if one is not None and not one.hidden:
                texts += _helps(one, click.Context(one, parent=context, info_name=name, **one.context_settings))
    return texts


def python_page() -> str:
    """The functions, the classes that they give, the errors."""
    names = sorted((name for name in hookmap.__all__ if name != "__version__"), key=lambda name: name[0].isupper())
    errors = [name for name in names if hasattr(hookmap.errors, name)]
    shown = [name for name in names if name not in errors] + [*OBJECTS] + errors
    intro = "# Python\n\nWhat `import hookmap` offers, what its functions return, and the errors that they raise.\n"
    return "\n".join([intro, *(_entry(f"hookmap.{name}") for name in shown), _options()])


def _options() -> str:
    """The options of a capture, which its signature takes as one."""
    rows = [
        f"| `{name}` | `{option.default!r}` | {str(option).replace('|', chr(92) + '|')} |"
        for name, (_, option) in options_of(CaptureOptions).items()
    ]
    return "\n".join(["## What a capture takes\n", "| option | default | meaning |", "|---|---|---|", *rows, ""])


def modules_page() -> str:
    """The modules that the docs name, each with its public names."""
    intro = (
        "# Python, by module\n\nWhat is imported from a module of its own. Everything else is in [Python](python.md).\n"
    )
    parts = [
        f"## {title}\n\n" + "\n".join(_entry(f"hookmap.{name}", 3) for name in names)
        for title, names in MODULES.items()
    ]
    return "\n".join([intro, *parts])


def _entry(name: str, level: int = 2) -> str:
    return f"::: {name}\n    options: {{heading_level: {level}, show_root_full_path: true, toc_label: {name}}}\n"


def openapi() -> dict[str, Any]:
    """The server's OpenAPI document, of a server without a model."""
    from hookmap.services.server.app import make_app
    from hookmap.services.server.models import Models
    from hookmap.services.server.sessions import Sessions
    from hookmap.services.server.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder))
        sessions = Sessions(settings.root, settings.total_bytes, settings.max_age)
        try:
            return make_app(settings, Models(settings), sessions).openapi()
        finally:
            sessions.close()


def server_page() -> str:
    """The routes of the server, what each takes, and the fields of the bodies."""
    document = openapi()
    lines = [
        "# The server's routes",
        "",
        "A running server has the whole document at `/openapi.json`. What the fields mean: [the server](../server.md).",
        "",
    ]
    lines += ["| route | takes | |", "|---|---|---|"]
    bodies: dict[str, None] = {}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            body = _body(route)
            bodies |= dict.fromkeys(body)
            takes = [f"`{p['name']}`" for p in route.get("parameters", ())] + [
                f"[{name}](#{name.lower()})" for name in body
            ]
            lines.append(f"| `{method.upper()} {path}` | {', '.join(takes)} | {_cell(route.get('description', ''))} |")
    schemas = document["components"]["schemas"]
    return "\n".join([*lines, *(_schema(name, schemas[name]) for name in _reached(list(bodies), schemas)), ""])


def _reached(names: list[str], schemas: dict[str, Any]) -> list[str]:
    """These schemas and what their fields are of, each once."""
    for name in names:  # grows while it is read
        names += [one for one in _named(schemas[name]) if one not in names]
    return names


def _named(schema: dict[str, Any]) -> list[str]:
    """The schemas that this one refers to."""
    return list(dict.fromkeys(re.findall(r'#/components/schemas/([^"]+)', json.dumps(schema))))


def _body(route: dict[str, Any]) -> list[str]:
    content = route.get("requestBody", {}).get("content", {})
    return [name for media in content.values() for name in _named(media["schema"])]


def _schema(name: str, schema: dict[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = [
        f"| `{field}` | {_cell(_type(of))} | {'needed' if field in needed else _default(of)} |"
        for field, of in schema["properties"].items()
    ]
    return "\n".join(["", f"## {name}", "", "| field | type | default |", "|---|---|---|", *rows])


def _type(of: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in of:
        (name,) = _named(of)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in of:
        return " or ".join(dict.fromkeys(_type(one) for one in of["anyOf"]))
    if "enum" in of or "const" in of:
        return ", ".join(f"`{value}`" for value in of.get("enum", [of.get("const")]))
    kind = str(of.get("type", "anything"))
    return f"list of {_type(of.get('items', {}))}" if kind == "array" else kind


def _default(of: dict[str, Any]) -> str:
    return f"`{of['default']}`" if of.get("default") is not None else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
