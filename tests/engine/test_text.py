"""Text as it comes: whole characters only, every character exactly once, and stop strings wherever they fall."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from clusterfusion.engine.loading import demo_folder
from clusterfusion.engine.text import FastTokenizer, StopFinder, TextDecoder, TextTokenizer, read_tokenizer
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


def pieces_of(tokenizer: TextTokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
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


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_text_that_holds_replacement_characters_cuts_no_character(count: int, character: str) -> None:
    """A model may write U+FFFD itself; a run of them looks like bytes that wait for more."""
    text = "\ufffd" * count + character
    assert "".join(pieces_of(Bytes(), list(text.encode()))) == text


def test_tokens_that_all_end_inside_a_character() -> None:
    """As merges across characters make them: no token's end is the end of a character until the last one's."""

    class Straddling:
        def encode(self, text: str) -> list[int]:
            return list(range(len(text.encode()) // 2))

        def decode(self, ids: Sequence[int]) -> str:
            data = ("x" + "é" * 40).encode()
            return b"".join(data[2 * i : 2 * i + 2] for i in ids).decode("utf-8", errors="replace")

    assert "".join(pieces_of(Straddling(), range(41))) == "x" + "é" * 40


DEMO = FastTokenizer(demo_folder() / "tokenizer.json")
# Whole characters and pieces of them, as ids of the demo tokenizer, which has a token a byte.
FRAGMENTS = st.sampled_from(["a", "é", "€", "😀", "\ufffd", "\ufffd" * 5]).flatmap(
    lambda text: st.tuples(st.just(DEMO.encode(text)), st.integers(0, 3), st.integers(1, 20))
)
DEMO_IDS = st.lists(FRAGMENTS.map(lambda f: f[0][f[1] : f[2]]) | st.lists(st.integers(1, 256), max_size=3)).map(
    lambda pieces: [token for piece in pieces for token in piece]
)


@given(DEMO_IDS, DEMO_IDS)
@settings(max_examples=1000, deadline=None)
def test_the_demo_tokenizers_pieces_are_the_whole_text(prompt: list[int], ids: list[int]) -> None:
    """Whatever bytes come, and wherever the prompt ends, what streams is what the new tokens add to the prompt."""
    before, after = DEMO.decode(prompt), DEMO.decode(prompt + ids)
    if not after.startswith(before):  # the prompt ended inside a character, which the new tokens complete
        before = before[:-1]
        assert after.startswith(before)
    assert "".join(pieces_of(DEMO, ids, prompt)) == after[len(before) :]


@pytest.mark.parametrize("tokenizer", [Bytes(), ByteFallback()], ids=["bytes", "byte-fallback"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_ends_inside_of(tokenizer: Bytes | ByteFallback, cut: int) -> None:
    shift = isinstance(tokenizer, ByteFallback)
    ids = [shift + byte for byte in "😀é!".encode()]
    if shift:
        ids[-1] = 259
    assert "".join(pieces_of(tokenizer, ids[cut:], prompt=ids[:cut])) == "😀é!"


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


def test_truncation_and_padding_of_a_tokenizer_file_are_not_obeyed(tmp_path: Path) -> None:
    saved = Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert FastTokenizer(tmp_path / "tokenizer.json").encode("It is a truth") == DEMO.encode("It is a truth")


CLASSES = ["LlamaTokenizer", "GPTNeoXTokenizerFast", "GPT2Tokenizer"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_without_a_vocabulary_is_no_tokenizer(tmp_path: Path, name: str) -> None:
    """transformers would make an empty one of it, to which every prompt is the same."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    assert read_tokenizer(tmp_path) is None


def test_a_vocabulary_with_its_merges(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("abb") == [2, 1]
    assert tokenizer.decode([2, 1]) == "abb"


def test_a_vocabulary_of_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ArgumentError, match=r"vocab.json gives a tokenizer of 3 tokens, 3 of them special"):
        read_tokenizer(tmp_path)
    empty = Tokenizer(models.BPE({}, []))
    empty.add_special_tokens(["<s>", "</s>"])
    empty.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ArgumentError, match=r"tokenizer.json gives a tokenizer of 2 tokens, 2 of them special"):
        read_tokenizer(tmp_path)


def test_the_reason_why_a_tokenizer_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(ArgumentError, match=r"tokenizer.model cannot be read: ."):
        read_tokenizer(tmp_path)
    calls: list[dict[str, object]] = []

    def from_pretrained(folder: str, **options: object) -> None:
        calls.append(options)
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sentencepiece" else name)
    with pytest.raises(ArgumentError) as caught:
        read_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'tokenizer.model'} cannot be read: no such thing (sentencepiece missing here: "
        "pip install sentencepiece)"
    )
    assert calls[0]["trust_remote_code"] is False
