"""Plugins: a module in a package with a plural name is a plugin, and its file name is its name.

Nothing is registered. Putting ``sdq/models/my_net.py`` there is enough for ``--model my_net``, for
``sdq list models`` and for the conformance tests. A file that is elsewhere is named by its path:
``--target path/to/my_board.py`` takes a module of the same content.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sdq.errors import RequestError, nearest
from sdq.extras import missing_extra

_USER, _FILE = "sdq_user_", ".py"


def names(package: str) -> list[str]:
    """Return the sorted plugin names of a package.

    >>> "resnet20" in names("sdq.models")
    True
    """
    found = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(found.__path__) if m.name[0] != "_")


def load(package: str, name: str) -> ModuleType:
    """Import one plugin by its name, or a user's ``path/to/file.py``.

    In a name case does not matter, and ``-`` is ``_``.

    Raises:
        RequestError: no such plugin or file; the message offers the nearest name. Or it needs a
            package that is not installed; the message names the extra to install.
    """
    if name.endswith(_FILE):
        return _execute(Path(name))
    module_name = named(name)
    known = names(package)
    if module_name not in known:
        kind = package.rsplit(".", 1)[-1].removesuffix("s")
        raise RequestError(f"{kind}: unknown name {name!r}; {nearest(module_name, known)}")
    try:
        return importlib.import_module(f"{package}.{module_name}")
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is not None:
            raise missing from error
        raise


def summary(package: str, name: str) -> str:
    """Return the first line of a plugin's docstring, without importing it.

    What a plugin needs may not be installed, or take long to import.
    """
    return docstring(Path(importlib.import_module(package).__path__[0]) / f"{name}.py")


def docstring(path: Path, function: str | None = None) -> str:
    """Return the first line of the docstring of a file, or of a function in it."""
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    if function is not None:
        kinds = ast.FunctionDef | ast.ClassDef
        named = (n for n in ast.walk(node) if isinstance(n, kinds) and n.name == function)
        node = next(named)
    assert isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
    return (ast.get_docstring(node) or "").partition("\n")[0]


def named(reference: str) -> str:
    """Return a plugin's name from how it is referred to: a name, or the path of a user's file.

    >>> named("ONNX-packed"), named("mine/My-Own.py")
    ('onnx_packed', 'My-Own')
    """
    if reference.endswith(_FILE):
        return Path(reference).stem
    return reference.lower().replace("-", "_")


def name_of(module: str) -> str:
    """Return a plugin's name from that of its module, also of a user's file.

    >>> name_of("fl.methods.fedavg")
    'fedavg'
    """
    return module.rpartition(".")[2].removeprefix(_USER)


def is_file_reference(text: str) -> bool:
    """Tell whether ``text`` has the form ``path/to/file.py:function``."""
    return text.partition(".py:")[1] == ".py:"


def load_function(reference: str) -> tuple[Callable[..., Any], str]:
    """Load ``path/to/file.py:function`` from a user's file.

    Returns:
        The function, and the SHA-256 of the file in hexadecimal.

    Raises:
        RequestError: no such file, no such function, or the file cannot be executed.
    """
    path_text, _, function_name = reference.rpartition(":")
    path = Path(path_text)
    module = _execute(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        raise RequestError(
            f"{path}: no function {function_name!r}; {nearest(function_name, known)}"
        )
    return function, hashlib.sha256(path.read_bytes()).hexdigest()


def _execute(path: Path) -> ModuleType:
    """Import a user's file under its own name and a prefix, which no other module has."""
    if not path.is_file():
        raise RequestError(f"plugin: no file {str(path)!r}; give the path of an existing .py file")
    spec = importlib.util.spec_from_file_location(_USER + path.stem, path)
    assert spec is not None  # a .py path always has a spec and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RequestError(
            f"{path}: cannot be executed, {type(error).__name__}: {error}; mend the file"
        ) from error
    return module


def call_with_known(function: Callable[..., Any], **offered: Any) -> Any:
    """Call ``function`` with those of the offered arguments that its signature takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return function(**{k: v for k, v in offered.items() if takes_all or k in parameters})
