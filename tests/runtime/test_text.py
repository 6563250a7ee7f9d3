"""Streaming text: whole characters, stop strings."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from mbq_export.runtime.text import TextStream

SPECIAL = 99
WORDS = ("red", "circle", "at", "the", "top", ".")


def from_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def from_words(tokens: Sequence[int]) -> str:
    """As sentence tokenizers do: a space in front of each word but the first."""
    return " ".join(WORDS[token] for token in tokens if token != SPECIAL)


def pieces(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    assert pieces(TextStream(from_bytes), "aä€😀".encode()) == [
        *("a", "", "ä", "", "", "€", "", "", "", "😀"),
        "",
    ]


def test_spaces_between_words_are_kept() -> None:
    assert pieces(TextStream(from_words), [0, 1, 2]) == ["red", " circle", " at", ""]


def test_special_tokens_leave_the_spaces_around_them() -> None:
    tokens = [SPECIAL, 0, SPECIAL, SPECIAL, 1, SPECIAL]
    assert pieces(TextStream(from_words), tokens) == ["", "red", "", "", " circle", "", ""]


def test_an_unfinished_character_comes_at_the_end_as_the_decoder_shows_it() -> None:
    assert pieces(TextStream(from_bytes), "ä".encode()[:1]) == ["", "�"]


def test_a_stop_string_ends_the_text_before_it() -> None:
    stream = TextStream(from_bytes, stop=("END",))
    assert "".join(pieces(stream, b"one END two")) == "one "
    assert stream.stopped == "END"
    assert stream.push(ord("x")) == ""


def test_what_could_begin_a_stop_string_is_held_back_until_it_is_not() -> None:
    stream = TextStream(from_bytes, stop=("abc",))
    assert [stream.push(token) for token in b"xabab"] == ["x", "", "", "ab", ""]
    assert stream.finish() == "ab"
    assert stream.text == "xabab"


def test_the_first_of_several_stop_strings_wins() -> None:
    stream = TextStream(from_words, stop=("the", "at"))
    assert "".join(pieces(stream, [0, 2, 3])) == "red "
    assert stream.stopped == "at"


@given(st.text(max_size=40))
def test_the_pieces_are_the_text(text: str) -> None:
    tokens = text.encode(errors="ignore")
    stream = TextStream(from_bytes)
    assert "".join(pieces(stream, tokens)) == from_bytes(tokens) == stream.text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_with_stop_strings_the_pieces_are_the_text_before_the_first(
    text: str, stop: list[str]
) -> None:
    stream = TextStream(from_bytes, stop=stop)
    found = "".join(pieces(stream, text.encode()))
    ends = [text.find(word) + len(word) for word in stop if word in text]
    shortest = text[: min(ends)] if ends else text
    assert found == (shortest.removesuffix(stream.stopped) if ends else text)
    assert bool(stream.stopped) == bool(ends)
