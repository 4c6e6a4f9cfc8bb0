"""What models are evaluated on: built-in prompts and paragraphs, random tokens, a file, a public data set."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clusterfusion.engine import Engine
from clusterfusion.engine.loading import DEMO, demo_folder
from clusterfusion.errors import ArgumentError, ClusterFusionError

# Varied on purpose: prose, dialogue, code, numbers, markup, other scripts, repetition, whitespace, a single letter.
PROMPTS = (
    "The morning was fine, and Elizabeth",
    "Once upon a time, in a village at the edge of a great forest, there lived",
    'def binary_search(items, target):\n    """Return the index of target in the sorted list items."""\n    low, high = 0,',
    "Q: What is 17 + 25?\nA:",
    "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    '{"name": "Ada", "born": 1815, "works": [',
    "Der schnelle braune Fuchs springt über den faulen Hund. Am nächsten Morgen",
    "the the the the the the the the the the the the",
    "A",
    "\n\n## Results\n\n| model | loss |\n| --- | --- |\n| small |",
    "東京は日本の首都であり、世界で最も人口の多い都市圏の",
    '"I cannot believe it," said he. "You were there,    and you saw   nothing?" She',
    "E = mc² ≈ 9×10¹⁶ J/kg; naïve café — £5 🦀",
    "In 1969, after eight years of work by some 400,000 people, two men walked on the Moon. The most difficult part was",
    "SELECT customer, SUM(amount) FROM orders WHERE day >= '2024-01-01' GROUP BY",
    "It was not the cold that stopped them, nor the dark, nor the want of food, but",
)
RANDOM_LENGTHS = (1, 2, 7, 16, 33, 64, 129, 250, 500, 1000)  # tokens; around powers of two, where tiles end

PARAGRAPHS = """\
The harbour lay quiet under a thin layer of fog, and the boats that had come in during the night rested against the \
stone wall with their sails tied up. An old man walked along the edge, counting the ropes as he went. He had done so \
every morning for forty years, first because it was his work, and later because he could no longer think of a morning \
without it. When he reached the last boat he stopped, looked out over the grey water, and said a few words that nobody \
was there to hear.

Water boils at a lower temperature on a mountain than at the sea. The reason is pressure: a liquid boils when the \
pressure of its vapour equals that of the air above it, and the higher one climbs, the less air there is to press down. \
At three thousand metres the boiling point is about ninety degrees Celsius, so that eggs and rice take longer to cook \
there. A pressure cooker works the other way round. It holds the steam in, the pressure rises to about twice that of \
the atmosphere, and the water inside reaches a hundred and twenty degrees before it boils.

"You will find the key under the third flower pot," she had written, "and the rest you know." But he did not know the \
rest. He turned the letter over, held it against the window, and read it again from the beginning. There were two dates \
in it, the 4th of May and the 19th of June, and a sum of 2,350 pounds; there was the name of a street that he had never \
heard of; and at the end, in another hand, there was a single line of numbers: 7, 14, 28, 56, 112.
"""

MOST_BYTES = 2**28  # of a text
DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1:test"


def random_tokens(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    """Token ids, uniform over the vocabulary."""
    return [int(token) for token in np.random.default_rng(seed).integers(vocab_size, size=count)]


def held_out_text() -> str:
    """The excerpt of the demo model's test text: written by its author, and never trained on."""
    log = json.loads((demo_folder() / "training_log.json").read_text(encoding="utf-8"))
    return str(log["excerpt"]["text"])


def whole(stream: BinaryIO, source: str) -> bytes:
    """All that a stream holds. Raises ArgumentError, which begins with `source`, where that is more than any text is, as a
    device that never ends."""
    data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ArgumentError(f"{source} holds more than {MOST_BYTES / 2**20:g} MiB; it must hold no more")
    return data


def read_text(file: Path, option: str = "--text") -> str:
    """A file's UTF-8 text. Raises ArgumentError naming `option` for one that cannot be read, or holds nothing."""
    try:
        with file.open("rb") as stream:
            text = whole(stream, f"{option} is {str(file)!r}, which").decode("utf-8")
    except OSError as error:
        raise ArgumentError(
            f"{option} is {str(file)!r}, which cannot be read ({error.strerror}); it must name a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{option} is {str(file)!r}, which is not UTF-8 (byte {error.start}); it must name a text file in UTF-8"
        ) from error
    if not text.strip():
        raise ArgumentError(f"{option} is {str(file)!r}, which holds no text; it must hold some")
    return text


def check_dataset_name(name: str) -> None:
    """Raise ArgumentError for what cannot name a data set."""
    if not name.partition(":")[0].strip():
        raise ArgumentError(f"--dataset is {name!r}; it must be REPOSITORY[:CONFIGURATION[:SPLIT]]")


def dataset_text(name: str = DEFAULT_DATASET) -> str:
    """The rows of a public data set, with empty lines between, through the `datasets` package.

    `name` is REPOSITORY[:CONFIGURATION[:SPLIT]] with a column "text"; the split is "test" if left out. Raises
    ArgumentError without the package, or for what it cannot give.
    """
    check_dataset_name(name)
    if not has_datasets():
        raise ArgumentError(
            f"the text of the data set {name!r} needs the package datasets, which is not installed; name a file with --text FILE, or "
            "pip install datasets"
        )
    repository, _, rest = name.partition(":")
    configuration, _, split = rest.partition(":")
    from datasets import load_dataset

    try:
        rows = load_dataset(repository, configuration or None, split=split or "test")
        texts = [str(text) for text in rows["text"]]
    except Exception as error:  # no network, no such name, no such column: each its own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArgumentError(
            f"--dataset is {name!r}, which cannot be had: {reason}; it must be REPOSITORY[:CONFIGURATION[:SPLIT]] with a "
            "column 'text' (check the name and the network, or name a file with --text)"
        ) from error
    return "\n\n".join(texts)


def has_datasets() -> bool:
    return importlib.util.find_spec("datasets") is not None


def default_text(engine: Engine) -> tuple[str, str]:
    """A text for `engine` where the caller names none, and what it is."""
    if engine.name == DEMO:
        return held_out_text(), "the demo model's held-out excerpt"
    return PARAGRAPHS, "built-in paragraphs"


def encode(engine: Engine, text: str, option: str = "--text") -> list[int]:
    """The text's token ids. Raises ArgumentError naming `option` where the model has no tokenizer."""
    if engine.tokenizer is None:
        raise ArgumentError(
            f"{option} needs a tokenizer: {no_tokenizer(engine)}; put its tokenizer.json beside the weights"
        )
    return engine.encode(text)


def no_tokenizer(engine: Engine) -> str:
    """Why `engine`, which has none, has no tokenizer."""
    try:
        engine.encode("a")
    except ArgumentError as error:
        return str(error).rpartition(";")[0]  # what follows is a way out, by token ids
    raise ClusterFusionError(f"{engine.name} has a tokenizer")


def text_bytes(engine: Engine, ids: Sequence[int]) -> int:
    """Bytes of UTF-8 that all tokens but the first stand for, as the tokenizer writes them. A character that the first
    or the last token cuts counts as the three bytes of U+FFFD."""
    if engine.tokenizer is None:
        raise ClusterFusionError(f"{engine.name} has no tokenizer, so its tokens have no bytes")
    whole, first = (engine.tokenizer.decode(list(part)) for part in (ids, ids[:1]))
    return len(whole.encode()) - len(first.encode())
