"""Write docs/cli.md and docs/recipe.md from the command line's and the recipe's own definitions."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from deadpan.cli.main import app
from deadpan.config.keys import Key, keys
from deadpan.config.loader import inline_yaml

NOTICE = "<!-- Written by tools/generate_docs.py: change the code, then run `make docs`. -->"


def cli_reference() -> str:
    root = typer.main.get_command(app)
    # So wide that no line is wrapped; subcommands inherit it.
    context = typer.Context(
        root, info_name="deadpan", terminal_width=10_000, **root.context_settings
    )
    blocks = [NOTICE, "# The command line", *_command(root, context, 2)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _command(command: Any, context: typer.Context, level: int) -> Iterator[str]:
    """Yield the blocks of text about a command and, below it, about its subcommands."""
    yield "#" * level + f" `{context.command_path}`"
    yield _prose(command.help or "")
    yield f"```text\n{command.get_usage(context)}\n```"
    records = [
        parameter.get_help_record(context)
        for parameter in command.get_params(context)
        if parameter.name != "help"
    ]
    yield "\n".join(f"- `{usage}`: {_prose(meaning)}" for usage, meaning in filter(None, records))
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            child_context = typer.Context(child, parent=context, info_name=name)
            yield from _command(child, child_context, level + 1)


def _prose(text: str) -> str:
    # Markdown would take a word such as `<image>` for HTML and show nothing.
    return text.strip().replace("<", r"\<")


def recipe_reference() -> str:
    lines = [
        NOTICE,
        "",
        "# Recipe keys",
        "",
        "A recipe is a YAML file that holds only what differs from these defaults. On the command",
        "line, `deadpan train RECIPE KEY=VALUE` changes a key, dotted: `optimizer.lr=1e-4`.",
        "Relative paths start at the current directory.",
        "",
        *_table([key for key in keys().values() if "." not in key.name and not key.is_section]),
    ]
    for section in [key for key in keys().values() if key.is_section]:
        inside = [key for key in keys().values() if key.name.startswith(f"{section.name}.")]
        lines += ["", f"## `{section.name}`", "", section.description, "", *_table(inside)]
    return "\n".join(lines) + "\n"


def _table(rows: list[Key]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key in rows:
        default = "required" if key.required else f"`{inline_yaml(key.default)}`"
        yield f"| `{key.name}` | {key.expected} | {default} | {key.description} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether they are current")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    stale = []
    for name, text in {"cli.md": cli_reference(), "recipe.md": recipe_reference()}.items():
        file = options.folder / name
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(file))
        if not options.check:
            options.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    if options.check and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
