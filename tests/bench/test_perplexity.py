"""bench.perplexity: the number is right, and windows score what they should."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint

from bench import perplexity
from bench.likelihood import losses, strided, windows
from mlx_cerebrum import load
from mlx_cerebrum.errors import RequestError

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.mark.parametrize("start", [[], [1]])
def test_sliding_scores_each_token_once(start: list[int]) -> None:
    text = list(range(100, 200))
    chosen = windows(start, text, 16, 7)
    half = (16 - len(start)) // 2
    assert len(chosen) == 7
    assert all(window[: len(start)] == start for window in chosen)
    assert {len(window) for window in chosen} == {len(start) + 2 * half}
    scored = [token for window in chosen for token in window[-half:]]
    assert scored == text[half : 8 * half]
    # At least half a window of the text before each.
    assert all(window.index(window[-half]) - len(start) >= half for window in chosen)
    # Every second window is a strided one: together they are the text, without a gap.
    whole = [token for window in chosen[::2] for token in window[len(start) :]]
    assert whole == text[: 8 * half]
    assert strided(start, text, 16, 46) == chosen[::2]
    assert windows(start, text[:15], 17, 7) == []
    with pytest.raises(RequestError, match="15 tokens"):
        strided(start, text[:15], 17, 7)
    with pytest.raises(RequestError):
        windows(start, text, len(start) + 1, 1)


def test_the_report_is_the_logits_own_and_compares_with_the_first(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    paths = [str(checkpoint()), str(checkpoint("other"))]
    flags = ["--text", str(text), "--tokens", "30", "--context", "15"]
    assert perplexity.main(["--model", *paths, *flags]) == 0
    said = capsys.readouterr().out
    one, other = json.loads(said.splitlines()[-1])["results"].values()
    assert one["fox"] == other["fox"]
    assert one["bits_per_weight"] == 32.0
    assert "Tokens scored: 30 of fox." in said
    model, tokenizer = load(paths[0], dtype="float32")
    bos, *ids = tokenizer.encode(TEXT)
    expected = []
    for first in (0, 14, 28):
        window = [bos, *ids[first : first + 14]]
        logits = np.array(model(mx.array([window])), dtype=np.float64)[0]
        own = [
            math.log(np.exp(row).sum()) - row[token]
            for row, token in zip(logits, window[1:], strict=False)
        ]
        assert losses(model, window) == pytest.approx(own, abs=1e-4)
        expected += own
    assert one["fox"]["perplexity"] == pytest.approx(math.exp(np.mean(expected[:30])), rel=1e-4)
    assert (one["fox"]["more_nats"], one["fox"]["tokens"]) == (0.0, 30)
