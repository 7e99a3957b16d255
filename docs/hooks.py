"""What MkDocs fills in from code: the command line's help, methods. (Tables are written by benchmarks/tables.py.)"""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated where its mark is."""
    for mark, make in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def command_line() -> str:
    """Every command with its arguments and options, from the code."""
    import typer.main

    from flatquant.cli import app

    group: Any = typer.main.get_command(app)
    out = []
    for name, command in group.commands.items():
        out += [f"## flatquant {name}", "", command.help or "", "", "| | |", "|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            names = ", ".join(f"`{opt}`" for opt in parameter.opts if parameter.param_type_name == "option")
            default = parameter.default
            text = str(getattr(parameter, "help", None) or "")
            if isinstance(default, int | float | str) and not isinstance(default, bool):
                text += f" Default: `{default}`."
            argument = f"`{parameter.metavar or str(parameter.name).upper()}`"
            out.append(f"| {names or argument} | {text.replace('|', '&#124;')} |")
        out.append("")
    return "\n".join(out)


def methods_table() -> str:
    """The rows of `flatquant methods`."""
    from flatquant.methods import table

    rows = table()
    columns = [column for column in rows[0] if column not in ("scheme", "where")]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([f"`{row['method']}`", *(row[column] for column in columns[1:-1]), f"{row['online']:.1%}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods_sources() -> str:
    """Every method's module docstring, which names the paper and what differs from it."""
    import sys

    from flatquant.recipes import RECIPES

    out = []
    for name, function in sorted(RECIPES.items()):
        title, _, body = (sys.modules[function.__module__].__doc__ or "").strip().partition("\n")
        out += [f"### {name}", "", title, "", body.strip(), ""]
    return "\n".join(out)


MARKS = {
    "<!-- command line -->": command_line,
    "<!-- methods: table -->": methods_table,
    "<!-- methods: sources -->": methods_sources,
}
