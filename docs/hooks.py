"""What MkDocs is to fill in: the command line's help. (Tables are written by benchmarks/tables.py.)"""

from __future__ import annotations

from typing import Any

MARK = "<!-- command line -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands where the mark is."""
    return markdown.replace(MARK, command_line()) if MARK in markdown else markdown


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
