"""What the clients' tests share: the demo model, served as the docs say, on a port of its own.

The model is tiny and says nonsense. What is tested is that a client, set up as its own docs say for
a server like OpenAI's, gets what its interface promises.
"""

import atexit
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

MODEL = "demo"
ASKED = "What is the capital of France?"  # the answer is short
KEY = "none"  # any text, where the server has none
MOST_TOKENS = 64  # of answers to requests that do not say
START = 120.0  # seconds
SERVE = ["-m", "mlx_cerebrum.server", "--model", MODEL, "--port", "0"]


class City(BaseModel):
    """What the model is made to fill in. Short and closed: it is no good at ending a text."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=8)
    size: int = Field(ge=0, le=999)


def weather(city: str) -> str:
    """Says how the weather is.

    Args:
        city: Where.
    """
    return f"Rain in {city}"


def client(name: str) -> Any:
    """The package `name`; the test is skipped without it, but fails in CI."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        needs(f"{error}; run: make test-clients")


def needs(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what, allow_module_level=True)


@cache
def served() -> str:
    """The address of a server that runs until this process ends; with /v1."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, *SERVE, "--max-tokens", str(MOST_TOKENS)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.kill)
    assert server.stdout is not None
    return server.stdout.readline().split()[0] + "/v1"


@pytest.fixture(scope="session")
def address() -> str:
    return served()
