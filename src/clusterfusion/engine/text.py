"""Text in and out: the tokenizer, and text pieces from tokens as they come."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from clusterfusion.errors import ArgumentError

# Files that hold a vocabulary, best first.
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_MOST_HELD = 12  # tokens; beyond them the text is broken, or holds U+FFFD itself, and what is settled goes out
_LONGEST = 4  # tokens a character can be spread over: one a byte


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
            raise ArgumentError(f"{path} is not a readable tokenizer file: {_first_line(error)}") from error
        # A file may keep the settings of the training or the service that wrote it; prompts go in whole and alone.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = sum(token.special for token in self._tokenizer.get_added_tokens_decoder().values())
        _check_vocabulary(self._tokenizer.get_vocab_size(), special, path)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class SlowTokenizer:
    """A tokenizer.model, or a vocab.json with its merges.txt, which only transformers can read."""

    def __init__(self, path: Path) -> None:
        try:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                str(path.parent), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers or a library it needs is not installed, or the files are not its own
            needed = ["transformers", "sentencepiece"] if path.suffix == ".model" else ["transformers"]
            absent = [name for name in needed if importlib.util.find_spec(name) is None]
            hint = f" ({', '.join(absent)} missing here: pip install {' '.join(absent)})" if absent else ""
            raise ArgumentError(f"{path} cannot be read: {_first_line(error)}{hint}") from error
        _check_vocabulary(len(self._tokenizer), len(self._tokenizer.all_special_ids), path)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def read_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer in a checkpoint folder, or None where the folder holds no vocabulary.

    Raises ArgumentError, with the reason, for one that cannot be read.
    """
    for files in VOCABULARIES:
        if all((folder / file).is_file() for file in files):
            return (FastTokenizer if files[0] == "tokenizer.json" else SlowTokenizer)(folder / files[0])
    return None  # transformers would make an empty one of the class that tokenizer_config.json names


def _check_vocabulary(tokens: int, special: int, path: Path) -> None:
    if tokens <= special:
        raise ArgumentError(f"{path} gives a tokenizer of {tokens} tokens, {special} of them special; it has no words")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class TextDecoder:
    """Turns tokens into pieces of text as they come; a piece never holds half a character.

    Only a short window of tokens is decoded each time: those since the last piece, and the piece before it, because
    some tokenizers treat the first token of a text differently. A character that `prompt` ends inside of comes with
    the token that completes it.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_MOST_HELD:])
        self._start = 0  # of the window
        self._done = len(self._ids)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is still incomplete."""
        self._ids.append(token)
        count = len(self._ids)
        text = self._tokenizer.decode(self._ids[self._start :])
        if not text.endswith(_REPLACEMENT):
            return self._emit(count, text)
        if count - self._done > _MOST_HELD:
            # An incomplete character begins among the last three tokens. Those before it go out up to a place between
            # two characters: where the halves read as the whole does.
            for end in range(count - _LONGEST + 1, count - 2 * _LONGEST + 1, -1):
                head = self._tokenizer.decode(self._ids[self._start : end])
                if head + self._tokenizer.decode(self._ids[end:]) == text:
                    return self._emit(end, head)
        return ""

    def finish(self) -> str:
        """The text still held back, with U+FFFD for bytes that never became a character."""
        return self._emit(len(self._ids), self._tokenizer.decode(self._ids[self._start :]))

    def _emit(self, end: int, after: str) -> str:
        """What `after`, the window's text up to token `end`, adds to the text that is out."""
        before = self._tokenizer.decode(self._ids[self._start : self._done])
        broken = before.endswith(_REPLACEMENT)  # perhaps a character of the prompt that is complete by now
        out = len(before)
        while broken and not after.startswith(before[:out]):
            out -= 1
        piece = after[out:]
        if piece:
            if not broken or end < len(self._ids):  # a window must not begin inside a character
                self._start = self._done
            self._done = end
        return piece


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
