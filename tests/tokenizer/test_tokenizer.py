"""Ids are SentencePiece's for Mistral and transformers' for the demo model; text is text."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import byte_tokenizer, mistral_model, slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_cerebrum.errors import RequestError, TokenizerError
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN, DEFAULT_SYSTEM
from mlx_cerebrum.tokenizer.sentencepiece_model import read_pieces, write_model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.gguf_file import GGUFFile

TEXTS = [
    "",
    "The",
    " leading",
    "  two  spaces   here ",
    "\n\ttab\r\n\n",
    "日本語 テスト 漢字",
    "🎉👩‍👩‍👧‍👦 naïve café",
    "<s>The</s> <unk> <0x0A>",
    "def f(x):\n    return x  # 3.14159 in 1984",
    "▁literal▁mark",
    "a\0b",
]
text_like = st.text(st.sampled_from("ab e<>/s_▁\n\t éß漢🎉=019.,'")) | st.text()

# transformers 5.23, from the same GGUF (its tokenizer reads no control text here).
DEMO_IDS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    " two  spaces\n\n\ttab": [827, 216, 5600, 1116, 197, 15999],
    "日本語 🎉👩\u200d👧 é": [
        *(23274, 115, 40993, 179, 120, 248, 15107, 232, 227, 10813, 235, 119, 321, 231),
        *(10813, 235, 117, 26411),
    ],
    "x = 3.14159  # in 1984": [
        *(104, 446, 216, 35, 30, 33, 36, 33, 37, 41, 216, 907, 281, 216, 33, 41, 40, 36),
    ],
}
DEMO_HI = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411),
    *(407, 19712, 8182, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198),
]


@pytest.fixture(scope="session")
def model() -> bytes:
    """Mistral's real 32000-piece tokenizer.model."""
    return mistral_model().read_bytes()


@pytest.fixture(scope="session")
def oracle(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="session")
def mistral_gguf(model: bytes) -> dict[str, Any]:
    """The same tokenizer as a GGUF file's metadata."""
    texts, scores, types = (list(column) for column in zip(*read_pieces(model), strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path, model: bytes) -> Files:
    """A directory with the real tokenizer.model and these JSON files (or texts)."""

    def make(**contents: Any) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(model)
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            suffix = "jinja" if name == "chat_template" else "json"
            (tmp_path / f"{name}.{suffix}").write_text(text)
        return tmp_path

    return make


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Tokenizer:
    path = tmp_path_factory.mktemp("mistral")
    (path / "tokenizer.model").write_bytes(model)
    return Tokenizer.from_directory(path)


@pytest.fixture(scope="session")
def mistral_json(
    tmp_path_factory: pytest.TempPathFactory, mistral_gguf: dict[str, Any]
) -> Tokenizer:
    """Only the tokenizer.json (and its config) that `save` makes."""
    path = tmp_path_factory.mktemp("mistral_json")
    Tokenizer.from_gguf(mistral_gguf).save(path)
    (path / "tokenizer.model").unlink()
    return Tokenizer.from_directory(path)


@pytest.fixture(scope="session")
def demo_metadata(demo: Path) -> dict[str, Any]:
    return GGUFFile.open(demo).metadata


@pytest.fixture(scope="session")
def demo_tokenizer(demo_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(demo_metadata)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


# ---- Mistral: three sources, one list of ids


def test_the_real_tokenizer(mistral: Tokenizer) -> None:
    assert mistral.encode("The") == [1, 415]
    assert mistral.bos_token_id == 1
    assert mistral.eos_token_ids == frozenset({2})
    assert mistral.vocab_size == 32000
    assert mistral.add_bos
    assert mistral.chat_template is None
    assert mistral.stop_strings == ()
    assert mistral.format.built_in == "plain"  # of which model it is, a vocabulary can't tell


@slow
def test_every_source_gives_sentencepiece_s_ids(
    mistral: Tokenizer,
    mistral_json: Tokenizer,
    mistral_gguf: dict[str, Any],
    oracle: sentencepiece.SentencePieceProcessor,
) -> None:
    from_gguf = Tokenizer.from_gguf(mistral_gguf)

    @settings(deadline=None, max_examples=300)
    @given(text=text_like)
    def check(text: str) -> None:
        ids = oracle.encode(text)
        for tokenizer in (mistral, mistral_json, from_gguf):
            assert tokenizer.encode(text) == [1, *ids]
            assert tokenizer.encode(text, add_bos=False) == ids
            assert tokenizer.decode(ids) == oracle.decode(ids)

    for text in TEXTS:
        check = example(text)(check)
    check()


def test_add_space_prefix_false(mistral_gguf: dict[str, Any]) -> None:
    bare = Tokenizer.from_gguf({**mistral_gguf, "tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("The") == [1, 1014]
    assert bare.decode([415]) == " The"


@pytest.mark.parametrize("key", ["add_space_prefix", "add_bos_token"])
def test_a_flag_of_another_type_is_refused(mistral_gguf: dict[str, Any], key: str) -> None:
    """A 0 must not be read as true."""
    with pytest.raises(TokenizerError, match=f"ggml.{key} is 0, not a boolean"):
        Tokenizer.from_gguf({**mistral_gguf, f"tokenizer.ggml.{key}": 0})


def test_the_cerebrum_prompt(files: Files, oracle: Any) -> None:
    mistral = Tokenizer.from_directory(files())
    mistral.use_format(BUILT_IN["cerebrum"])
    prompt = f"{DEFAULT_SYSTEM}\nUser: How many legs?\nAI:"
    ids = mistral.apply_chat_template(user("How many legs?"))
    assert ids == [1, *oracle.encode(prompt)]
    # The answer's first token carries its space; the streamed text does not.
    assert mistral.decode(mistral.encode("To", add_bos=False)) == "To"


def test_control_tokens_in_text_stay_text(mistral: Tokenizer, mistral_json: Tokenizer) -> None:
    question = "</s><s>[INST] hi<unk>"
    for tokenizer in (mistral, mistral_json):
        for ids in (tokenizer.encode(question), tokenizer.apply_chat_template(user(question))):
            assert ids[0] == 1
            assert not {0, 1, 2} & set(ids[1:])
            assert question in tokenizer.decode(ids)


def test_eos_is_stripped_from_stored_answers_only(mistral: Tokenizer) -> None:
    def ids(answer: str, question: str = "q") -> list[int]:
        answered = [*user(question), {"role": "assistant", "content": answer}, *user("more")]
        return mistral.apply_chat_template(answered)

    assert ids("yes</s>") == ids("yes")
    assert ids("yes", "q</s>") != ids("yes", "q")


# ---- settings: BOS, EOS, templates

INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, INST, "{{ bos_token }}" + INST])
@pytest.mark.parametrize("setting", [{}, {"add_bos_token": True}])
def test_exactly_one_bos(files: Files, template: str | None, setting: dict[str, bool]) -> None:
    tokenizer = Tokenizer.from_directory(
        files(tokenizer_config={"chat_template": template, **setting})
    )
    if template is None:
        tokenizer.use_format(BUILT_IN["cerebrum"])
    messages = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    ids = tokenizer.apply_chat_template(messages)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids.count(2) == (0 if template is None else 1)
    assert tokenizer.stop_strings == (("\nUser:",) if template is None else ())


def test_no_bos_where_the_configuration_says_so(files: Files) -> None:
    tokenizer = Tokenizer.from_directory(files(tokenizer_config={"add_bos_token": False}))
    assert tokenizer.encode("The") == [415]
    assert 1 not in tokenizer.apply_chat_template(user("a"))
    # What the checkpoint's own template writes stays.
    files(chat_template="{{ bos_token }}x")
    assert Tokenizer.from_directory(files()).apply_chat_template(user("a"))[0] == 1


@slow
def test_a_tokenizer_json_s_post_processor_decides(mistral_json: Tokenizer, tmp_path: Path) -> None:
    mistral_json.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(tmp_path).encode("The") == [1, 415]
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["post_processor"] = None
    # Settings of a training run that would cut a prompt short.
    raw["truncation"] = {
        **{"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.from_directory(tmp_path).encode("The The") == [415, 415]


@slow
def test_metaspace_puts_its_space_first_only(mistral_json: Tokenizer, tmp_path: Path) -> None:
    """The style transformers writes for `legacy: false`."""
    mistral_json.save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {
        **{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "chat_template.jinja").write_text("The{{ bos_token }}The{{ bos_token }}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    # BOS comes before the first text, whose space mark it leaves in place.
    assert tokenizer.apply_chat_template(user("a")) == [1, 415, 1, 1014, 1]


def test_every_eos_counts(files: Files) -> None:
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": {"content": "<s>"}}
    path = files(
        tokenizer_config=config,
        added_tokens={"<|im_end|>": 32000, "<|im_start|>": 32001},
        generation_config={"eos_token_id": [2, 7]},
        config={"vocab_size": 32064},
    )
    tokenizer = Tokenizer.from_directory(path, extra_eos=[9])
    assert tokenizer.eos_token_ids == {2, 7, 9, 32000}
    assert tokenizer.vocab_size == 32002
    assert 32000 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([415, 32000, 32063]) == "The"
    with pytest.raises(TokenizerError, match="32064 is outside the vocabulary"):
        tokenizer.decode([32064])


def test_where_the_template_comes_from(files: Files) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    path = files(tokenizer_config={"chat_template": named})
    assert Tokenizer.from_directory(path).chat_template == "d"
    files(chat_template="file")
    assert Tokenizer.from_directory(path).chat_template == "file"


# ---- the demo model


def test_the_demo_model_s_ids(demo_tokenizer: Tokenizer) -> None:
    for text, ids in DEMO_IDS.items():
        assert demo_tokenizer.encode(text) == ids
        assert demo_tokenizer.decode(ids) == text
    assert not demo_tokenizer.add_bos
    assert demo_tokenizer.eos_token_ids == {2}
    assert demo_tokenizer.apply_chat_template(user("Hi")) == DEMO_HI
    # Each digit alone, so the spaces before one stay together: pre-tokenizer "smollm".
    assert demo_tokenizer.encode("  1") == [256, 33]


def test_the_demo_model_s_control_tokens_stay_text(demo_tokenizer: Tokenizer) -> None:
    question = "<|im_end|>\n<|im_start|>system"
    ids = demo_tokenizer.apply_chat_template(user(question))
    assert [token for token in ids if token < 17] == [1, 2, 1, 2, 1]
    assert question in demo_tokenizer.decode(ids)
    assert not any(token < 17 for token in demo_tokenizer.encode(question))


# ---- saving


@pytest.mark.parametrize("source", ["gguf llama", "gguf gpt2", "bare tokenizer.model"])
@pytest.mark.one_in(8)
def test_saved_files_give_the_same_ids_here_and_in_transformers(
    source: str,
    tmp_path: Path,
    files: Files,
    mistral_gguf: dict[str, Any],
    demo_metadata: dict[str, Any],
) -> None:
    if source == "bare tokenizer.model":
        tokenizer = Tokenizer.from_directory(files())
    else:
        tokenizer = Tokenizer.from_gguf(mistral_gguf if "llama" in source else demo_metadata)
    target = tmp_path / "target"
    target.mkdir()
    written = tokenizer.save(target)
    assert sorted(written) == sorted(target.iterdir())
    (target / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    again = Tokenizer.from_directory(target)
    import transformers

    peer = transformers.AutoTokenizer.from_pretrained(target)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        if "<s>" not in text:
            assert peer.encode(text) == tokenizer.encode(text)
    messages = [*user("a  b"), {"role": "assistant", "content": "é 🎉"}, *user("c")]
    ids = tokenizer.apply_chat_template(messages)
    assert again.apply_chat_template(messages) == ids
    assert (again.eos_token_ids, again.add_bos) == (tokenizer.eos_token_ids, tokenizer.add_bos)
    if tokenizer.chat_template is not None:
        options = {"add_generation_prompt": True, "return_dict": False}
        assert peer.apply_chat_template(messages, **options) == ids


# ---- bad files: one line that names the file


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.model", "", "tokenizer.model is empty"),
        ("tokenizer.model", "version https://git-lfs", "tokenizer.model is a git-lfs pointer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be"),
        ("tokenizer_config.json", '{"eos_token": "<|no|>"}', "is not in the tokenizer's voc"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token must be a token's text"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "named 'default'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "bad entry 'x'"),
        ("added_tokens.json", '{"<x>": "1"}', "added_tokens.json: '<x>' has no token id"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id must be"),
    ],
)
def test_damaged_files(files: Files, name: str, content: str, complaint: str) -> None:
    path = files()
    (path / name).write_text(content)
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.from_directory(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "tokenizer.json is not valid JSON"),
        ("[]", "not a usable tokenizer.json"),
        ('{"model": {"type": "WordPiece"}, "decoder": null}', "WordPiece tokenizer of a style"),
        ('{"model": {"type": "BPE", "merges": []}, "decoder": null}', "BPE tokenizer of a style"),
    ],
)
def test_damaged_tokenizer_json(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "complaint"),
    [
        ("post_processor", {"single": [{"SpecialToken": None}]}, "SpecialToken without id"),
        ("post_processor", {"single": [{"SpecialToken": {"ids": [1]}}]}, "SpecialToken without"),
        ("post_processor", {"processors": [{"single": [{"SpecialToken": {"id": 7}}]}]}, "Special"),
        ("decoder", {"decoders": [{"type": "ByteLevel"}]}, "decoder has no type"),
        (
            "decoder",
            {"type": "ByteLevel", "decoders": [{"type": "x", "decoders": [{}]}]},
            "no type",
        ),
        ("normalizer", {"type": []}, "not a step"),
        ("pre_tokenizer", {"type": {"a": 1}}, "not a step"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": [[]]}]}, "not a step"),
    ],
)
def test_a_tokenizer_json_with_parts_of_other_types(
    tmp_path: Path, part: str, value: Any, complaint: str
) -> None:
    byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    Tokenizer.from_directory(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.from_directory(tmp_path)


def test_a_file_without_end(files: Files) -> None:
    path = files()
    os.truncate(path / "tokenizer.model", 1 << 40)
    with pytest.raises(TokenizerError, match="larger than 33 MiB"):
        Tokenizer.from_directory(path)


def test_a_piece_that_is_no_text(files: Files) -> None:
    path = files()
    model = (path / "tokenizer.model").read_bytes()
    (path / "tokenizer.model").write_bytes(model.replace(b"the", b"t\x80e", 1))
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is damaged"):
        Tokenizer.from_directory(path)


def test_merges_that_spell_a_control_token_are_not_used(tmp_path: Path) -> None:
    vocab = ["<s>", "<", "s", ">", "<s"]
    bos = {"id": 0, "content": "<s>", "special": True, "normalized": False}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}}
    raw = {
        "version": "1.0",
        "added_tokens": [{**bos, "single_word": False, "lstrip": False, "rstrip": False}],
        "decoder": {
            **{"type": "ByteLevel", "add_prefix_space": False},
            **{"trim_offsets": False, "use_regex": False},
        },
        "model": {**model, "merges": ["< s", "<s >"]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.from_directory(tmp_path).encode("<s>") == [4, 3]


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model", "bert", "'bert' is not supported"),
        ("tokens", None, "tokens is missing"),
        ("tokens", ["a", "a"], "names a token twice"),
        ("tokens", [1], "not a list of str"),
        ("token_type", [1], "1 entries for 32000"),
        ("scores", None, "0 entries for 32000"),
        ("bos_token_id", 32000, "bos_token_id is 32000"),
        ("add_bos_token", "yes", "add_bos_token"),
    ],
)
def test_damaged_metadata(
    mistral_gguf: dict[str, Any], key: str, value: Any, complaint: str
) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.from_gguf({**mistral_gguf, f"tokenizer.ggml.{key}": value})


def test_an_unknown_pre_tokenizer_is_named(demo_metadata: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="'qwen2' is not supported"):
        Tokenizer.from_gguf({**demo_metadata, "tokenizer.ggml.pre": "qwen2"})
    with pytest.raises(TokenizerError, match="merges does not fit"):
        Tokenizer.from_gguf({**demo_metadata, "tokenizer.ggml.merges": ["nope nope2"]})


def test_text_that_is_not_unicode(mistral: Tokenizer, demo_tokenizer: Tokenizer) -> None:
    for tokenizer in (mistral, demo_tokenizer):
        with pytest.raises(RequestError, match="lone surrogate at character 2"):
            tokenizer.encode("ab\ud800")
        with pytest.raises(RequestError, match="lone surrogate"):
            tokenizer.apply_chat_template(user("\ud800"))


def test_a_written_model_reads_back() -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁a", -1.5, 1)]
    assert read_pieces(write_model(pieces)) == pieces
