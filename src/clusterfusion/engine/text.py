"""Text in and out: the tokenizer, and text pieces from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from clusterfusion.errors import ArgumentError

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_MOST_HELD = 12  # tokens; a character has at most four bytes, so what is still broken by then stays broken


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model expects in front of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are no character become U+FFFD."""


class FastTokenizer:
    """A tokenizer.json, through the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArgumentError(f"{path} is not a readable tokenizer file: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class SlowTokenizer:
    """A tokenizer that only transformers can read (no tokenizer.json in the folder)."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def read_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer in a checkpoint folder, or None where there is none that can be read."""
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder / "tokenizer.json")
    if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        try:
            return SlowTokenizer(folder)
        except Exception:  # transformers, or a library it needs, is not installed, or the files are not its own
            return None
    return None


class TextDecoder:
    """Turns tokens into pieces of text as they come; a piece never holds half a character.

    Only a short window of tokens is decoded each time: those since the last piece, and the piece before it, because
    some tokenizers treat the first token of a text differently.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_MOST_HELD:])
        self._start = 0  # of the window
        self._done = len(self._ids)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is still incomplete."""
        self._ids.append(token)
        return self._emit(final=len(self._ids) - self._done > _MOST_HELD)

    def finish(self) -> str:
        """The text still held back, with U+FFFD for bytes that never became a character."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._done])
        after = self._tokenizer.decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return after[len(before) :]


class StopFinder:
    """Holds back text that may be the beginning of a stop string, and finds where the first one begins."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text of `piece`, and of what was held, that is certainly before any stop string."""
        text = self._held + piece
        hits = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if hits:
            index, self.found = min(hits)
            self._held = ""
            return text[:index]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
