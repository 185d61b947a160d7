"""The ``sdq`` command: its verbs, and what its exit codes mean.

0 done · 1 the run failed · 2 the request is wrong. Messages go to standard error, results to
standard output.
"""

import codecs
import errno
import io
import os
import sys
import warnings

import click
import typer

from sdq._guard import foreign_module
from sdq.cli import verbs
from sdq.errors import RequestError, RunError, nearest
from sdq.extras import missing_extra

_WRONG_REQUEST = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip

_INTERRUPTED = 130


def run() -> None:
    """Run the command line and exit with its code."""
    # libraries' warnings are for developers; ours are messages of our own
    warnings.simplefilter("ignore")
    strict = ("strict", "surrogateescape")  # the latter in the C locale
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in strict:
        # a name in a file may have characters that the terminal has not
        codecs.register_error("sdq", _printable)
        sys.stdout.reconfigure(errors="sdq")
    sys.exit(main(sys.argv[1:]))


def _printable(error: UnicodeError) -> tuple[bytes, int]:
    """Encode what a terminal has no character for: undecoded bytes of a path as they were."""
    assert isinstance(error, UnicodeEncodeError)
    odd = error.object[error.start : error.end]
    parts = (
        bytes([ord(c) - 0xDC00])
        if 0xDC80 <= ord(c) <= 0xDCFF
        else c.encode("ascii", "backslashreplace")
        for c in odd
    )
    return b"".join(parts), error.end


def main(arguments: list[str]) -> int:
    """Run the command line with these arguments and return the exit code."""
    app = typer.Typer(
        name="sdq",
        help="Turn a trained network into a mixed-precision one, and prove that the exported file "
        "computes the same.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    asked = arguments[0] if arguments else ""
    try:
        if hidden := foreign_module():
            raise RequestError(hidden)
        if asked not in verbs.VERBS and not asked.startswith("-") and asked:
            raise RequestError(f"sdq: unknown verb {asked!r}; {nearest(asked, verbs.VERBS)}")
        verbs.register(app, arguments)
        # click returns the code of a typer.Exit instead of raising it
        code = app(arguments, standalone_mode=False, obj=arguments)
        if code == _INTERRUPTED:  # typer turns a KeyboardInterrupt into such an exit
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except RequestError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        return _fail(str(missing), 2)
    except OSError as error:
        return _os_error(error, _again(arguments))
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail(f"interrupted; {_again(arguments)}", _INTERRUPTED)


def _fail(message: str, code: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes the first one speaks
        print(f"error: {message}", file=sys.stderr)
    return code


def _again(arguments: list[str]) -> str:
    """Say how to go on: where a run has begun already, from where it is."""
    following = zip(arguments, [*arguments[1:], ""], strict=True)
    outs = [value for option, value in following if option == "--out"]
    outs += [a.removeprefix("--out=") for a in arguments if a.startswith("--out=")]
    begun = any(os.path.isfile(os.path.join(out, "run.json")) for out in outs)
    resumes = begun and arguments[0] in verbs.RESUMABLE
    return "repeat the command" + (" with --resume to continue" if resumes else "")


def _os_error(error: OSError, again: str) -> int:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(f"{where}disk is full; free some space and {again}", 1)
    if error.errno in _WRONG_REQUEST:
        return _fail(f"{where}{error.strerror}; choose a path you can read and write", 2)
    return _fail(f"{where}{error.strerror or error}", 1)


if __name__ == "__main__":
    run()
