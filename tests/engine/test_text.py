"""Text as it comes: whole characters only, every character exactly once, and stop strings wherever they fall."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from clusterfusion.engine.text import FastTokenizer, StopFinder, TextDecoder, read_tokenizer
from clusterfusion.errors import ArgumentError


class Bytes:
    """A token a byte, as a byte-level BPE without merges."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class ByteFallback:
    """Sentencepiece's manner: word pieces, a leading space that vanishes at the start of a text, bytes for the rest, and
    a run of bytes that is no valid UTF-8 shown as one U+FFFD a byte."""

    def __init__(self) -> None:
        pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁Hello", "▁world", "!", "▁"]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        self._tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces_of(tokenizer: Bytes | ByteFallback, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    decoder = TextDecoder(tokenizer, prompt)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_valid_text_comes_whole_and_in_whole_characters(text: str) -> None:
    pieces = pieces_of(Bytes(), list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_come_through_like_a_whole_decode(data: bytes) -> None:
    assert "".join(pieces_of(Bytes(), list(data))) == data.decode("utf-8", errors="replace")


def test_every_character_comes_as_soon_as_it_is_complete() -> None:
    pieces = pieces_of(Bytes(), list("aé€😀b".encode()))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_broken_bytes_do_not_hold_text_back_for_ever() -> None:
    pieces = pieces_of(Bytes(), [0xF0] * 30)
    assert "".join(pieces[:20]) != ""


def test_text_goes_on_after_the_prompt() -> None:
    prompt = list(b"It is ")
    assert "".join(pieces_of(Bytes(), list("café".encode()), prompt)) == "café"


def test_sentencepiece_spaces_and_bytes() -> None:
    hello, world, bang = 257, 258, 259
    ids = [hello, world, bang, *(1 + b for b in "你好".encode()), world]
    assert "".join(pieces_of(ByteFallback(), ids)) == "Hello world!你好 world"
    assert "".join(pieces_of(ByteFallback(), [world, bang], prompt=[hello])) == " world!"


def stopped(text: str, stops: Sequence[str], cuts: Sequence[int]) -> tuple[str, str | None]:
    finder = StopFinder(stops)
    bounds = [0, *sorted(cuts), len(text)]
    out = ""
    for start, end in itertools.pairwise(bounds):
        out += finder.push(text[start:end])
        if finder.found is not None:
            return out, finder.found
    return out + finder.finish(), finder.found


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    cuts = [min(cut, len(text)) for cut in cuts]
    out, found = stopped(text, stops, cuts)
    if not any(stop in text for stop in stops):
        assert (out, found) == (text, None)
        return
    assert found in stops
    assert text.startswith(out + str(found))
    assert not any(stop in out for stop in stops)


def test_the_earliest_stop_wins_in_one_piece() -> None:
    assert stopped("one two three", ["three", "two"], []) == ("one ", "two")


def test_what_may_become_a_stop_is_held_back_and_then_given() -> None:
    finder = StopFinder(["\n\nUser:"])
    assert finder.push("Hi\n") == "Hi"
    assert finder.push("\nUs") == ""
    assert finder.push("ed") == "\n\nUsed"
    assert finder.finish() == ""


def test_reading_tokenizers(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"tokenizer.json is not a readable tokenizer"):
        read_tokenizer(tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, FastTokenizer)
    assert tokenizer.encode("aa") == [0, 0]
