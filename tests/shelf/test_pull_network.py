"""What networks and hubs do to a pull: it goes on by itself, or says in one line what to do."""

import subprocess
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import shelf_room
from conftest import slow
from hub_stand_in import REPO, SHARDS, Hub
from test_pull import ROOT, environment, run, size

from convert import pull
from mlx_cerebrum.shelf.entries import find
from mlx_cerebrum.weights import network
from mlx_cerebrum.weights.network import BusyError, UnreachableError

repository, hub = shelf_room.repository, shelf_room.hub  # fixtures
NAME = "cerebrum-12.25b"


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a pull that ends without a model."""
    assert run(NAME, "--quiet") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert find(NAME) is None
    return err


PASSING: dict[str, dict[str, Any]] = {
    "the hub is busy": {"status": {"api": 503}, "answers": 2},
    "a small file": {"status": {"config.json": 502}, "answers": 3},
    "reset": {"resets": 3},
    "no longer than it says": {"longer": 1000},
    "an end too early": {"longer": 1000, "cut_after": 300_000, "cuts": 4},
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
@slow
def test_what_passes_is_waited_for(
    hub: Hub, capsys: pytest.CaptureFixture[str], fault: dict[str, Any]
) -> None:
    vars(hub.faults).update(fault)
    assert run(NAME, "--quiet") == 0
    assert capsys.readouterr().err == ""
    for name in SHARDS:  # a reset loses what was on its way
        assert hub.sent[name] <= size(hub, name) + 3 * (1 << 16) + fault.get("resets", 0) * (
            1 << 20
        )


def before_files(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """When the hub has been looked at, and before the first file comes."""
    make = pull._make

    def after(*args: Any) -> None:
        act()
        make(*args)

    monkeypatch.setattr(pull, "_make", after)


@slow
def test_a_fault_in_the_middle_passes(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = {"status": {SHARDS[1]: 500}, "answers": 2, "cut_after": 500_000, "cuts": 3}
    before_files(monkeypatch, lambda: vars(hub.faults).update(fault))
    assert run(NAME, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert hub.faults.answers == 0


@slow
def test_a_silent_connection_is_given_up_and_made_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    hub.faults.stall, hub.faults.stalls = 1.0, 1
    started = time.perf_counter()
    assert run(NAME, "--quiet") == 0
    assert time.perf_counter() - started < 10
    assert sum(asked is not None for name, asked in hub.asked if name == SHARDS[0]) == 3


@slow
def test_a_hub_that_asks_for_patience_gets_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "_NOTED", 0.5)
    hub.faults.status, hub.faults.answers = {SHARDS[1]: 429}, 1
    hub.faults.wait = "1"
    started = time.perf_counter()
    assert run(NAME, "--quiet") == 0
    assert time.perf_counter() - started > 1
    assert capsys.readouterr().err == "the hub asks to be left alone for 1 s; waiting\n"


@pytest.mark.parametrize("wait", ["3600", {"RateLimit": '"api";r=0;t=3600'}])
@pytest.mark.parametrize("what", ["api", SHARDS[1]])
def test_too_much_patience_is_not_waited_for(
    hub: Hub, capsys: pytest.CaptureFixture[str], wait: Any, what: str
) -> None:
    hub.faults.status, hub.faults.wait = {what: 429}, wait
    err = refusal(capsys)
    assert "too many requests from here (429): run the same command again in 3600 s" in err
    assert "HF_TOKEN" in err


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "12"}, 12),
        ({"Retry-After": "-1"}, 0),
        ({"Retry-After": "9" * 4000}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": formatdate(0, usegmt=True)}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": "x"}, 0),
        ({}, 0),
    ],
)
def test_how_long_a_hub_asks_for(headers: dict[str, str], seconds: float) -> None:
    assert network._asked_wait(headers) == seconds


def test_a_time_of_day_is_taken_as_a_wait() -> None:
    later = formatdate(time.time() + 100, usegmt=True)
    assert 95 < network._asked_wait({"Retry-After": later}) <= 100


def test_a_length_that_is_not_the_files(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.no_ranges, hub.faults.longer = True, 1000
    assert f"{SHARDS[0]}: the answer is no such file (status 200, " in refusal(capsys)


def test_another_file_under_the_same_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mirror that mixes commits: the size it gives is not the one it listed."""

    def longer() -> None:
        hub.past[hub.commit] = hub.directory
        path = hub.directory / SHARDS[1]
        path.write_bytes(path.read_bytes() + b"more")

    before_files(monkeypatch, longer)
    assert f"{SHARDS[1]} is another file than the hub listed" in refusal(capsys)


def test_a_network_that_wants_a_login(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("api", SHARDS[1]):
        hub.faults.status = {what: 511}
        assert "open a browser, log in, and run the same command again" in refusal(capsys)


# Tokens.


@pytest.mark.parametrize("variable", ["HF_TOKEN", None])
def test_a_token_that_is_wrong(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str | None,
) -> None:
    hub.faults.token = "hf_right"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if variable is None:
        (tmp_path / "token").write_text("hf_wrong")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        says = "the hub does not know this machine's token: `"
    else:
        monkeypatch.setenv(variable, "hf_wrong")
        says = f"the hub does not know the token in {variable}: put a valid one there, or unset it"
    err = refusal(capsys)
    assert says in err
    assert "hf_wrong" not in err


def test_a_gated_model(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.token, hub.faults.gated = "hf_right", True
    monkeypatch.delenv("HF_TOKEN", raising=False)
    err = refusal(capsys)
    terms = f"{REPO} is gated: accept its terms at {hub.address}/{REPO}"
    assert f"{terms}, and put a token of that account in HF_TOKEN" in err
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert run(NAME, "--quiet") == 0


def test_terms_that_another_account_accepted(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    for what in ("api", SHARDS[0]):
        hub.faults.status = {what: 403}
        assert "with the account of this machine's token" in refusal(capsys)
    hub.faults.status = {"api": 404}
    assert "is not on the hub, or not for the account of this machine's token" in refusal(capsys)


# What lies between.


def pulled(hub: Hub, tmp_path: Path, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose client of the hub reads its environment anew."""
    command = [sys.executable, "-m", "convert.pull", NAME, "--bits", "4", "--quiet"]
    env = environment(hub, tmp_path) | more
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@slow
def test_a_proxy_and_a_mirror(hub: Hub, tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": "http://mirror.invalid", "HTTP_PROXY": hub.address, "NO_PROXY": ""}
    done = pulled(hub, tmp_path, away)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.proxied > len(hub.asked) > 3  # and what is no file


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HF_ENDPOINT", "http://me:secret@127.0.0.1:9", "HF_ENDPOINT is http://127.0.0.1:9: is"),
        ("https_proxy", "http://127.0.0.1:9", "HTTPS_PROXY is http://127.0.0.1:9: is that right?"),
    ],
)
def test_settings_that_may_be_the_cause_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    for other in ("HF_ENDPOINT", *network._PROXIES):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UnreachableError) as told, network.explained("x/y", None):
        raise OSError("Connection refused")
    assert says in str(told.value)
    assert "secret" not in str(told.value)


def certificate(folder: Path, first: str, last: str) -> Path:
    """A key and a certificate of its own for 127.0.0.1, valid between two times, in one file."""
    made, settings = folder / "server.pem", folder / "ca.cnf"
    settings.write_text(
        f"[ca]\ndefault_ca = it\n[it]\nnew_certs_dir = {folder}\ndatabase = {folder}/index\n"
        f"rand_serial = yes\ndefault_md = sha256\npolicy = any\nx509_extensions = more\n"
        "[any]\ncommonName = supplied\n[more]\nsubjectAltName = IP:127.0.0.1\n"
        "basicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign,digitalSignature\n"
        "[req]\ndistinguished_name = name\n[name]\n"
    )
    (folder / "index").write_text("")
    key, asked = str(folder / "key.pem"), str(folder / "asked.pem")
    common = ["-config", str(settings), "-batch"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    ask = ["req", "-new", *curve, "-subj", "/CN=hub", "-keyout", key, "-out", asked, *common]
    sign = ["ca", "-selfsign", "-notext", "-keyfile", key, "-in", asked, "-out", str(made), *common]
    for command in (ask, [*sign, "-startdate", first, "-enddate", last]):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    made.write_bytes(made.read_bytes() + Path(key).read_bytes())
    return made


TLS = [
    ("20000101000000Z", "20010101000000Z", True, "is this machine's clock right?"),
    ("20900101000000Z", "20910101000000Z", True, "is this machine's clock right?"),
    ("20000101000000Z", "20910101000000Z", False, "is there a proxy in between? SSL_CERT_FILE"),
    ("20000101000000Z", "20910101000000Z", True, None),
]


@pytest.mark.skipif(not shelf_room.OPENSSL, reason="needs openssl")
@pytest.mark.parametrize(("first", "last", "trusted", "says"), TLS)
@slow
def test_a_clock_that_is_wrong(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: str,
    last: str,
    trusted: bool,
    says: str | None,
) -> None:
    """To a certificate a clock that is wrong is what a certificate of another time is to one
    that is right."""
    made = certificate(tmp_path, first, last)
    hub.wrap(made)
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        old = getattr(huggingface_hub.constants, name)
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", old.replace("http:", "https:"))
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
    huggingface_hub.close_session()  # the next one reads the certificates anew
    try:
        if says is None:
            assert run(NAME, "--quiet") == 0
        else:
            assert says in refusal(capsys)
    finally:
        huggingface_hub.close_session()


def test_a_busy_hub_is_asked_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_WAITS", (0, 0))
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        raise BusyError("busy")

    with pytest.raises(BusyError):
        network.patiently(ask)
    assert asked == 3
