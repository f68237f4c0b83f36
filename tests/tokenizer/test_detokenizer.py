"""Streaming: pieces joined are the decoded text, for any ids, as early as they are final."""

from functools import cache

import pytest
import sentencepiece
import tokenizers
from conftest import mistral_model, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.detokenizer import PER_BYTE, PER_SEQUENCE, StreamingDetokenizer, decode
from mlx_cerebrum.tokenizer.sentencepiece_model import SentencePieceVocabulary
from mlx_cerebrum.tokenizer.tokenizer_json import parse
from mlx_cerebrum.tokenizer.vocabulary import TokenizersVocabulary, byte_symbols

BYTE_0 = 3  # the id of <0x00> in Mistral's vocabulary


@pytest.fixture(scope="module")
def mistral() -> SentencePieceVocabulary:
    return SentencePieceVocabulary(mistral_model().read_bytes(), "tokenizer.model.v1")


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    """The 256 bytes in order, then a control token, a merge, and a token that is plain text."""
    symbols = sorted(byte_symbols(), key=lambda symbol: byte_symbols()[symbol])
    vocab = {token: i for i, token in enumerate([*symbols, "<|end|>", "hi"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("h", "i")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["a b\u00e9"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_level(library: tokenizers.Tokenizer) -> TokenizersVocabulary:
    return TokenizersVocabulary(parse(library.to_str(), "here"), "here")


def streamed(detokenizer: StreamingDetokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.add, ids), detokenizer.finish()]


mistral_ids = st.lists(
    st.one_of(
        st.sampled_from([0, 1, 2, 28705, 415, 259, 13]),
        st.integers(BYTE_0, BYTE_0 + 255),
        # Lead and trail bytes of longer characters.
        st.sampled_from([BYTE_0 + byte for byte in (0xC3, 0xE2, 0xED, 0xF0, 0x9F, 0x98, 0x80)]),
        st.integers(0, 31999),
    ),
    max_size=12,
)


@cache
def reference(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@settings(deadline=None, max_examples=400)
@given(ids=mistral_ids)
@slow
def test_any_ids_decode_as_sentencepiece_does(
    mistral: SentencePieceVocabulary, ids: list[int]
) -> None:
    oracle = reference(mistral.model).decode(ids)
    assert "".join(streamed(mistral.detokenizer(32000), ids)) == oracle
    assert decode(mistral.detokenizer(32000), ids) == oracle


@settings(deadline=None, max_examples=400)
@given(
    ids=st.lists(
        st.one_of(
            st.integers(0, 258),
            st.sampled_from([0xC3, 0xA9, 0xE2, 0x82, 0xED, 0xA0, 0xF0, 0x9F, 256, 258]),
        ),
        max_size=12,
    )
)
@slow
def test_any_ids_decode_as_tokenizers_does(
    byte_level: TokenizersVocabulary, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    oracle = library.decode(ids, skip_special_tokens=True)
    assert "".join(streamed(byte_level.detokenizer(259), ids)) == oracle


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_survives_byte_by_byte(byte_level: TokenizersVocabulary, text: str) -> None:
    pieces = streamed(byte_level.detokenizer(259), list(text.encode()))
    assert "".join(pieces) == text
    # Each character comes out with its last byte, not later.
    assert [len(piece) for piece in pieces if piece] == [1] * len(text)


def test_only_the_first_space_is_stripped(mistral: SentencePieceVocabulary) -> None:
    the = mistral.encode("The")
    assert streamed(mistral.detokenizer(32000), [1, *the, *the]) == ["", "The", " The", ""]


def test_an_emoji_waits_for_its_last_byte(mistral: SentencePieceVocabulary) -> None:
    ids = [BYTE_0 + byte for byte in "😀".encode()]
    assert streamed(mistral.detokenizer(32000), ids) == ["", "", "", "😀", ""]


def test_broken_bytes(mistral: SentencePieceVocabulary, byte_level: TokenizersVocabulary) -> None:
    half = [0xF0, 0x9F, 0x98]
    sentencepiece_half = [BYTE_0 + byte for byte in half]
    assert streamed(mistral.detokenizer(32000), sentencepiece_half)[-1] == "\ufffd" * 3
    assert streamed(byte_level.detokenizer(259), half)[-1] == "\ufffd"
    # A byte that cannot go on is final at once.
    assert streamed(mistral.detokenizer(32000), [BYTE_0 + 0xFF]) == ["\ufffd", ""]
    assert streamed(byte_level.detokenizer(259), [0xFF]) == ["\ufffd", ""]


def test_a_control_token_splits_bytes_only_in_sentencepiece(
    mistral: SentencePieceVocabulary, byte_level: TokenizersVocabulary
) -> None:
    assert streamed(mistral.detokenizer(32000), [BYTE_0 + 0xC3, 2, BYTE_0 + 0xA9])[1] == "\ufffd"
    assert streamed(byte_level.detokenizer(259), [0xC3, 256, 0xA9]) == ["", "", "é", ""]


def test_ids_outside_the_vocabulary(mistral: SentencePieceVocabulary) -> None:
    with pytest.raises(TokenizerError, match="32000 is outside the vocabulary of 32000"):
        mistral.detokenizer(32000).add(32000)
    with pytest.raises(TokenizerError, match="-1 is outside"):
        mistral.detokenizer(32000).add(-1)
    # Padding rows of the model's embedding add nothing.
    assert decode(mistral.detokenizer(32064), [32000, 415, 32063]) == "The"


@pytest.mark.parametrize(("errors", "shown"), [(PER_BYTE, 2), (PER_SEQUENCE, 1)])
def test_the_two_spellings_of_broken_bytes(errors: str, shown: int) -> None:
    detokenizer = StreamingDetokenizer(lambda token: b"\xe2\x82", 1, errors)
    assert streamed(detokenizer, [0]) == ["", "\ufffd" * shown]
