"""What a machine reads of a checkpoint: its blocks, or its part of each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint, tensors
from ranks_ring import MAPS, SIZES

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import ATTENTION_OUT, MLP_OUT, module_shapes, place
from mlx_cerebrum.ranks.announcement import View
from mlx_cerebrum.ranks.share import Columns, ShareCheckpoint
from mlx_cerebrum.ranks.shares import Shares
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import choose_storage


def share(whole: Checkpoint, *given: Any) -> ShareCheckpoint:
    return ShareCheckpoint(whole, whole.config, *given)


def test_blocks_are_counted_anew(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(**SIZES)
    stored, part = tensors(path), share(open_checkpoint(path), (5, 6, 2), False)
    assert {place(m)[0] for m in module_shapes(part.config) if place(m)} == {0, 1, 2}  # type: ignore[index]
    assert not any("embed" in name or "head" in name for name in part.shapes)
    for module in module_shapes(part.config):
        block, kind = place(module) or (0, "")
        wanted = stored[f"model.layers.{(5, 6, 2)[block]}.{kind}.weight"]
        np.testing.assert_array_equal(part.read(module)["weight"], wanted)
    part.check()


def test_the_lead_has_the_tables(checkpoint: MakeCheckpoint) -> None:
    whole = open_checkpoint(checkpoint(**SIZES))
    lead, rest = share(whole, (0, 1), True), share(whole, tuple(range(2, 8)), False)
    sizes = [choose_storage(each, None, "float32").nbytes for each in (lead, rest)]
    assert sum(sizes) == choose_storage(whole, None, "float32").nbytes
    lead.check()


@pytest.mark.parametrize("packing", [None, Packing(4, 32), Packing(8, 32)])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (1, 1, 2)])
def test_parts_of_a_block_make_the_block(
    heads: tuple[int, ...],
    packing: Packing | None,
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of what goes in, columns of what comes out, packed as dense."""
    whole = open_checkpoint(checkpoint(**SIZES))
    if packing is not None:
        dense, how = whole.read, packing
        monkeypatch.setattr(
            whole, "read", lambda m: dense(m) if "norm" in m else how.quantize(dense(m)["weight"])
        )
        monkeypatch.setattr(whole, "packing", lambda m: None if "norm" in m else how)
    parts = [share(whole, range(8), False, columns) for columns in Columns.all(whole.config, heads)]
    for module in module_shapes(parts[0].config):
        kind = (place(module) or (0, ""))[1]
        if "norm" in kind:
            continue
        axis = int(kind in (ATTENTION_OUT, MLP_OUT))
        read = [part.read(module) for part in parts]
        for name, array in whole.read(module).items():
            joined = mx.concatenate([each[name] for each in read], axis=axis)
            np.testing.assert_array_equal(joined, array)


def test_shares_that_cannot_be(checkpoint: MakeCheckpoint) -> None:
    config = open_checkpoint(checkpoint(**SIZES)).config
    with pytest.raises(RequestError, match="4 key/value heads; shares of 3, 2"):
        Columns.all(config, [3, 2])
    with pytest.raises(RequestError, match="evenly to 3 machines"):
        Columns.even(config, 3)
    small = open_checkpoint(checkpoint("small", **(SIZES | {"intermediate_size": 96}))).config
    with pytest.raises(RequestError, match="MLP of 96 columns"):
        Columns.even(small, 2)


def test_a_group_is_not_cut_through(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key/value head of 16 with its two query heads are 32 columns, half of a group of 64."""
    whole = open_checkpoint(checkpoint(**(SIZES | {"head_dim": 16})))
    packing = Packing(4, 64)
    monkeypatch.setattr(whole, "packing", lambda m: None if "norm" in m else packing)
    with pytest.raises(RequestError, match="would cut through"):
        share(whole, range(8), False, Columns.all(whole.config, (3, 1))[0])


SHORT, LONG = MAPS


def test_each_machine_runs_its_part_of_every_order() -> None:
    blocks = tuple(range(16)), tuple(range(16, 32))
    shares = Shares(blocks, LONG, (28,))
    assert shares.cut(LONG) == (28,)
    assert shares.cut(SHORT) == (16,)
    for order in (LONG, SHORT):
        view = View(0, order, shares.cut(order))
        whole = [blocks[rank][i] for rank in (0, 1) for i in shares.local(view, rank)]
        assert tuple(whole) == order


def test_caches_may_take_what_the_machine_with_least_has() -> None:
    blocks = tuple(range(16)), tuple(range(16, 32))
    assert Shares(blocks, LONG, (28,)).most([100, 50]) == 100
    assert Shares(blocks, LONG, (42,)).most([90, 50]) == 120
    every = (tuple(range(32)),) * 2
    assert Shares(every, LONG, (), (3, 1)).most([90, 20]) == 80


def test_an_order_that_comes_back_is_refused() -> None:
    shares = Shares(((0, 1), (2, 3)), (0, 1, 2, 3), (2,))
    with pytest.raises(RequestError, match="can't be run by the machines in turn"):
        shares.cut((0, 2, 1, 3))


def test_a_machine_refuses_blocks_it_does_not_hold() -> None:
    shares = Shares(((0, 1), (2, 3)), (0, 1, 2, 3), (2,))
    with pytest.raises(ValueError, match="not in tuple"):
        shares.local(View(0, (0, 1, 2, 3), (3,)), 0)


def test_the_window_asked_for_is_the_shares(checkpoint: MakeCheckpoint) -> None:
    whole = open_checkpoint(checkpoint(**SIZES))
    config = ModelConfig.from_file(Path(whole.path) / "config.json")
    part = ShareCheckpoint(whole, replace(config, sliding_window=7), (0,), False)
    assert part.config.sliding_window == 7
