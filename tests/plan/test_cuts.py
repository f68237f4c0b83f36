"""Where a layer map is cut for several machines."""

import random
from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

import pytest

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.plan.cuts import choose_cuts, parse_split, segments, segments_of_view
from mlx_cerebrum.plan.layer_plan import LayerPlan

WHOLE = LayerPlan.named("cerebrum-12.25b").layer_map(32)
SEVEN = tuple(range(32))
# Of the real model in 4 bits: a block, a position's cache at the window, embedding and head.
REAL = (123e6, 16.8e6, 147e6)


@pytest.mark.parametrize("sizes", [(), REAL, (436e6, 16.8e6, 524e6)])
@pytest.mark.parametrize(
    ("machines", "cuts", "blocks"),
    [(1, (), (32,)), (2, (28,), (16, 16)), (3, (20, 36), (12, 8, 12)), (4, (12, 28, 44), (8,) * 4)],
)
def test_the_real_model(
    machines: int, cuts: tuple[int, ...], blocks: tuple[int, ...], sizes: tuple[float, ...]
) -> None:
    assert choose_cuts(WHOLE, (1.0,) * machines, *sizes) == cuts
    assert tuple(len(set(part)) for part in segments(WHOLE, cuts)) == blocks


def test_what_each_machine_runs() -> None:
    assert segments(WHOLE, (12, 44)) == (WHOLE[:12], WHOLE[12:44], WHOLE[44:])
    assert segments(WHOLE, ()) == (WHOLE,)


def test_the_larger_machine_gets_more() -> None:
    """Of 32 blocks 20 and 12: by 16 to 8 the nearest that no block is held twice for."""
    assert choose_cuts(WHOLE, (16.0, 8.0)) == (36,)
    assert choose_cuts(WHOLE, (8.0, 16.0)) == (20,)


def test_a_block_held_twice_where_else_a_part_would_not_fit() -> None:
    layer_map = (0, 1, 2, 3, 4, 1)  # only a cut at 1 holds none twice: 1 block and 4
    assert choose_cuts(layer_map, (4.0, 4.0)) == (1,)
    assert choose_cuts(layer_map, (3.0, 3.0)) == (3,)
    assert choose_cuts(layer_map, (2.0, 2.0)) == (1,)  # where nothing fits, as if all did


def test_nearly_equal_loads_are_cut_evenly_unless_memory_forbids() -> None:
    """Cut at 12 and 36 the fullest machine holds 1.88 GB, at 20 and 36 1.96."""
    assert choose_cuts(WHOLE, (2e9,) * 3, *REAL) == (20, 36)
    assert choose_cuts(WHOLE, (1.9e9,) * 3, *REAL) == (12, 36)


def test_what_machine_0_holds_besides_counts() -> None:
    assert choose_cuts(SEVEN, (23.0, 23.0), first_bytes=10.0) == (13,)  # 23 and 19 blocks' worth
    assert choose_cuts(SEVEN, (1.0, 1.0), first_bytes=1.0) == (16,)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_cuts_are_better(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        positions = rng.randint(1, 9)
        layer_map = [rng.randrange(6) for _ in range(positions)]
        memory = [rng.choice((1.0, 3.0, 4.0, 6.0, 8.0)) for _ in range(rng.randint(1, positions))]
        position, first = rng.choice((0.0, 0.1, 0.5)), rng.choice((0.0, 1.0))

        def judged(
            cuts: tuple[int, ...],
            layer_map: Sequence[int] = layer_map,
            memory: Sequence[float] = memory,
            position: float = position,
            first: float = first,
        ) -> tuple[bool, int, float, int]:
            parts = segments(layer_map, cuts)
            held = [len(set(part)) for part in parts]
            loads = [
                (blocks + position * len(part) + first * (machine == 0)) / memory[machine]
                for machine, (blocks, part) in enumerate(zip(held, parts, strict=True))
            ]
            return max(loads) > 1, sum(held), max(loads), sum(len(part) ** 2 for part in parts)

        every = [judged(cuts) for cuts in combinations(range(1, positions), len(memory) - 1)]
        least = min(every)
        alike = [j for j in every if j[:2] == least[:2] and j[2] <= 1.1 * least[2] + 1e-9]
        found = judged(choose_cuts(layer_map, memory, 1.0, position, first))
        assert found in alike
        assert found[3] == min(j[3] for j in alike)


def test_what_cannot_be_shared_out() -> None:
    for memory in ((), (1.0,) * 57):
        with pytest.raises(PlanError, match=f"to 1 to 56 machines, not {len(memory)}$"):
            choose_cuts(WHOLE, memory)
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="machine 1 has a memory of"):
            choose_cuts(WHOLE, (1.0, size))
    assert choose_cuts(WHOLE, (1.0,) * 56) == tuple(range(1, 56))


def test_a_split_as_written() -> None:
    assert parse_split("28", 56, 2) == (28,)
    assert parse_split(" 1, 55", 56, 3) == (1, 55)


@pytest.mark.parametrize(
    ("text", "machines", "said"),
    [
        ("28", 1, "--split '28': one machine runs all positions; leave it out"),
        ("", 2, "--split '' is not a list of positions such as 20,36"),
        ("20;36", 3, "--split '20;36' is not a list of positions such as 20,36"),
        ("20,", 3, "--split '20,' is not a list of positions such as 20,36"),
        ("-1", 2, "--split '-1' is not a list of positions such as 20,36"),
        ("2.5", 2, "--split '2.5' is not a list of positions such as 20,36"),
        ("\u0662", 2, "--split '\u0662' is not a list of positions such as 20,36"),
        ("2\n,x", 2, "--split '2\\n,x' is not a list of positions such as 20,36"),
        ("28", 3, "--split '28' cuts at 1 position; 3 machines need 2"),
        ("20,36", 2, "--split '20,36' cuts at 2 positions; 2 machines need 1"),
        ("0", 2, "--split '0': can't cut at 0; the 56 positions can be cut at 1 to 55"),
        ("20,56", 3, "--split '20,56': can't cut at 56; the 56 positions can be cut at 1 to 55"),
        ("36,20", 3, "--split '36,20': 20 comes after 36; positions must ascend"),
        ("20,20", 3, "--split '20,20': 20 comes after 20; positions must ascend"),
    ],
)
def test_a_split_that_cannot_be(text: str, machines: int, said: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse_split(text, 56, machines)
    assert str(raised.value) == said


def test_a_split_of_any_length_is_refused_in_a_short_line() -> None:
    for text in ("9" * 10**6, ",".join("1" * 10**5)):
        with pytest.raises(PlanError) as raised:
            parse_split(text, 56, 3)
        assert len(str(raised.value)) < 200


def held(*cuts: int) -> list[set[int]]:
    return [set(part) for part in segments(WHOLE, cuts)]


def test_the_7b_on_the_machines_of_the_whole() -> None:
    for cuts, lengths in (((28,), [16, 16]), ((20, 36), [12, 8, 12]), ((12, 28, 44), [8] * 4)):
        found = segments_of_view(SEVEN, held(*cuts))
        assert found is not None
        assert [len(part) for part in found] == lengths
        assert sum(found, ()) == SEVEN
        assert all(set(part) <= has for part, has in zip(found, held(*cuts), strict=True))


def test_a_view_that_no_cuts_share_out() -> None:
    assert segments_of_view(WHOLE[::-1], held(28)) is None  # in the other order of machines
    assert segments_of_view((0, 32), held(28)) is None  # a block that nobody holds
    assert segments_of_view((0, 31, 0), held(28)) is None  # back to machine 0


def test_a_machine_without_positions_only_where_it_must_be() -> None:
    assert segments_of_view((0, 1, 2), held(28)) == ((0, 1, 2), ())
    assert segments_of_view((30, 31), held(20, 36)) == ((), (), (30, 31))
    assert segments_of_view((5,), [{5}, {5}]) in (((5,), ()), ((), (5,)))
    assert segments_of_view((5, 5), [{5}, {5}]) == ((5,), (5,))
    assert segments_of_view((), held(28)) == ((), ())


@pytest.mark.parametrize("seed", range(4))
def test_a_view_is_shared_out_wherever_it_can_be(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        view = tuple(rng.randrange(4) for _ in range(rng.randint(0, 7)))
        holds = [set(rng.sample(range(4), rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
        every = combinations_with_replacement(range(len(view) + 1), len(holds) - 1)
        possible = [
            parts
            for parts in (segments(view, cuts) for cuts in every)
            if all(set(part) <= has for part, has in zip(parts, holds, strict=True))
        ]

        def judged(parts: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
            return parts.count(()), sum(len(part) ** 2 for part in parts)

        found = segments_of_view(view, holds)
        assert (found is None) == (not possible)
        if found is not None:
            assert found in possible
            assert judged(found) == min(map(judged, possible))
