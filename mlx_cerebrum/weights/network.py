"""What goes wrong between this machine and the hub, in one line each, and what is tried again."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.text import one_line, tell
from mlx_cerebrum.weights import hub

TIMEOUT = 30.0  # seconds without a byte
LONGEST = 300.0  # seconds that a hub may ask to be left alone for
_WAITS = (1.0, 2.0, 4.0)  # seconds before a small thing is asked for again
_NOTED = 5.0  # seconds of waiting that are worth a word
_BUSY = (408, 425, 429, 500, 502, 503, 504, 520, 522, 524)
_LOGIN = 511  # Network Authentication Required, RFC 6585
_PORTAL = (
    "A network that wants you to log in sends such: open a browser, log in, and run the same"
    " command again"
)
# The IETF's draft-ietf-httpapi-ratelimit-headers, as the hub sends it: "api";r=0;t=55
_LIMIT = re.compile(r";\s*t\s*=\s*(\d{1,6})")
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_Answer = TypeVar("_Answer")


class UnreachableError(CheckpointError):
    """The hub can't be reached just now, or broke off; what came before is good."""


class BusyError(UnreachableError):
    """The hub is there, but broke off or asks for patience. wait: seconds it asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def patiently(ask: Callable[[], _Answer]) -> _Answer:
    """What the hub answers, asked again for a moment while it is busy. Raises what `ask` does."""
    for wait in _WAITS:
        try:
            return ask()
        except BusyError as error:
            time.sleep(pause(error, wait))
    return ask()


def pause(error: UnreachableError, wait: float) -> float:
    """Seconds to wait before the next try: `wait`, or what the hub asks for, which is told.

    Raises the error where that is too long to sit there for.
    """
    asked = error.wait if isinstance(error, BusyError) else 0.0
    if asked > LONGEST:
        raise error
    if asked >= _NOTED:
        tell(f"the hub asks to be left alone for {asked:.0f} s; waiting")
    return max(wait, asked)


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """As `hub.explained`, and an UnreachableError for what a network does.

    Which exceptions a broken connection gives depends on the version of the hub's client (httpx,
    or its successor), so all that are not known are taken; `--debug` shows them.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    with hub.explained(repo, revision, "unset it, and run the same command again"):
        try:
            yield
        except HfHubHTTPError as error:
            answer: Any = getattr(error, "response", None)
            if answer is not None and answer.status_code in _BUSY:
                raise _busy(repo, answer) from error
            if answer is not None and answer.status_code == _LOGIN:
                raise CheckpointError(f"{repo}: the network answered {_LOGIN}. {_PORTAL}") from None
            raise
        except (CheckpointError, HFValidationError, OfflineModeIsEnabled):
            raise
        except ValueError as error:  # not JSON
            raise CheckpointError(
                f"{repo}: the hub's answer can't be read ({one_line(str(error), 80)}). {_PORTAL}"
            ) from error
        except Exception as error:
            raise UnreachableError(f"{repo}: {_reason(error)}") from error


def skipped(answer: Any, where: str, start: int, size: int) -> int:
    """How many bytes the answer has before those asked for. Raises where it is another file's."""
    status, headers = answer.status_code, answer.headers
    if status in _BUSY:
        raise _busy(where, answer)
    if status == _LOGIN or ("text/html" in headers.get("Content-Type", "") and status < 400):
        raise CheckpointError(f"{where}: a web page came instead. {_PORTAL}")
    if status in (401, 403):
        wrong = headers.get("X-Error-Message") == hub.WRONG_TOKEN
        remedy = hub.wrong_token() if wrong else hub.terms(where.rpartition("/")[0])
        raise CheckpointError(f"{where}: the hub refused it ({status}): {remedy}")
    if status in (404, 410):
        raise CheckpointError(f"{where} is not on the hub any more ({status})")
    part, _, total = headers.get("Content-Range", "").rpartition("/")
    if status == 416 or (status == 206 and total not in ("*", str(size))):
        raise CheckpointError(f"{where} is another file than the hub listed ({total} bytes)")
    if status == 206 and not part.startswith(f"bytes {start}-"):
        raise CheckpointError(f"{where}: another part came than was asked for ({part})")
    if status == 206:
        return 0
    length = headers.get("Content-Length")
    if status != 200 or (length is not None and length != str(size)):
        raise CheckpointError(
            f"{where}: the answer is no such file (status {status}, {length} bytes of {size})"
        )
    return start


def _busy(where: str, answer: Any) -> BusyError:
    """What to say of a status that passes, and for how long it is said to last."""
    status, wait = answer.status_code, _asked_wait(answer.headers)
    if status != 429:
        return BusyError(f"{where}: the hub answered {status}", wait)
    later = f"in {wait:.0f} s" if wait else "later"
    token = "" if hub.has_token() else "; with a token (HF_TOKEN) it takes more"
    return BusyError(
        f"{where}: the hub has had too many requests from here (429): run the same command again"
        f" {later}{token}",
        wait,
    )


def _asked_wait(headers: Any) -> float:
    """Seconds that an answer asks to be left alone for (RFC 9110, 10.2.3); 0 where it does not."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,6}", text):
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, OverflowError):
            return 0.0
    limit = _LIMIT.search(headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _reason(error: Exception) -> str:
    """Why there is no answer, and what of this machine's settings may be the cause."""
    text = one_line(str(error), 200) or type(error).__name__
    if "CERTIFICATE" in text.upper():
        if "expired" in text or "not yet valid" in text:
            more = "is this machine's clock right?"
        else:
            more = "is there a proxy in between? SSL_CERT_FILE names the certificates it is to have"
        return f"the connection can't be trusted ({text}): {more}"
    if "socksio" in text:
        return "SOCKS proxies (ALL_PROXY) can't be used; set HTTPS_PROXY to an HTTP one"
    more = ""
    if endpoint := os.environ.get("HF_ENDPOINT"):
        more = f"; HF_ENDPOINT is {_address(endpoint)}: is that right?"
    elif proxy := next((n for n in _PROXIES if os.environ.get(n, os.environ.get(n.lower()))), None):
        value = os.environ.get(proxy, os.environ.get(proxy.lower(), ""))
        more = f"; {proxy} is {_address(value)}: is that right?"
    return f"the hub can't be reached, or broke off ({text}){more}"


def _address(url: str) -> str:
    """An address without the name and password that may stand in it."""
    return one_line(re.sub(r"//[^/]*@", "//", url), 100)
