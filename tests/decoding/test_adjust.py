"""Logits changed before a choice: what each setting does, beside mlx-lm, and in any company."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors

from mlx_cerebrum.decoding.sampling import GREEDY, Adjust, Sampling
from mlx_cerebrum.errors import RequestError

V = 12
TOKENS = st.integers(0, V - 1)
ROW = st.lists(st.floats(-30, 30, width=16), min_size=V, max_size=V)
PENALTIES = st.floats(-2, 2, width=32)


def adjust(sampling: Sampling, prompt: list[int], ends: tuple[int, ...] = (2,)) -> Adjust:
    made = sampling.adjust(prompt, ends)
    assert made is not None
    return made


def ids(tokens: list[int]) -> mx.array:
    return mx.array(tokens, dtype=mx.int32)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[float]]]:
    """A prompt, an answer, and logits after the prompt and after each token of the answer."""
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=8))
    answer = draw(st.lists(TOKENS, max_size=8))
    return prompt, answer, [draw(ROW) for _ in range(len(answer) + 1)]


SAMPLINGS = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    repetition_context=st.integers(1, 20),
    frequency_penalty=st.just(0.0) | PENALTIES,
    presence_penalty=st.just(0.0) | PENALTIES,
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100, width=32)).map(
        lambda biases: tuple(biases.items())
    ),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
)


def one_row(sampling: Sampling, prompt: list[int], answer: list[int], row: list[float]) -> Any:
    """The same in plain words."""
    logits = np.array(row, dtype=np.float32)
    for token, bias in sampling.logit_bias:
        logits[token] += np.float32(bias)
    penalty = np.float32(sampling.repetition_penalty)
    for token in set([*prompt, *answer][-sampling.repetition_context :]):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(answer):
        logits[token] -= np.float32(sampling.frequency_penalty) * np.float32(answer.count(token))
        logits[token] -= np.float32(sampling.presence_penalty)
    if sampling.ignore_eos or len(answer) < sampling.min_tokens:
        logits[[2, 5]] = -math.inf
    return logits


@settings(deadline=None)
@given(SAMPLINGS, answers(), st.data())
@slow
def test_rows_together_are_rows_one_at_a_time(
    sampling: Sampling, case: tuple[list[int], list[int], list[list[float]]], data: st.DataObject
) -> None:
    prompt, answer, rows = case
    change = sampling.adjust(prompt, (2, 5))
    expected = [one_row(sampling, prompt, answer[:n], row) for n, row in enumerate(rows)]
    if change is None:
        assert np.array_equal(expected, np.array(rows, dtype=np.float32))
        return
    dtype = data.draw(st.sampled_from([mx.float16, mx.float32]))
    tokens, start = [*prompt, *answer], 0
    while start < len(rows):
        end = data.draw(st.integers(start + 1, len(rows)))
        logits = mx.array(rows[start:end]).astype(dtype)
        before, after = len(prompt) - 1 + start, len(prompt) - 1 + end
        got = change(logits, tokens[:before], ids(tokens[before:after]), start)
        assert got.dtype == mx.float32
        assert np.array_equal(np.array(got), expected[start:end])
        assert np.array_equal(np.array(logits), np.array(rows[start:end], dtype=np.float16))
        start = end


# Beside mlx-lm's, which take all tokens so far.


@settings(deadline=None)
@given(ROW, st.lists(TOKENS, min_size=2, max_size=30), st.integers(1, 40), st.floats(0.1, 10))
def test_repetition_as_mlx_lm(
    row: list[float], tokens: list[int], context: int, penalty: float
) -> None:
    [theirs] = make_logits_processors(repetition_penalty=penalty, repetition_context_size=context)
    change = Sampling(repetition_penalty=penalty, repetition_context=context)
    if penalty != 1:
        ours = adjust(change, tokens[:-1])(mx.array([row]), tokens[:-1], ids(tokens[-1:]), 1)
        assert np.array_equal(np.array(ours), np.array(theirs(ids(tokens), mx.array([row]))))


@settings(deadline=None)
@given(ROW, st.dictionaries(TOKENS, st.floats(-100, 100, width=32), min_size=1))
def test_logit_bias_as_mlx_lm(row: list[float], biases: dict[int, float]) -> None:
    [theirs] = make_logits_processors(logit_bias=biases)
    ours = adjust(Sampling(logit_bias=tuple(biases.items())), [1])(mx.array([row]), [], ids([1]), 0)
    assert np.array_equal(np.array(ours), np.array(theirs(ids([1]), mx.array([row]))))


@settings(deadline=None)
@given(ROW, st.lists(TOKENS, min_size=1, max_size=20), PENALTIES.filter(bool))
def test_frequency_and_presence_as_mlx_lm(
    row: list[float], answer: list[int], penalty: float
) -> None:
    """For an answer that is no longer than its 20 tokens, to no prompt."""
    for name in ("frequency_penalty", "presence_penalty"):
        asked: dict[str, Any] = {name: penalty}
        [theirs] = make_logits_processors(**asked)
        change = adjust(Sampling(**asked), [])
        ours = change(mx.array([row]), answer[:-1], ids(answer[-1:]), len(answer))
        expected = np.array(theirs(ids(answer), mx.array([row])))
        assert np.allclose(np.array(ours), expected, rtol=1e-6, atol=1e-5)  # it subtracts each time


# By hand.


def test_what_counts_for_which() -> None:
    """Repetition: the last tokens of both. Frequency and presence: the answer."""
    logits = mx.full((1, V), 4.0)
    prompt, seen, last = [3, 3, 4], [3, 3, 4, 5, 5, 6], ids([5])

    def changed(**asked: Any) -> dict[int, float]:
        row: Any = adjust(Sampling(**asked), prompt)(logits, seen, last, 4)[0].tolist()
        return {token: value for token, value in enumerate(row) if value != 4}

    assert changed(repetition_penalty=2.0) == {3: 2, 4: 2, 5: 2, 6: 2}
    assert changed(repetition_penalty=2.0, repetition_context=2) == {5: 2, 6: 2}
    assert changed(repetition_penalty=2.0, repetition_context=10**30) == {3: 2, 4: 2, 5: 2, 6: 2}
    assert changed(frequency_penalty=0.5) == {5: 2.5, 6: 3.5}
    assert changed(presence_penalty=-1.0) == {5: 5, 6: 5}
    assert changed(logit_bias=((7, -100.0), (0, 1.0))) == {0: 5, 7: -96}
    assert changed(min_tokens=5) == {2: -math.inf}
    assert changed(ignore_eos=True) == {2: -math.inf}


def test_an_end_token_waits_for_its_row() -> None:
    logits = mx.zeros((4, V))
    change = adjust(Sampling(min_tokens=3), [1], (2, 10**9))  # a checkpoint may name any
    ends = np.isinf(np.array(change(logits, [1, 4], ids([4, 4, 4, 4]), 1)))
    assert ends[:, 2].tolist() == [True, True, False, False]
    assert ends.sum() == 2
    never = adjust(Sampling(ignore_eos=True, logit_bias=((2, 100.0),)), [1], (2,))
    assert np.isinf(np.array(never(logits, [1, 4], ids([4, 4, 4, 4]), 1)))[:, 2].all()
    only = adjust(Sampling(min_tokens=3), [1], (V,))
    assert np.array_equal(np.array(only(logits, [], ids([1, 4, 4, 4]), 0)), np.array(logits))


@pytest.mark.parametrize("penalty", [5e-324, 1e-3, 1e3, 1e308])
def test_penalties_of_any_size_leave_numbers(penalty: float) -> None:
    logits = mx.array([[65504.0, -65504.0, 0.0, -math.inf]], dtype=mx.float16)
    change = adjust(Sampling(repetition_penalty=penalty), [0, 1, 2, 3])
    got = np.array(change(logits, [0, 1, 2], ids([3]), 0))[0]
    assert np.isfinite(got[:3]).all()
    assert np.isneginf(got[3])


def test_the_newest_tokens_are_not_waited_for() -> None:
    """They may still be being computed: here they never are, and reading one would raise."""
    sampling = Sampling(0.5, repetition_penalty=1.1, frequency_penalty=1, min_tokens=9)
    change = adjust(sampling, [1, 2])
    traced = mx.compile(lambda inputs, logits: change(logits, [1, 2, 3], inputs, 2))
    assert traced(ids([4, 5]), mx.zeros((2, V))).shape == (2, V)


def test_nothing_asked_is_nothing_to_do() -> None:
    assert GREEDY.adjust([1], (2,)) is None
    assert Sampling(0.7, 0.9, 0.1, 3, 40, repetition_context=9).adjust([1], (2,)) is None
    assert Sampling(min_tokens=3, ignore_eos=True).adjust([1], ()) is None


def test_a_bias_must_be_of_the_vocabulary() -> None:
    sampling = Sampling(logit_bias=((3, 1.0), (V, 1.0)))
    sampling.check_vocabulary(V + 1)
    with pytest.raises(RequestError, match="logit-bias: token id 12 is not below 12"):
        sampling.check_vocabulary(V)
    with pytest.raises(RequestError, match="logit-bias: token id 12 is not below 12"):
        adjust(sampling, [1])(mx.zeros((1, V)), [], ids([1]), 0)
