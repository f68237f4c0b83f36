"""bench.perplexity: the number is right, and windows score what they should."""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint

from bench.perplexity import compare, lines, perplexity, report, stored_bits, token_losses
from mlx_cerebrum import load
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.weights.opening import open_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog"


def test_losses_are_the_logits_own(checkpoint: MakeCheckpoint) -> None:
    model, tokenizer = load(checkpoint(), dtype="float32")
    bos, *ids = tokenizer.encode(TEXT)
    expected = []
    for first in range(0, len(ids), 15):
        window = [bos, *ids[first : first + 15]]
        logits = np.array(model(mx.array([window])), dtype=np.float64)[0]
        for row, token in zip(logits, window[1:], strict=False):
            expected.append(math.log(np.exp(row).sum()) - row[token])
    found = token_losses(model, tokenizer, TEXT, context=16)
    assert len(found) == len(ids)
    assert found == pytest.approx(expected, abs=1e-4)
    assert token_losses(model, tokenizer, TEXT, tokens=7, context=16) == found[:7]


def test_perplexity_of_a_coin_is_two() -> None:
    assert perplexity([math.log(2)] * 5) == pytest.approx(2)
    more, error = compare([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (more, error) == (1.0, 0.0)  # paired: no spread in what each token costs more
    more, error = compare([1.0, 3.0], [0.0, 0.0])
    assert more == 2.0
    assert error == pytest.approx(1.0)


def test_the_standard_error_is_of_blocks() -> None:
    random = np.random.default_rng(1)
    hard = random.standard_normal(10)
    alike = np.repeat(hard, 32).tolist()  # 10 values, however many tokens say them
    more, error = compare(alike, [0.0] * 320)
    assert more == pytest.approx(hard.mean())
    assert error == pytest.approx(hard.std(ddof=1) / math.sqrt(10))
    # A last token alone is a block that weighs a 320th of the others' sum.
    assert compare([*alike, 5.0], [0.0] * 321)[1] == pytest.approx(error, rel=0.1)
    # Of fewer than 64, the tokens'.
    few = random.standard_normal(63)
    assert compare(few.tolist(), [0.0] * 63)[1] == pytest.approx(few.std(ddof=1) / math.sqrt(63))
    two = random.standard_normal(64)
    means = two.reshape(2, 32).mean(axis=1)
    assert compare(two.tolist(), [0.0] * 64)[1] == pytest.approx(abs(means[0] - means[1]) / 2)
    assert compare([2.0], [1.0]) == (1.0, math.inf)


def test_two_standard_errors_are_what_they_say_where_neighbours_are_alike() -> None:
    """Of means that are 0, about one in 20 lies more than two errors away; by tokens, one in 2."""
    random = np.random.default_rng(2)
    outside = 0
    for row in random.standard_normal((200, 1024)):
        more, error = compare(np.convolve(row, np.ones(8), "valid").tolist(), [0.0] * 1017)
        outside += abs(more) > 2 * error
    assert outside < 30


def test_a_text_without_a_token_is_refused(checkpoint: MakeCheckpoint) -> None:
    model, tokenizer = load(checkpoint(), dtype="float32")
    for text, context in (("", 16), (TEXT, 2)):
        with pytest.raises(RequestError):
            token_losses(model, tokenizer, text, context=context)


def test_the_report_compares_with_the_first(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    path = str(checkpoint())
    results = report([path, str(checkpoint("other"))], None, [text], 30, 16)
    one, other = results.values()
    assert one["fox"]["tokens"] == 30
    assert one["fox"]["more_nats"] == other["fox"]["more_nats"] == 0.0
    assert one["bits_per_weight"] == stored_bits(open_checkpoint(Path(path))) == 32.0
    assert "fox" in lines(results)[1]
