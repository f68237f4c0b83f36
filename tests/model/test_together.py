"""Steps of several sequences: each must get what it gets alone, whatever else is there."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from tiny import tiny_config, tiny_weights

from mlx_cerebrum import device
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.rows import Rows
from mlx_cerebrum.model.together import Part, run_together

BLOCKS = 4
MAPS = ((0, 1, 2, 3), (0, 1, 2, 1, 2, 3), (0, 2, 3))
SCALES = tuple((1.0, 1.0) if i % 2 else (0.7, 0.5) for i in range(6))


def tiny_views(window: int | None) -> list[Model]:
    """Four plans over the same four blocks, the last with scales."""
    raw = tiny_config(num_hidden_layers=BLOCKS, sliding_window=window, head_dim=32)
    model = Model(ModelConfig.from_dict(raw))
    model.update(tree_unflatten([(k, mx.array(v)) for k, v in tiny_weights(raw, 3).items()]))
    return [*(model.view(m) for m in MAPS), model.view(MAPS[1], SCALES)]


@dataclass
class Alone:
    """A sequence and what its next logits must be."""

    model: Model
    own: list[WindowedKVCache]
    tokens: list[int] = field(default_factory=list)

    def expected(self, new: Sequence[int]) -> mx.array:
        """Logits after each of `new`, from the whole sequence without a cache."""
        whole = mx.array([[*self.tokens, *new]])
        return self.model(whole)[0, -len(new) :]


@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.one_in(8)
def test_a_sequence_gets_what_it_gets_alone(window: int | None, seed: int) -> None:
    """Rows join, leave, guess, take guesses back and share steps with prompts being read."""
    draw = random.Random(seed)
    views = tiny_views(window)
    rewind, step = 5, 6  # so that buffers fill up all the time

    def fresh(model: Model) -> Alone:
        caches = [WindowedKVCache(window, rewind, step) for _ in model.config.layer_map]
        return Alone(model, caches)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 256) for _ in range(count)]

    alone: list[Alone] = []
    groups: dict[int, tuple[Rows, list[Alone]]] = {}  # by view
    for _ in range(60):
        action = draw.random()
        if action < 0.2 and len(alone) < 3:
            alone.append(fresh(draw.choice(views)))
        elif action < 0.4:
            for sequence in [s for s in alone if s.tokens][:1]:
                name = id(sequence.model)
                rows, members = groups.setdefault(name, (Rows(sequence.own), []))
                rows.join(sequence.own)
                members.append(sequence)
                alone.remove(sequence)
        elif action < 0.5 and groups:
            name = draw.choice(list(groups))
            rows, members = groups[name]
            row = draw.randrange(len(rows))
            rows.leave(row)
            alone.append(members.pop(row))
            if not members:
                del groups[name]
            assert alone[-1].own[0].offset == len(alone[-1].tokens)
        parts: list[Part] = []
        wanted: list[list[tuple[Alone, list[int]]]] = []
        lengths: list[tuple[Rows, list[int]]] = []
        for sequence in alone[:2]:
            new = ids(draw.choice([1, 1, 3, 9]))
            parts.append(Part(sequence.model, mx.array([new]), sequence.own))
            wanted.append([(sequence, new)])
        for rows, members in groups.values():
            several = [ids(draw.choice([1, 1, 1, 4])) for _ in members]
            most = max(map(len, several))
            padded = [new + [0] * (most - len(new)) for new in several]
            rows.begin([len(new) for new in several])
            parts.append(Part(members[0].model, mx.array(padded), rows.caches))
            wanted.append(list(zip(members, several, strict=True)))
            lengths.append((rows, [len(new) for new in several]))
        if not parts:
            continue
        hidden = run_together(parts)
        for rows, _ in lengths:
            rows.commit()
        for part, h, sequences in zip(parts, hidden, wanted, strict=True):
            logits = part.model.logits(h)
            for row, (sequence, new) in enumerate(sequences):
                expected = sequence.expected(new)
                got = logits[row, : len(new)]
                np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-4)
                sequence.tokens += new
        for rows, counts in lengths:
            members = next(m for r, m in groups.values() if r is rows)
            back = [draw.randrange(count + 1) for count in counts]
            rows.take_back(back)
            for sequence, count in zip(members, back, strict=True):
                sequence.tokens = sequence.tokens[: len(sequence.tokens) - count]
                assert rows.offsets[members.index(sequence)] == len(sequence.tokens)


def test_a_cpu_computes_while_the_rest_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has the step before to compute."""
    one, other, *_ = tiny_views(None)
    begun: list[mx.array] = []
    monkeypatch.setattr(mx, "async_eval", begun.append)
    for backend, expected in {"cpu": 1, "metal": 0}.items():  # of 6 positions, after the fourth
        monkeypatch.setattr(device, "backend", lambda backend=backend: backend)
        begun.clear()
        run_together([Part(m, mx.array([[5]]), m.make_cache()) for m in (one, other)])
        assert len(begun) == expected
