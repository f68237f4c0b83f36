"""A conversation without a terminal: what is computed, what is kept, what is refused."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import mistral_model, slow
from talker import talkers

from mlx_cerebrum.chat.session import Answer, DecodingOptions, Session
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.decoding.stream import generate, stream_generate
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN, ChatFormat
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views

Views = tuple[Mapping[str, Model], Tokenizer]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    return talkers(tmp_path_factory.mktemp("talker"))


def session_of(views: Views, **settings: Any) -> Session:
    drawing = {name: settings.pop(name) for name in ("temp", "seed") if name in settings}
    settings |= {"sampling": Sampling(**drawing)}
    return Session(*views, DecodingOptions(**({"max_tokens": 20} | settings)))


def ask(session: Session, question: str, before: int | None = None) -> Answer:
    (stream,) = session.ask(question, before=before)
    "".join(stream)
    session.keep(question, stream.answer, before)
    return stream.answer


def computed(answer: Answer) -> int:
    assert answer.last is not None
    return answer.last.prompt_tokens - answer.last.cached_tokens


def turn(question: str) -> int:
    """Tokens of a question in a conversation that goes on: one a byte, with its frame."""
    return len(f"\n[user]{question}\n[assistant]".encode())


# Only what is new is computed.


def test_each_turn_computes_only_itself(views: Views) -> None:
    """The answer's last token is chosen but not yet run when the answer ends."""
    session = session_of(views)
    first = ask(session, "How are you?")
    assert computed(first) == len(session.prompt("How are you?", 0))
    for question in ("And now?", "Where?", "Why then?"):
        assert computed(ask(session, question)) == 1 + turn(question)


def test_every_model_keeps_caches_of_its_own(views: Views) -> None:
    """Switching costs what is new to the model switched to, and nothing on the way back."""
    session = session_of(views)
    ask(session, "One?")
    session.switch("talker@twice")
    assert session.other == "talker"
    second = ask(session, "Two?")
    assert computed(second) == len(session.prompt("Two?", 1))  # all of it is new to this one
    session.switch("talker")
    third = ask(session, "Three?")
    assert computed(third) == 1 + turn("Two?") + len(second.text) + turn("Three?")
    session.switch("talker@twice")
    assert computed(ask(session, "Four?")) == 1 + turn("Three?") + 20 + turn("Four?")


@slow
def test_edits_and_undo_compute_only_what_differs(views: Views) -> None:
    session = session_of(views)
    ask(session, "One?")
    second = ask(session, "Two things?")
    edited = ask(session, "Two others?", before=1)
    assert computed(edited) == len("others?\n[assistant]")
    assert edited.text != second.text  # it depends on the question: caches that are wrong show
    assert [e.question for e in session.exchanges] == ["One?", "Two others?"]
    again = ask(session, "Two others?", before=1)
    assert computed(again) == 1  # the last token, for its logits
    assert again.text == edited.text
    session.undo()  # the one asked again
    session.undo()  # the edit
    assert session.question == "Two things?"
    assert session.exchanges[1].answer is second
    session.undo()
    assert computed(ask(session, "Two others?")) == 1
    session.undo()
    session.undo()
    assert session.question is None
    assert computed(ask(session, "One?")) == 1


@slow
def test_past_the_window_too(tmp_path: Path) -> None:
    """Turns, an edit and a switch long after the window has left the conversation's beginning."""
    session = session_of(talkers(tmp_path, sliding_window=48), max_tokens=70)
    ask(session, "One?")
    assert session.passes_window()
    for question in ("Two?", "Three?", "Four?"):
        assert computed(ask(session, question)) == 1 + turn(question)
        assert not session.passes_window()  # said once
    assert computed(ask(session, "Fire?", before=3)) == len("ire?\n[assistant]")
    session.switch("talker@twice")
    assert computed(ask(session, "Five?")) == len(session.prompt("Five?", 4))
    session.undo()
    assert computed(ask(session, "Fine?")) == len("ne?\n[assistant]")
    model, tokenizer = session.model, session.tokenizer
    last = session.exchanges[-1].answer
    assert last.text == generate(model, tokenizer, last.prompt, max_tokens=70)
    session.clear()
    ask(session, "One?")
    assert session.passes_window()  # a new conversation


@slow
def test_an_answer_is_what_the_whole_prompt_gives(views: Views) -> None:
    tokenizer = views[1]
    session = session_of(views)
    for question in ("One?", "Two?", "Three?"):
        answer = ask(session, question)
        alone = generate(session.model, tokenizer, answer.prompt, max_tokens=20)
        assert answer.text == alone


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_with_the_real_vocabulary_a_turn_begins_with_the_last_one(
    tmp_path: Path, system: str | None
) -> None:
    """Cerebrum's template joins its text to the answer's: the pieces must not change."""
    (tmp_path / "tokenizer.model").write_bytes(mistral_model().read_bytes())
    tokenizer = Tokenizer.from_directory(tmp_path)
    tokenizer.use_format(BUILT_IN["cerebrum"])
    start = [] if system is None else [{"role": "system", "content": system}]
    answers = [
        "Hello! How can I help?",
        "2 + 2 = 4",
        "First, \u00e9t\u00e9.\n\n- a\n- b\n\n```\nx\n```",
    ]
    messages = [*start, {"role": "user", "content": "Hi"}]
    for answer in answers:
        prompt = tokenizer.apply_chat_template(messages)
        # As the model says it: with the space that SentencePiece puts before a word.
        said = prompt + tokenizer.encode(answer, add_bos=False)
        ended = said + tokenizer.encode("\nUser:", add_bos=False)[1:]  # without the space here
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And then?"},
        ]
        following = tokenizer.apply_chat_template(messages)
        assert following[: len(said)] == said
        assert following[: len(ended)] == ended  # the stop string is the next turn's beginning


# Ctrl-C.


@pytest.mark.parametrize("draft", ["none", "ngram", "auto"])
@pytest.mark.one_in(8)
def test_stopped_where_it_was_shown(views: Views, draft: str) -> None:
    session = session_of(views, draft=draft, max_tokens=60)
    session.switch("talker@twice")
    (stream,) = session.ask("How are you?")
    shown = [next(stream) for _ in range(7)]
    stream.stopped = lambda: True
    assert list(stream) == []
    answer = stream.answer
    assert (answer.reason, answer.text) == ("interrupted", "".join(shown))
    session.keep("How are you?", answer)
    cache = session.cache(session.current)
    said = session.tokenizer.encode(answer.text, add_bos=False)
    assert (answer.prompt + said)[: len(cache.tokens)] == cache.tokens
    assert len(cache.tokens) >= len(answer.prompt) + 6 - 1
    following = ask(session, "Go on")
    alone = generate(session.model, session.tokenizer, following.prompt, max_tokens=60)
    assert following.text == alone


@pytest.mark.parametrize("draft", ["none", "ngram", "auto"])
@pytest.mark.parametrize(
    "drawing",
    [
        {},
        {"temp": 0.8, "seed": 5},
        {"frequency_penalty": 1.5, "repetition_penalty": 1.3, "min_tokens": 25},
    ],
)
@pytest.mark.one_in(10)
def test_an_answer_goes_on_where_it_was_cut(
    views: Views, draft: str, drawing: dict[str, Any]
) -> None:
    """Cut by length, by Ctrl-C, again by length: the text of one that was not cut."""
    options = DecodingOptions(max_tokens=50, draft=draft, sampling=Sampling(**drawing))
    whole = ask(Session(*views, options), "How are you?")
    session = Session(*views, replace(options, max_tokens=9))
    first = ask(session, "How are you?")
    assert (first.reason, first.said) == ("length", whole.said[:9])
    stream = session.go_on()
    for _ in range(4):
        next(stream)
    stream.close()
    assert computed(stream.answer) == 1
    session.keep("How are you?", stream.answer, 0)
    assert stream.answer.said == whole.said[:13]
    session.options = replace(options, max_tokens=37)
    stream = session.go_on()
    "".join(stream)
    assert stream.answer.text == whole.text
    assert stream.answer.said == whole.said
    session.keep("How are you?", stream.answer, 0)
    session.undo()
    assert session.exchanges[0].answer.said == whole.said[:13]


@pytest.mark.parametrize("drawn", [False, True])
@slow
def test_it_goes_on_through_a_character_and_a_stop_string(views: Views, drawn: bool) -> None:
    """Both may lie across the cut; what was shown of them in haste is not kept."""
    # Drawn, bytes come that are no whole characters, alone and together.
    sampling = Sampling(temp=1.5, seed=4) if drawn else Sampling()
    options = DecodingOptions(max_tokens=40, sampling=sampling)
    whole = ask(Session(*views, options), "Say!")
    if not drawn:
        options = replace(options, stop=(whole.text[20:24],))
        whole = ask(Session(*views, options), "Say!")
        assert (whole.reason, len(whole.text)) == ("stop", 20)
    for cut in range(17, len(whole.said), 6 if drawn else 1):
        session = Session(*views, replace(options, max_tokens=cut))
        ask(session, "Say!")
        session.options = replace(options, max_tokens=40 - cut)
        stream = session.go_on()
        "".join(stream)
        assert (stream.answer.text, stream.answer.reason) == (whole.text, whole.reason)
        session.keep("Say!", stream.answer, 0)
        if not drawn:
            with pytest.raises(RequestError, match="complete"):
                session.go_on()


def test_an_answer_from_a_file_goes_on(views: Views) -> None:
    whole = ask(session_of(views, max_tokens=30), "One?").text
    session = session_of(views, max_tokens=8)
    session.replace(
        [{"role": "user", "content": "One?"}, {"role": "assistant", "content": whole[:10]}]
    )
    for end in (18, 26):
        stream = session.go_on()
        "".join(stream)
        session.keep("One?", stream.answer, 0)
        assert stream.answer.text == whole[:end]


def test_stopped_while_the_prompt_is_read(views: Views) -> None:
    """What was read of it stays read; the question stays to be asked again."""
    session = session_of(views, prefill_step_size=16)
    question = "word " * 20
    (stream,) = session.ask(question)
    done: list[int] = []

    def progress(n: int, total: int) -> None:
        done.append(n)

    stream.progress = progress
    stream.stopped = lambda: len(done) == 2
    assert list(stream) == []
    assert (stream.answer.reason, stream.answer.text, done) == ("interrupted", "", [16, 32])
    assert session.exchanges == []
    assert session.question == question
    assert len(session.cache("talker").tokens) == 32
    answer = ask(session, question)
    assert answer.last is not None
    assert answer.last.cached_tokens == 32
    assert answer.text == generate(session.model, session.tokenizer, answer.prompt, max_tokens=20)


# Seeds.


def conversation(views: Views, seed: int | None, *questions: str) -> list[str]:
    session = session_of(views, temp=1.0, seed=seed)
    return [ask(session, question).text for question in questions]


@slow
def test_a_seed_repeats_a_conversation_and_no_turn_of_it(views: Views) -> None:
    once = conversation(views, 7, "A?", "B?")
    assert conversation(views, 7, "A?", "B?") == once
    assert conversation(views, 8, "A?", "B?") != once
    session = session_of(views, temp=1.0, seed=7)
    assert ask(session, "A?").text == once[0]
    assert ask(session, "A?", before=0).text != once[0]  # asked again: draws of its own
    last = session_of(views, temp=1.0, seed=2**64 - 1)
    ask(last, "A?")
    assert len(ask(last, "B?").text) == 20  # the seed after the last is 0


@slow
def test_both_columns_draw_alike_and_count_once(views: Views) -> None:
    session = session_of(views, temp=1.0, seed=7)
    both = session.ask("A?", ["talker", "talker@twice"])
    texts = ["".join(stream) for stream in both]
    session.keep("A?", both[0].answer)
    assert texts[0] == conversation(views, 7, "A?")[0]
    assert ask(session, "B?").text == conversation(views, 7, "A?", "B?")[1]


@slow
def test_comparing_token_by_token_is_asking_each(views: Views) -> None:
    session = session_of(views)
    both = session.ask("A?", list(views[0]))
    texts = ["", ""]
    while not all(stream.answer.reason for stream in both):
        for column, stream in enumerate(both):
            texts[column] += next(stream, "")
    for name, text in zip(views[0], texts, strict=True):
        alone = session_of(views)
        alone.switch(name)
        assert ask(alone, "A?").text == text
    assert texts[0] != texts[1]


# What is refused.


@slow
def test_retrying_what_can_only_be_the_same(views: Views) -> None:
    session = session_of(views)
    ask(session, "A?")
    assert session.repeats("A?", 0)
    session.switch("talker@twice")
    assert not session.repeats("A?", 0)
    session.switch("talker")
    session.set_system("Be brief.")
    assert not session.repeats("A?", 0)
    session.set_system(None)
    (stream,) = session.ask("A?", before=0, temp=0.7)
    "".join(stream)
    session.keep("A?", stream.answer, 0)
    assert not session.repeats("A?", 0)
    (stream,) = session.ask("A?", before=0)
    next(stream)
    stream.close()
    session.keep("A?", stream.answer, 0)
    assert not session.repeats("A?", 0)
    assert not session_of(views, temp=1.0).repeats("A?", 0)


def test_a_conversation_fills_the_positions_and_not_more(tmp_path: Path) -> None:
    session = session_of(talkers(tmp_path, max_position_embeddings=64), max_tokens=100)
    answer = ask(session, "A?")
    assert (answer.reason, answer.tokens) == ("length", 64)
    with pytest.raises(RequestError, match=r"no longer fits the model's 64 positions: /undo"):
        session.ask("B?")
    assert session.question == "B?"
    session.undo()
    assert [m["content"] for m in session.messages()] == ["A?", answer.text]


def test_where_memory_is_short_other_caches_are_given_up(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(views)
    ask(session, "A?")
    session.switch("talker@twice")
    calls: list[int] = []

    def short(*args: Any, **kwargs: Any) -> object:
        calls.append(session.cached("talker")[0])
        if calls[-1] or len(calls) > 2:
            raise MemoryBudgetError("too much")
        return stream_generate(*args, **kwargs)

    monkeypatch.setattr("mlx_cerebrum.chat.session.stream_generate", short)
    ask(session, "B?")
    assert [bool(tokens) for tokens in calls] == [True, False]
    with pytest.raises(MemoryBudgetError, match="too much"):
        ask(session, "C?")
    assert session.question == "C?"
    monkeypatch.undo()
    ask(session, "C?")
    assert [e.question for e in session.exchanges] == ["A?", "B?", "C?"]


def test_all_caches_share_what_was_free_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks of the window's earlier places grow from turn to turn: nothing else bounds them."""
    views, free = talkers(tmp_path, sliding_window=48), 10**12
    monkeypatch.setattr("mlx_cerebrum.chat.session.available_bytes", lambda: free)
    ample = session_of(views)
    assert [ample.cache(name).max_bytes for name in views[0]] == [None, None]
    free = 1_000_000
    short = session_of(views)
    bounds = [short.cache(name).max_bytes or 0 for name in views[0]]
    assert bounds == [free * 0.8 * 8 // 20, free * 0.8 * 12 // 20]  # by positions
    assert short.cache("talker")._most < ample.cache("talker")._most
    ask(short, "word " * 40)
    short.forget_caches()
    assert short.cached("talker") == (0, 0)


def test_only_the_last_answer_keeps_its_prompt(views: Views) -> None:
    """Else a long chat would hold each of its prompts: the square of its length."""
    session = session_of(views)
    for question in ("A?", "B?", "C?"):
        ask(session, question)
    assert [bool(e.answer.prompt) for e in session.exchanges] == [False, False, True]


def test_what_is_refused_draws_nothing(views: Views) -> None:
    once = conversation(views, 7, "A?")
    session = session_of(views, temp=1.0, seed=7)
    with pytest.raises(RequestError, match="temp must be"):
        session.ask("A?", temp=-1)
    assert ask(session, "A?").text == once[0]


def test_conversations_from_elsewhere(views: Views) -> None:
    session = session_of(views)
    ask(session, "A?")
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    own = session.tokenizer.format
    session.tokenizer.use_format(ChatFormat("{{ raise_exception('no') }}{{ messages }}"))
    with pytest.raises(RequestError, match="refuses these messages: no"):
        session.replace([user, assistant])
    session.tokenizer.use_format(own)
    assert session.question == "A?"
    system = {"role": "system", "content": "Be brief."}
    session.replace([system, user, assistant, user])
    assert (session.system, session.unanswered, len(session.exchanges)) == ("Be brief.", "Q", 1)
    assert session.messages() == [system, user, assistant, user]
    ask(session, "Q", before=1)
    assert len(session.messages()) == 5
    session.replace([assistant, user, system, user])  # are put in turns
    greeted = [{"role": "user", "content": ""}, assistant]
    assert session.messages() == [system, *greeted, {"role": "user", "content": "Q\n\nQ"}]


def test_an_answer_stopped_early_costs_no_whole_one(views: Views) -> None:
    session = session_of(views)
    whole = ask(session, "A?").text
    (stream,) = session.ask("A?", before=0, temp=0.7)
    next(stream)
    stream.close()
    session.keep("A?", stream.answer, 0)
    assert session.messages()[1]["content"] != whole
    session.undo()
    assert session.messages()[1]["content"] == whole


def test_clear_can_be_undone(views: Views) -> None:
    session = session_of(views)
    ask(session, "A?")
    before = session.messages()
    session.clear()
    assert session.messages() == []
    assert session.can_restore
    session.undo()
    assert session.messages() == before
    assert not session.can_restore


# A trained model.


@slow
def test_the_demo_computes_only_the_new_turn(demo: Path) -> None:
    """Its end-of-turn token and the text around it are found again in the next prompt."""
    session = Session(
        *load_views(open_model(ModelSpec(demo, window=40))), DecodingOptions(max_tokens=8)
    )
    held = ask(session, "Hi").tokens
    for question in ("What is the capital of France?", "And of Italy?"):
        answer = ask(session, question)
        again = computed(answer) - (len(answer.prompt) - held)
        assert 0 <= again <= 2  # where the length cut an answer, its last token was not run yet
        held = answer.tokens
    assert session.passes_window()
    cut = replace(session.options, max_tokens=3)
    session.options = cut
    ask(session, "Count to nine, in words.")
    stream = session.go_on()
    "".join(stream)
    assert computed(stream.answer) == 1  # also past the window
    session.options = replace(cut, max_tokens=6)
    whole = ask(session, "Count to nine, in words.", len(session.exchanges) - 1)
    assert (stream.answer.said, stream.answer.text) == (whole.said, whole.text)
    assert len(whole.said) == 6
