"""A plan shared out to several machines, as the plan command says it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import command
import pytest

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.plan.shares import Sharing, parse_memory
from mlx_cerebrum.plan.show import CEREBRUM_7B, describe, main

WHOLE = LayerPlan.named("cerebrum-12.25b")
BLOCK, REST = 218_112_000, 262_148_096  # parameters: of a block, outside the blocks

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(command.run, capsys, main=main)


def shared(sharing: Sharing, plan: LayerPlan = WHOLE) -> dict[str, Any]:
    facts = describe(plan, None, sharing)["sharing"]
    assert isinstance(facts, dict)
    return facts


def test_two_machines_hold_half_each() -> None:
    facts = shared(Sharing(2))
    first, last = facts["machines"]
    assert facts["cuts"] == [28]
    assert (first["positions"], last["positions"]) == ([0, 28], [28, 56])
    assert (first["blocks"], last["blocks"]) == ([*range(16)], [*range(16, 32)])
    assert first["weights"]["bf16"] == 2 * (16 * BLOCK + REST)
    assert last["weights"]["bf16"] == 2 * 16 * BLOCK
    assert first["cache_at_context"] == last["cache_at_context"] == 28 * 4096 * 4096
    assert facts["held_by_several"] == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_all_parts_together_are_the_whole(ranks: int) -> None:
    facts, whole = shared(Sharing(ranks)), describe(WHOLE)["sizes"]
    machines = facts["machines"]
    for storage in ("bf16", "8bit", "4bit"):
        assert sum(m["weights"][storage] for m in machines) == whole["folded"][storage]
    assert sum(m["cache_at_context"] for m in machines) == whole["kv_bytes_at_context"]
    assert machines[-1]["positions"][1] == 56


def test_a_block_on_both_sides_of_a_cut_is_counted_twice() -> None:
    facts = shared(Sharing(2, split="24"))
    assert facts["held_by_several"] == [12, 13, 14, 15]
    assert [len(m["blocks"]) for m in facts["machines"]] == [16, 20]


def test_what_is_sent_for_a_token() -> None:
    """On each hop an announcement of 1 KiB and the hidden state; the last sends the state back."""
    sent = [
        (m["sent_messages_per_token"], m["sent_bytes_per_token"])
        for m in shared(Sharing(3))["machines"]
    ]
    assert sent == [(2, 1024 + 8192), (2, 1024 + 8192), (1, 8192)]
    assert shared(Sharing(1))["machines"][0]["sent_messages_per_token"] == 0
    assert shared(Sharing(1))["projection"] is None


def test_memory_moves_the_cut_and_the_most_bits_that_fit_are_cut_for() -> None:
    facts = shared(Sharing(2, memory=(16.0, 8.0)))
    assert (facts["cuts"], facts["cut_for"]) == ([36], "8bit")
    need = (2 * 12 * BLOCK + 20 * 4096 * 4096) * 3 / 2  # Metal lets a model take two thirds
    assert facts["machines"][1]["memory_needed"]["bf16"] == pytest.approx(need, abs=1)
    assert shared(Sharing(2, memory=(8.0, 16.0)))["cuts"] == [20]
    assert shared(Sharing(2, memory=(16.0, 16.0)))["cut_for"] == "bf16"
    assert shared(Sharing(2, memory=(1.0, 1.0)))["cut_for"] == "4bit"  # not even that fits


def test_who_does_not_fit_is_told_what_it_needs(run: Run) -> None:
    code, out, err = run("cerebrum-12.25b", "--ranks", "2", "--memory", "16,8")
    assert (code, err) == (0, "")
    assert "\nbf16: rank 1 needs 8.36 GB and has 8\n8-bit: every rank fits\n" in out
    out = run("cerebrum-12.25b", "--ranks", "2", "--memory", "4, 2.5")[1]
    assert "\n4-bit: rank 0 needs " in out
    assert "; rank 1 needs " in out


def paces(sharing: Sharing, link: str, way: str, storage: str) -> list[float]:
    """Of one machine's pace: the least, the most."""
    facts = shared(sharing)["projection"]
    (found,) = (entry for entry in facts["links"] if link in entry["name"])
    (alone,) = facts["one_machine"][storage]
    return [pace / alone for pace in found[way][storage]]


def test_one_machine_reads_each_position_once() -> None:
    facts = shared(Sharing(2, bandwidth=100.0))["projection"]
    assert facts["measured"] is False
    read = 2 * (56 * BLOCK + 32000 * 4096 + 4096)  # a row of the embedding is left out
    assert facts["one_machine"]["bf16"] == [pytest.approx(100e9 / read)]
    assert facts["sums_per_token"] == 112


def test_the_projected_pace() -> None:
    """Two Macs of 273 GB/s by RDMA: 0.205 ms a message, of 25.4 and 90.4 ms for a token."""
    two = Sharing(2, bandwidth=273.0)
    for storage, alone in (("4bit", 25.4), ("bf16", 90.4)):
        in_a_row = pytest.approx([alone / (alone + 2 * 0.205)] * 2, rel=0.01)
        assert paces(two, "RDMA", "pipeline", storage) == in_a_row
        tensor = pytest.approx([alone / (0.505 * alone + 112 * 0.205)] * 2, rel=0.01)
        assert paces(two, "RDMA", "tensor_parallel", storage) == tensor
    slow, quick = paces(two, "Wi-Fi", "pipeline", "4bit")
    assert slow == pytest.approx(25.4 / (25.4 + 2 * 54.18), rel=0.01)
    assert quick == pytest.approx(25.4 / (25.4 + 2 * 5.18), rel=0.01)


def test_a_ring_passes_a_sum_on_and_the_most_heads_set_the_pace() -> None:
    four, three = Sharing(4, bandwidth=273.0), Sharing(3, bandwidth=273.0)
    quick = paces(four, "TCP", "tensor_parallel", "4bit")[1]
    assert quick == pytest.approx(25.4 / (0.258 * 25.4 + 112 * 3 * 0.48), rel=0.01)
    quick = paces(three, "RDMA", "tensor_parallel", "bf16")[1]  # 3 of 8 heads
    assert quick == pytest.approx(90.4 / (0.381 * 90.4 + 112 * 0.205), rel=0.01)


def test_more_machines_than_heads_have_no_tensor_parallel(run: Run) -> None:
    assert shared(Sharing(9))["projection"]["links"][0]["tensor_parallel"] is None
    assert "No tensor parallel: the model has fewer" in run("cerebrum-7b", "--ranks=9")[1]


def test_as_text(run: Run) -> None:
    code, out, err = run("cerebrum-12.25b", "--ranks", "3")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for expected in (
        "Shared out to 3 machines, cut at 20, 36:",
        "0 0-19 0-11 5.76 GB 3.06 GB 1.62 GB 0.34 GB 9 KiB",
        "2 36-55 20-31 5.23 GB 2.78 GB 1.47 GB 0.34 GB 8 KiB",
        "No block is held twice.",
        "Cache: bf16, at the window of 4096 tokens.",
        "Sent for a token: 5 messages.",
        "A projection, not a measurement: decoded tokens/s at most",
        "Wi-Fi, 5-54 ms pipeline 4.0-9.4 5.3-24.4 tensor 0.08-0.84 0.08-0.85 ",
        "Thunderbolt 5, RDMA (JACCL), 0.025 ms pipeline 11.0 38.4 tensor 17.4 30.6",
        "A pipeline waits for 3 messages a token.",
        "waits for 112 sums a token.",
    ):
        assert expected in flat
    assert "blocks 12-15." in run("cerebrum-12.25b", "--ranks", "2", "--split", "24")[1]
    out = run("cerebrum-12.25b", "--ranks", "1")[1]
    assert "On one machine:" in out
    assert "Sent for" not in out
    assert "projection" not in out


def test_in_json(run: Run) -> None:
    code, out, err = run("cerebrum-12.25b", "--json", "--ranks", "2", "--memory", "16,16")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["sharing"] == json.loads(json.dumps(shared(Sharing(2, (16.0, 16.0)))))
    assert json.loads(run("cerebrum-12.25b", "--json")[1])["sharing"] is None


def test_without_a_geometry_only_positions_and_blocks_are_known(run: Run) -> None:
    code, out, _ = run("demo-interleaved", "--ranks", "2")
    assert code == 0
    assert "0 0-12 0-12 1 13-33 13-29" in " ".join(out.split())
    assert "projection" not in out
    code, out, err = run("demo-interleaved", "--ranks", "2", "--memory", "16,16")
    assert (code, out) == (2, "")
    assert err == "error: --memory needs --config DIR: without it no sizes are known\n"


def test_rows_that_no_group_divides_are_shared_out_dense(run: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "mistral",
        "hidden_size": 100,
        "num_hidden_layers": 30,
        "intermediate_size": 200,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ("demo-interleaved", "--config", str(tmp_path), "--ranks", "2", "--memory", "1,1")
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert "at the full context of 512 tokens" in out
    assert "\nbf16: every rank fits" in out
    assert "\n8-bit:" not in out
    assert run(*argv, "--json")[0] == 0


def test_memory_as_written() -> None:
    assert parse_memory("16,8", 2) == (16.0, 8.0)
    assert parse_memory(" 16 , 7.5", 2) == (16.0, 7.5)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ranks=0"], "56 positions can be shared out to 1 to 56 machines, not 0"),
        (["--ranks=-2"], "56 positions can be shared out to 1 to 56 machines, not -2"),
        (["--ranks=57"], "56 positions can be shared out to 1 to 56 machines, not 57"),
        (["--ranks=2147483647"], "56 positions can be shared out to 1 to 56 machines, not 2147483"),
        (["--ranks=57", f"--memory={'8,' * 56}8"], "56 positions can be shared out to 1 to 56 mac"),
        (["--ranks=0", "--split=28"], "56 positions can be shared out to 1 to 56 machines, not 0"),
        (["--ranks=2", "--memory=16"], "--memory '16' is for --ranks 1, not 2: give GB for each"),
        (["--ranks=2", "--memory=-16,8"], "--memory '-16,8' is not a list of GB such as 16,8"),
        (["--ranks=2", "--memory=16GB,8"], "--memory '16GB,8' is not a list of GB such as 16,8"),
        (["--ranks=2", "--memory=nan,8"], "--memory 'nan,8' is not a list of GB such as 16,8"),
        (["--ranks=2", "--memory="], "--memory '' is not a list of GB such as 16,8"),
        (["--ranks=2", "--memory=16,0"], "--memory '16,0': machine 1 has no memory"),
        (["--ranks=2", "--memory", "-16,8"], "argument --memory: expected one argument"),
        (["--ranks=2", "--split=56"], "--split '56': can't cut at 56; the 56 positions can be cut"),
        (["--ranks=3", "--split=28"], "--split '28' cuts at 1 position; 3 machines need 2"),
        (["--ranks=2", "--bandwidth=0"], "--bandwidth 0 must be above 0 GB/s"),
        (["--memory=16,8"], "--memory needs --ranks N"),
        (["--split=28"], "--split needs --ranks N"),
        (["--bandwidth=100"], "--bandwidth needs --ranks N"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Run, argv: list[str], said: str) -> None:
    code, out, err = run("cerebrum-12.25b", *argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_ranks_need_a_plan(run: Run) -> None:
    assert run("--list", "--ranks", "2")[2].startswith("error: --ranks needs a plan")


def test_a_sharing_in_python_is_checked_too() -> None:
    with pytest.raises(PlanError, match="machine 1 has a memory of 0"):
        describe(WHOLE, CEREBRUM_7B, Sharing(2, (8.0, 0.0)))
