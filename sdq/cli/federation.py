"""From the options of ``sdq federate`` to methods with their hyper-parameters."""

import json
from typing import Any

import fl
from fl.method import Method
from sdq import plugins
from sdq.cli.plan import ConfigFile
from sdq.errors import RequestError


def make_methods(names: str, hyper: list[str] | None, file: ConfigFile) -> list[Method]:
    """Return the methods that ``--method`` names, with their hyper-parameters.

    Args:
        names: separated by commas; of a user's file, its path.
        hyper: ``key=value``, or ``METHOD.key=value`` where there are several.
        file: its part ``methods`` has ``{METHOD: {key: value}}``.

    Raises:
        RequestError: an unknown method or hyper-parameter, or one that is given twice.
    """
    references = {plugins.named(name.strip()): name.strip() for name in names.split(",")}
    wanted = list(references)
    if len(wanted) <= names.count(","):
        raise RequestError(f"--method: every method must be named once, got {names!r}")
    given: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name, fields in file.sections.get("methods", {}).items():
        if name not in given or not isinstance(fields, dict):
            raise RequestError(
                f"--config: methods must have an object for each of {', '.join(wanted)}, "
                f"got {name!r}: {fields!r:.60}"
            )
        given[name] |= fields
    for text in hyper or []:
        name, key, value = _hyper(text, wanted)
        if key in given[name]:
            raise RequestError(f"--hyper: {name}.{key} must be given once, got a second")
        given[name][key] = value
    return [fl.method(reference, **given[name]) for name, reference in references.items()]


def _hyper(text: str, methods: list[str]) -> tuple[str, str, Any]:
    """Read ``key=value`` or ``METHOD.key=value``; the value is JSON, or else text."""
    left, equals, right = text.partition("=")
    first, dot, rest = left.partition(".")
    name, key = (first, rest) if dot else (methods[0], left)
    if not (equals and key) or (not dot and len(methods) > 1) or name not in methods:
        form = "KEY=VALUE" if len(methods) == 1 else f"METHOD.KEY=VALUE of {', '.join(methods)}"
        raise RequestError(f"--hyper: must be {form}, got {text!r}")
    try:
        return name, key, json.loads(right)
    except ValueError:
        return name, key, right
