"""What to install where a package of an extra is missing.

The engine alone is ``pip install sdq``; file formats, Flower and DICOM come with extras. Which
package belongs to which is read from the distribution's own metadata.
"""

import importlib.metadata
import re

from sdq.errors import RequestError


def missing_extra(error: ModuleNotFoundError) -> RequestError | None:
    """Return what to say of a failed import; None if the package is of no extra.

    Args:
        error: of the import.
    """
    package = (error.name or "").partition(".")[0]
    extras = [e for e, packages in _extras().items() if package in packages]
    if not extras:
        return None
    return RequestError(
        f"{package}: must be installed for this, but is not; pip install 'sdq[{extras[0]}]'"
    )


def _extras() -> dict[str, set[str]]:
    """Return the packages of each extra, in the metadata's order; none if it is not installed."""
    try:
        requirements = importlib.metadata.requires("sdq") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, set[str]] = {}
    for requirement in requirements:
        parts = re.fullmatch(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]\s*", requirement)
        if parts and parts[1] != "sdq":  # one extra in another
            found.setdefault(parts[2], set()).add(parts[1].lower().replace("-", "_"))
    return found
