"""A verb as typer has it: with help for its arguments, and options one by one."""

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
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


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that takes the options of its groups one by one, all by name.

    Args:
        verb: whose parameters are options, and groups with an instance for a default.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in inspect.signature(verb).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[name] = kind
        of_group = typing.get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, parameter.KEYWORD_ONLY, annotation=of_group[field.name],
                default=getattr(parameter.default, field.name),
            )
            for field in fields(kind)
        ]  # fmt: skip

    def called(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        verb(**values)

    called.__name__, called.__doc__ = verb.__name__, verb.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called
