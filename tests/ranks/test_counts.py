"""What machines send each other for a token, and what each holds of a model: counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from ranks_counts import TOKENS
from ranks_ring import LONG, MAPS, SIZES, run
from tiny import tiny_config, tiny_weights

from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.plan.shares import Sharing, share_out

Found = dict[str, Any]
COUNTS = Path(__file__).parents[1] / "ranks_counts.py"
RAW = tiny_config(**SIZES)
CONFIG = ModelConfig.from_dict(RAW).with_map(MAPS[1])
SOME = pytest.mark.one_in(12)  # of them all
HIDDEN = 4 * CONFIG.hidden_size  # bytes of a token's hidden state in float32
# Bytes of the norms: two of each block, and the last. A share has some of them.
NORMS = 4 * CONFIG.hidden_size * (2 * CONFIG.num_hidden_layers + 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "32", RAW, tiny_weights(RAW, 3))


def counted(path: Path | str, plan: str, how: str, folder: Path) -> list[Found]:
    """What each machine found, by rank."""
    machines, *flags = how.split()
    words = [str(COUNTS), str(path), plan, str(folder / "found.json"), *flags]
    ended = run(words, int(machines), folder, timeout=120.0)
    assert [(each.code, each.err) for each in ended] == [(0, "")] * int(machines)
    files = (folder / f"found.{rank}" for rank in range(int(machines)))
    return [json.loads(file.read_text()) for file in files]


def check_bytes(found: Found, slack: int) -> None:
    """slack: bytes of the norms, which no prediction counts."""
    predicted, slack = found["predicted"], slack + 64  # and single numbers
    assert predicted <= found["held"] <= predicted + slack
    assert found["peak"] <= predicted + found["transient"] + slack


@pytest.mark.parametrize("machines", [2, 3, 4])
@SOME
def test_a_pipeline(machines: int, path: Path, tmp_path: Path) -> None:
    """As `mlx-cerebrum plan --ranks` says beforehand."""
    found = counted(path, LONG, str(machines), tmp_path)
    said = share_out(CONFIG.layer_map, CONFIG, Sharing(machines))
    for rank, (one, expected) in enumerate(zip(found, said["machines"], strict=True)):
        last = rank == machines - 1
        assert expected["sent_messages_per_token"] == (1 if last else 2)
        announced = 0 if last else said["announcement_bytes"]
        assert one["messages"] == TOKENS * expected["sent_messages_per_token"]
        assert one["bytes"] == TOKENS * (announced + HIDDEN)
        assert one["sums"] == 0
        assert one["blocks"] == expected["blocks"]
        check_bytes(one, NORMS)


@pytest.mark.parametrize("how", ["2", "2 --split 3,1"])
@SOME
def test_tensor_parallel(how: str, path: Path, tmp_path: Path) -> None:
    lead, other = counted(path, LONG, f"{how} --tensor-parallel", tmp_path)
    said = share_out(CONFIG.layer_map, CONFIG, Sharing(2))
    sums = said["projection"]["sums_per_token"]
    assert (lead["messages"], lead["sums"]) == (2 * TOKENS, sums * TOKENS)
    assert (other["messages"], other["sums"]) == (0, sums * TOKENS)
    for one in (lead, other):
        assert one["blocks"] == list(range(32))
        check_bytes(one, NORMS)


@pytest.mark.long
def test_of_the_demo_each_holds_half(tmp_path: Path) -> None:
    found = counted("demo", "demo-interleaved", "2", tmp_path)
    assert sorted(block for one in found for block in one["blocks"]) == list(range(30))
    for one in found:
        check_bytes(one, 31 * 2 * 4 * 576)
