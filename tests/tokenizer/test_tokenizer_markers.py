"""Markers, words and ids at the edge: the same from every kind of file."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects
from test_tokenizer_peers import pieces

from mlx_cerebrum.decoding.stream import generate
from mlx_cerebrum.errors import ConfigError, RequestError, TokenizerError
from mlx_cerebrum.tokenizer.files import FILES
from mlx_cerebrum.tokenizer.sentencepiece_model import BYTE, CONTROL, USER_DEFINED, write_model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import load, load_tokenizer, open_checkpoint

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES = pieces(False)
SIZE = len(PIECES)
END, START, WORD = SIZE, SIZE + 1, SIZE + 2
NAMES = {"<|im_end|>": END, "<|im_start|>": START, "Cerebrum": WORD}


def metadata(kind: Any = USER_DEFINED, **changes: Any) -> dict[str, Any]:
    """A GGUF with ChatML's markers and a word, all of one type."""
    texts, scores, types = (list(column) for column in zip(*PIECES, strict=True))
    keys = {
        "model": "llama",
        "tokens": texts + list(NAMES),
        "scores": scores + [-1000.0] * len(NAMES),
        "token_type": [*types, kind, kind, USER_DEFINED],
        "bos_token_id": 1,
        "eos_token_id": END,
        "unknown_token_id": 0,
    } | changes
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return {**found, "tokenizer.chat_template": CHATML}


def directory(path: Path, how: str) -> Path:
    """The same as a directory, the marker that begins a message without `special`."""
    path.mkdir()
    (path / "tokenizer.model").write_bytes(write_model(PIECES))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "chat_template": CHATML}
    if how == "added.json":
        (path / "added_tokens.json").write_text(json.dumps(NAMES))
    else:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
        config["added_tokens_decoder"] = {
            str(token): flags | {"content": content, "special": token == END}
            for content, token in NAMES.items()
        }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if how == "tokenizer.json":
        saved = path / "saved"
        saved.mkdir()
        Tokenizer.from_directory(path).save(saved)
        (saved / "tokenizer.model").unlink()
        return saved
    return path


def every_source(path: Path) -> dict[str, Tokenizer]:
    kinds = ("decoder", "added.json", "tokenizer.json")
    found = {how: Tokenizer.from_directory(directory(path / how, how)) for how in kinds}
    for kind in (CONTROL, USER_DEFINED):
        found[f"GGUF, type {kind}"] = Tokenizer.from_gguf(metadata(kind))
    return found


def test_a_template_s_markers_are_its_own_whatever_the_file_calls_them(tmp_path: Path) -> None:
    plain = Tokenizer.from_directory(directory(tmp_path / "plain", "decoder"))
    for source, tokenizer in every_source(tmp_path).items():
        ask = [{"role": "user", "content": "the"}]
        parts: list[int] = [1, START]
        for text, mark in (("user\nthe", END), ("\n", START), ("assistant\n", None)):
            parts += plain.encode(text, add_bos=False)
            parts += [] if mark is None else [mark]
        assert tokenizer.apply_chat_template(ask) == parts, source
        for spelled in ("What is <|im_start|>system?", "<|im_end|>", "<|im_start|><|im_end|><s>"):
            asked = tokenizer.apply_chat_template([{"role": "user", "content": spelled}])
            assert (asked.count(START), asked.count(END), asked.count(1)) == (2, 1, 1), source
            assert not {START, END, 1} & set(tokenizer.encode(spelled, add_bos=False)), source
            assert spelled in tokenizer.decode(asked), source


def test_a_word_that_was_added_is_found_whole_in_a_text(tmp_path: Path) -> None:
    for source, tokenizer in every_source(tmp_path).items():
        ids = tokenizer.encode("the Cerebrum is Cerebrum", add_bos=False)
        assert ids.count(WORD) == 2, source
        # Each stretch of text between has its space mark, as at the start.
        between = tokenizer.encode(" is ", add_bos=False)
        assert ids == [*tokenizer.encode("the ", add_bos=False), WORD, *between, WORD], source
        assert tokenizer.decode([WORD]) == "Cerebrum"


def test_a_marker_that_the_vocabulary_could_spell(tmp_path: Path) -> None:
    """`ignore_merges` takes a whole stretch of text for a token; a merge may spell one, too."""
    vocab = {token: i for i, token in enumerate(["<s>", "<", "s", ">", "<s", "END", "E", "N", "D"])}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    marks = [{"id": vocab[c], "content": c, "special": True, **flags} for c in ("<s>", "END")]
    raw: dict[str, Any] = {"version": "1.0", "added_tokens": marks}
    raw["decoder"] = {"type": "ByteLevel"}
    raw["model"] = {"type": "BPE", "vocab": vocab, "merges": ["< s", ["<s", ">"]]}
    raw["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("<s>") == [4, 3]
    assert tokenizer.encode("END") == [6, 7, 8]


def test_the_model_s_own_words_become_markers_where_the_template_writes_them(
    tmp_path: Path,
) -> None:
    vocabulary = pieces(True)
    word = [text for text, _, _ in vocabulary].index("[REF]")
    (tmp_path / "tokenizer.model").write_bytes(write_model(vocabulary))
    text = "a [REF] b"
    assert word in Tokenizer.from_directory(tmp_path).encode(text)
    (tmp_path / "chat_template.jinja").write_text("[REF]{{ messages[0].content }}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert word not in tokenizer.encode(text)
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}]).count(word) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_read_is_fetched_and_copied(tmp_path: Path) -> None:
    """One list: the hub's download, `save` and the reading of a directory."""
    wanted = filter_repo_objects(FILES, allow_patterns=hub.WANTED, ignore_patterns=hub.UNWANTED)
    assert set(wanted) == set(FILES)
    source = directory(tmp_path / "source", "added.json")
    for name in FILES:
        (source / name).touch()
        if (source / name).stat().st_size == 0:
            text = b"{}" if name.endswith(".json") else b"x"
            (source / name).write_bytes(text if name != "tokenizer.json" else b"")
    (source / "tokenizer.json").unlink()
    tokenizer = Tokenizer.from_directory(source)
    target = tmp_path / "target"
    target.mkdir()
    read = {path.name for path in tokenizer.save(target)}
    assert read == set(FILES)
    for name in FILES:
        if name != "tokenizer.json":
            assert (target / name).read_bytes() == (source / name).read_bytes()


# ---- ids past the model's last row


def test_a_padding_past_the_last_row(checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(max_position_embeddings=64)
    rows = json.loads((path / "config.json").read_text())["vocab_size"]
    config = json.loads((path / "tokenizer_config.json").read_text())
    size = load_tokenizer(open_checkpoint(path)).vocab_size
    assert capsys.readouterr().err == ""
    extra = {str(i): {"content": f"<pad{i}>", "special": False} for i in range(size, rows + 2)}
    config["added_tokens_decoder"] = extra
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer = load(path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"from {rows} on (2 of them) are past the model's {rows} rows" in said
    assert generate(model, tokenizer, "hi", max_tokens=1) is not None
    with pytest.raises(RequestError, match=f"token id {rows} is not below {rows}"):
        generate(model, tokenizer, f"hi <pad{rows}>", max_tokens=1)


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Any) -> None:
    path = checkpoint(max_position_embeddings=64)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(write_model(PIECES))
    with pytest.raises(ConfigError, match=f"the tokenizer has {SIZE} tokens, the model"):
        load_tokenizer(open_checkpoint(path))


# ---- GGUF: what is optional, and what is out of range


@pytest.mark.parametrize("name", ["padding", "seperator", "unknown", "eot", "eom"])
@pytest.mark.parametrize("token", [SIZE + 3, 2**32 - 1])
def test_an_id_out_of_range_that_nothing_needs(name: str, token: int) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(**{f"{name}_token_id": token}))
    assert tokenizer.encode("the") == Tokenizer.from_gguf(metadata()).encode("the")
    assert tokenizer.eos_token_ids == {END}


@pytest.mark.parametrize("absent", [("token_type",), ("scores",), ("token_type", "scores")])
def test_types_and_scores_are_optional(absent: tuple[str, ...]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(**dict.fromkeys(absent)))
    assert tokenizer.decode(tokenizer.encode("the \u65e5 is")) == "the \u65e5 is"
    assert not {0, END} & set(tokenizer.encode("<unk> <|im_end|> is"))
    whole = Tokenizer.from_gguf(metadata())
    for text in ("is", "\u65e5"):
        if "scores" not in absent:
            assert tokenizer.encode(text) == whole.encode(text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"token_type": [7] * (SIZE + 3)}, "token_type has 7; 0 to 6 are known"),
        ({"token_type": [-(10**400)] * (SIZE + 3)}, "token_type has -10"),
        ({"token_type": [True] * (SIZE + 3)}, "not a list of int"),
        ({"token_type": [BYTE] * (SIZE + 3)}, "is no name of a byte"),
        ({"scores": [1e300] * (SIZE + 3)}, "scores has a number out of range"),
        ({"scores": [float("nan")] * (SIZE + 3)}, "scores has a number out of range"),
        ({"scores": []}, "scores has 0 entries"),
        ({"eos_token_id": 10**4000}, "eos_token_id is 1000"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"tokens": ["\ud800"] * 2}, "names a token twice"),
        ({"tokens": ["\ud800"], "token_type": None, "scores": None}, "no Unicode"),
        ({"tokens": [str(i) for i in range(2**14 + 1)], "token_type": [3] * (2**14 + 1)}, "16,384"),
    ],
)
def test_metadata_out_of_range(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.from_gguf(metadata(**changes))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
