"""One decoder for all: each sequence says what it says alone and unguessed, in any company."""

import random
from types import SimpleNamespace

import pytest
from company import Company, Counted, tiny_views

from mlx_cerebrum.decoding import decoder

SHORT = (0, 1, 2, 3)
LONG = (0, 1, 1, 2, 2, 3)  # half of the blocks twice, as the 12.25B has them
VIEWS = {window: tiny_views(window, (SHORT, LONG)) for window in (12, None)}


def company(draw: random.Random, window: int | None) -> Company:
    """Settings drawn small, so that buffers fill up and are moved all the time."""
    return Company(
        draw, VIEWS[window], draw.choice([8, 64]), draw.choice([4, 16, 256]), draw.randint(1, 7)
    )


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", range(3))
def test_random_company(
    seed: int, window: int | None, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: ahead))
    there = company(random.Random(seed), window)
    monkeypatch.setattr(decoder, "STEP", there.step_size)
    monkeypatch.setattr(Counted, "made", 0)
    there.run(13)
    assert there.left == 13
    assert there.most > 2
    assert Counted.made > there.held > 0
