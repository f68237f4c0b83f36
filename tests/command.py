"""A command line run in this process."""

from collections.abc import Callable
from typing import Any

import pytest

from mlx_cerebrum.generate import main as generate


def run(
    capsys: pytest.CaptureFixture[str],
    *args: Any,
    main: Callable[[list[str]], int] = generate,
) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command; `generate`'s unless another is given."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
