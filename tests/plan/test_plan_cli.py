"""The plan command, and the error handling every command line shares."""

import argparse
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import command
import pytest

from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.plan.show import CEREBRUM_7B, describe, main

Run = Callable[..., tuple[int, str, str]]

TINY: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 128,
    "num_hidden_layers": 30,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(command.run, capsys, main=main)


def config_file(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(TINY | changes))
    return str(path)


# What it shows


def test_the_real_model_in_json(run: Run) -> None:
    code, out, err = run("cerebrum-12.25b", "--json")
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    assert (shown["positions"], shown["blocks"]) == (56, 32)
    assert len(shown["layer_map"]) == 56
    assert shown["runs_per_block"] == [1] * 4 + [2] * 24 + [1] * 4
    assert shown["slices"][1] == [4, 12]
    size = shown["sizes"]
    assert size["folded"]["parameters"] == 7_241_732_096
    assert size["unrolled"]["parameters"] == 12_476_420_096
    assert size["folded"]["bf16"] == 14_483_464_192
    assert size["unrolled"]["bf16"] == 24_952_840_192
    # 65 and 113 norms of 4096 stay at 16 bits, the rest takes 4 or 8 bits and 32/64 more.
    assert size["folded"]["4bit"] == (7_241_732_096 - 65 * 4096) * 9 // 16 + 2 * 65 * 4096
    assert size["unrolled"]["4bit"] == (12_476_420_096 - 113 * 4096) * 9 // 16 + 2 * 113 * 4096
    assert size["folded"]["8bit"] == (7_241_732_096 - 65 * 4096) * 17 // 16 + 2 * 65 * 4096
    assert size["kv_bytes_per_token"] == 224 * 1024
    assert size["kv_bytes_at_context"] == 0.875 * 2**30
    assert size["window"] == 4096


def test_the_real_model_as_text(run: Run) -> None:
    code, out, err = run("cerebrum-12.25b")
    assert (code, err) == (0, "")
    for expected in (
        "56 positions over 32 blocks of AetherResearch/Cerebrum-1.0-7b, bfloat16",
        "[20, 28]",
        "····████████····················",
        "run twice: blocks 4-27\nrun once: blocks 0-3, 28-31\n",
        "7,241,732,096   14.48 GB    7.69 GB   4.07 GB",
        "12,476,420,096   24.95 GB   13.26 GB   7.02 GB",
        "224 KiB a token, 0.875 GiB at the window of 4096 tokens",
        '"12.25B" is its rounding, (56/32) x 7; executed: 12.48B',
    ):
        assert expected in out
    assert "rounding" not in run("cerebrum-7b")[1]
    assert "128 KiB a token, 0.500 GiB" in run("cerebrum-7b")[1]


def test_the_card_counts_as_the_named_plan(run: Run, tmp_path: Path) -> None:
    text = LayerPlan.named("cerebrum-12.25b").text
    file = tmp_path / "card.yml"
    file.write_text(text.replace("AetherResearch/", "/Users/someone/opt/"))
    ours, named = (json.loads(run(p, "--json")[1]) for p in (str(file), "cerebrum-12.25b"))
    assert ours["sizes"] == named["sizes"]
    assert ours["layer_map"] == named["layer_map"]
    assert ours["source"] == "/Users/someone/opt/Cerebrum-1.0-7b"


def test_another_geometry_needs_its_config(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("demo-interleaved")
    assert code == 0
    assert "34 positions over 30 blocks" in out
    assert "run twice: blocks 13-16" in out
    assert "Sizes need --config DIR: this plan ends at block 29" in out
    assert json.loads(run("demo-interleaved", "--json")[1])["sizes"] is None

    config = config_file(tmp_path)
    shown = json.loads(run("demo-interleaved", "--json", "--config", str(tmp_path))[1])
    # q, o: 128 x 128; k, v: 64 x 128; gate, up, down: 192 x 128; two norms. Head tied.
    block = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 192 * 128 + 2 * 128
    assert shown["sizes"]["folded"]["parameters"] == 30 * block + 100 * 128 + 128
    assert shown["sizes"]["unrolled"]["parameters"] == 34 * block + 100 * 128 + 128
    assert shown["sizes"]["kv_bytes_per_token"] == 34 * 2 * 2 * 32 * 2
    assert (
        "at the full context (no window) of 512" in run("demo-interleaved", "--config", config)[1]
    )


def test_rows_that_no_group_divides_have_no_quantized_size(run: Run, tmp_path: Path) -> None:
    config = config_file(tmp_path, intermediate_size=200)
    sizes = json.loads(run("demo-interleaved", "--json", "--config", config)[1])["sizes"]
    assert sizes["folded"]["4bit"] is None
    assert sizes["folded"]["bf16"] == 2 * sizes["folded"]["parameters"]
    assert run("demo-interleaved", "--config", config)[0] == 0


def test_a_plan_counts_the_stored_blocks_of_a_folded_checkpoint(run: Run, tmp_path: Path) -> None:
    folded = [*range(20), *range(10, 30)]
    config = config_file(tmp_path, model_type="cerebrum", format_version=1, layer_map=folded)
    shown = json.loads(run("demo-interleaved", "--json", "--config", config)[1])
    assert (shown["positions"], shown["blocks"], shown["replaces_map_of"]) == (34, 30, 40)
    assert "this plan replaces its 40 positions" in run("demo-interleaved", "--config", config)[1]


def test_scales_are_shown(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "scaled.yml"
    body = LayerPlan.named("cerebrum-12.25b").text
    file.write_text(body + "parameters: {scale: {filter: o_proj, value: 0.5}}\n")
    assert "Residual scales: 56 positions (0-55)" in run(str(file))[1]
    assert json.loads(run(str(file), "--json")[1])["residual_scales"] == [[0.5, 1.0]] * 56
    file.write_text(body + "parameters: {scale: 0.5}\n")
    code, out, _ = run(str(file))
    assert code == 0
    assert re_line(out, "Scales: ").endswith("only `convert --layout unrolled` can")
    shown = json.loads(run(str(file), "--json")[1])
    assert shown["residual_scales"] is None
    assert "only `convert --layout unrolled`" in shown["only_unrolled"]


def re_line(text: str, start: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


def test_the_whole_of_a_model_fits_any(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "whole.yml"
    file.write_text("merge_method: passthrough\nmodels: [{model: m}]\n")
    assert json.loads(run(str(file), "--json")[1])["positions"] == 32
    config = config_file(tmp_path, num_hidden_layers=5)
    assert json.loads(run(str(file), "--json", "--config", config)[1])["positions"] == 5


def test_list(run: Run) -> None:
    code, out, _ = run("--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "cerebrum-12.25b",
        "cerebrum-7b",
        "demo-interleaved",
    ]
    assert json.loads(run("--list", "--json")[1])[2]["positions"] == 34


def test_the_python_form_is_the_same() -> None:
    shown = describe(LayerPlan.named("cerebrum-7b"))
    assert shown["sizes"] == describe(LayerPlan.named("cerebrum-7b"), CEREBRUM_7B)["sizes"]
    assert isinstance(CEREBRUM_7B, ModelConfig)
    assert CEREBRUM_7B.stored_parameters == 7_241_732_096


# What it refuses


def test_bad_input_is_one_line_and_exit_2(run: Run, tmp_path: Path) -> None:
    past = tmp_path / "past.yml"
    past.write_text("merge_method: passthrough\nslices:\n- sources:\n")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("{")
    small = tmp_path / "small"
    small.mkdir()
    for argv, start in (
        (["nope"], "error: 'nope' is neither a file nor a named plan; named plans: cerebrum-12"),
        ([str(past)], f"error: {past}:3: slices[0]: sources is empty"),
        (["cerebrum-7b", "--config", str(tmp_path / "none")], f"error: {tmp_path / 'none'} does"),
        (["cerebrum-7b", "--config", str(tmp_path)], f"error: {tmp_path / 'config.json'} does"),
        (["cerebrum-7b", "--config", str(bad)], f"error: {bad / 'config.json'} is not valid JSON"),
        (["cerebrum-7b", "--config", config_file(small)], "error: cerebrum-7b.yml:5: slices[0]"),
        ([], "error: give either a plan or --list"),
        (["cerebrum-7b", "--list"], "error: give either a plan or --list"),
        (["--list", "--config", "x"], "error: --config needs a plan"),
        (["cerebrum-7b", "--jso"], "error: unrecognized arguments: --jso"),
        (["cerebrum-7b", "more\nlines"], "error: unrecognized arguments: more lines"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), argv
        assert err.startswith(start), argv
        assert err.count("\n") == 1, argv


def test_debug_shows_the_traceback(run: Run) -> None:
    code, _, err = run("nope", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: 'nope' is neither")


def process(*argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_cerebrum.plan", *argv]
    return subprocess.run(command, text=True, check=False, **kwargs)


def test_the_module_runs_without_warnings_and_a_full_disk_is_one_line() -> None:
    done = process("--list", capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = process("cerebrum-7b", "--json", stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2
        assert done.stderr == "error: No space left on device; free some space or write elsewhere\n"


# cli.run


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(("end", "code"), [("SystemExit(129)", 129), ("KeyboardInterrupt", 130)])
def test_output_that_nobody_takes_changes_no_exit_code(end: str, code: int) -> None:
    """As where the terminal is gone: Python's own last flush would make it 120."""
    program = (
        "import sys; from mlx_cerebrum import cli\n"
        f"def body():\n    sys.stdout.write('x')\n    raise {end}\n"
        "sys.exit(cli.run(body))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == code
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CerebrumError("one\ntwo"), 2, "error: one two\n"),
        (CerebrumError(), 2, "error: CerebrumError\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.json"), 2, "error: x.json: No such"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 2, "error: a: No space left on"),
        (OSError("plain"), 2, "error: plain\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)
def test_errors_become_codes(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise error

    assert cli.run(body) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == (1 if line else 0)


def test_success_and_faults_pass_through() -> None:
    assert cli.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_a_parser_takes_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.ArgumentParser(prog="x")
    parser.add_argument("--prompt", type=int)
    assert isinstance(parser, argparse.ArgumentParser)
    for argv in (["--prom", "1"], ["--prompt", "a"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(argv)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.endswith(" (see x --help)\n")
        assert err.count("\n") == 1
