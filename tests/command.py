"""A command line run in this process."""

from typing import Any

import pytest

from mlx_cerebrum.generate import main


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """`generate`'s exit code, stdout and stderr."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
