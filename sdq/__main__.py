"""``python -m sdq`` is the ``sdq`` command."""

from sdq.cli.main import run

run()
