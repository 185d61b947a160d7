"""A verb as typer has it, with help for its arguments."""

import typing
from typing import Any

import typer.models
from typer.core import TyperArgument, TyperCommand


class Verb(TyperCommand):
    """A command whose arguments keep their help.

    From 8.5 on click gives arguments a help of its own, which overwrites typer's with nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hints = typing.get_type_hints(self.callback, include_extras=True)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.help is None:
                parameter.help = _help(hints.get(parameter.name or ""))


def _help(hint: Any) -> str | None:
    for described in typing.get_args(hint)[1:]:
        if isinstance(described, typer.models.ArgumentInfo):
            return described.help
    return None
