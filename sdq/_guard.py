"""Tell when somebody else's ``export``, ``fl`` or ``hw`` hides ours."""

import importlib.util
from pathlib import Path

OURS = ("export", "fl", "hw")


def foreign_module() -> str | None:
    """Return a message naming the file that hides one of our packages, or None."""
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = importlib.util.find_spec(name)
        # a folder without __init__.py has no origin, and hides a package installed in place
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        places = [spec.origin] if spec is not None and spec.origin else folders
        origin = Path(places[0]).resolve() if places else None
        if origin != home / name / "__init__.py":
            what = f"{origin} hides it" if origin else "it is not installed"
            return (
                f"sdq: package {name!r} must be {home / name}, but {what}; rename that file, run "
                "from another folder, or take its folder off PYTHONPATH"
            )
    return None
