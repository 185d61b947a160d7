"""A verb with groups of options is one that takes the options themselves."""

import inspect
from dataclasses import dataclass

from sdq.cli.command import flat


@dataclass(frozen=True)
class Size:
    width: int = 1
    height: int = 2


def test_a_group_is_made_of_its_options() -> None:
    seen = []

    def verb(name: str, size: Size = Size(height=5), quiet: bool = False) -> None:
        """Do it."""
        seen.append((name, size, quiet))

    found = flat(verb)
    parameters = inspect.signature(found).parameters
    assert [*parameters] == ["name", "width", "height", "quiet"]
    assert parameters["name"].default is inspect.Parameter.empty
    assert [parameters[x].default for x in ("width", "height", "quiet")] == [1, 5, False]
    assert found.__annotations__["height"] is int
    assert found.__doc__ == "Do it."
    found(name="a", width=7, height=8, quiet=True)
    assert seen == [("a", Size(7, 8), True)]
