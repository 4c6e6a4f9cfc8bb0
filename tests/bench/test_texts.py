"""Built-in texts, files and data sets; errors name the option and what is needed."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama, tiny_model

import clusterfusion
from clusterfusion.bench import texts
from clusterfusion.errors import ArgumentError


def test_random_tokens_are_seeded_and_in_the_vocabulary() -> None:
    ids = texts.random_tokens(97, 1000, seed=3)
    assert ids == texts.random_tokens(97, 1000, seed=3) != texts.random_tokens(97, 1000, seed=4)
    assert set(ids) == set(range(97))


def test_prompts_differ_and_are_varied() -> None:
    assert len(set(texts.PROMPTS)) == len(texts.PROMPTS) >= 12
    assert any(ord(max(prompt)) > 0x10000 for prompt in texts.PROMPTS)


def test_default_texts() -> None:
    demo = clusterfusion.load("demo", device="cpu")
    text, source = texts.default_text(demo)
    assert (len(text), source) == (3000, "the demo model's held-out excerpt")
    other = clusterfusion.load(tiny_llama())
    assert texts.default_text(other) == (texts.PARAGRAPHS, "built-in paragraphs")
    with pytest.raises(ArgumentError, match="--text needs a tokenizer: .* has no tokenizer"):
        texts.encode(other, "text")


def test_bytes_of_all_tokens_but_the_first() -> None:
    demo = clusterfusion.load("demo", device="cpu")
    assert texts.text_bytes(demo, demo.encode("é12")) == 4 - 3  # half of é reads as U+FFFD, three bytes
    assert texts.text_bytes(demo, demo.encode("1 naïve £5")) == 11
    assert texts.text_bytes(demo, [0, *demo.encode("abc")]) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "which cannot be read"), (b"\xff\xfe", "not UTF-8 \\(byte 0\\)"), (b" \n", "holds no text")],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, expected: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArgumentError, match=f"--text is '.*text.txt', .*{expected}"):
        texts.read_text(file)


def test_why_there_is_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("gpt_neox").save_pretrained(tmp_path)
    without = texts.no_tokenizer(clusterfusion.load(str(tmp_path), device="cpu"))
    assert "has no tokenizer" in without
    (tmp_path / "tokenizer.json").write_text("{}")
    unreadable = texts.no_tokenizer(clusterfusion.load(str(tmp_path), device="cpu"))
    assert "has no tokenizer" in unreadable and unreadable != without and "tokenizer.json" in unreadable


def test_a_file_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    monkeypatch.setattr(texts, "MOST_BYTES", 2**20)
    file.write_bytes(b"a" * 2**20)
    assert len(texts.read_text(file)) == 2**20
    file.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(
        ArgumentError, match="--text is '.*text.txt', which holds more than 1 MiB; it must hold no more"
    ):
        texts.read_text(file)


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> dict[str, list[str]]:
        asked.append((name, configuration, split))
        return {"text": ["one", "two"]} if split == "test" else {"other": []}

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(texts, "has_datasets", lambda: True)
    assert texts.dataset_text() == texts.dataset_text("a/b") == "one\n\ntwo"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), ("a/b", None, "test")]
    with pytest.raises(ArgumentError, match="--dataset is 'a/b::train', which cannot be had: 'text'"):
        texts.dataset_text("a/b::train")


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "has_datasets", lambda: False)
    with pytest.raises(ArgumentError, match="data set 'a/b' needs the package datasets"):
        texts.dataset_text("a/b")
