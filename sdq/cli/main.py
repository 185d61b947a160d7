"""The ``sdq`` command: its verbs, and what its exit codes mean.

0 done · 1 the run failed · 2 the request is wrong. Messages go to standard error, results to
standard output.
"""

import errno
import sys
import warnings

import click
import typer

from sdq._guard import foreign_module
from sdq.cli import verbs
from sdq.errors import RequestError, RunError

_WRONG_REQUEST = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip


def run() -> None:
    """Run the command line and exit with its code."""
    # libraries' warnings are for developers; ours are messages of our own
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))


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
    try:
        if hidden := foreign_module():
            raise RequestError(hidden)
        verbs.register(app, arguments)
        # click returns the code of a typer.Exit instead of raising it
        code = app(arguments, standalone_mode=False)
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
    except OSError as error:
        return _os_error(error)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail("interrupted; repeat the command with --resume to continue", 130)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> int:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(f"{where}disk is full; free some space and repeat with --resume", 1)
    if error.errno in _WRONG_REQUEST:
        return _fail(f"{where}{error.strerror}; choose a folder you can write to", 2)
    return _fail(f"{where}{error.strerror or error}", 1)


if __name__ == "__main__":
    run()
