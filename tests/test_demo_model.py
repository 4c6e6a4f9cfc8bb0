"""The shipped `demo` model: its size, its shape, its tokenizer, and that it really predicts and writes English."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "src" / "clusterfusion" / "demo_model"
MOST_BYTES = 8_000_000
END_OF_TEXT = "<|endoftext|>"

sys.path.insert(0, str(ROOT / "scripts"))
train_demo = pytest.importorskip("train_demo")


@functools.cache
def read_json(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def untrained() -> Any:
    """The same architecture with fresh weights: what every claim about the trained one must be false of."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(FOLDER)
    return transformers.GPTNeoXForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def bits_per_byte(model: Any, text: str) -> float:
    """The text's cost through transformers' own forward; it is read in windows as the training script does."""
    ids = [0, *(byte + 1 for byte in text.encode("utf-8"))]
    nats = 0.0
    with torch.no_grad():
        for window, fresh in train_demo.windows(ids):
            tensor = torch.tensor(window)
            logits = model(tensor[None, :-1]).logits[0, -fresh:]
            nats += float(torch.nn.functional.cross_entropy(logits, tensor[-fresh:], reduction="sum"))
    return nats / math.log(2) / (len(ids) - 1)


def english_share(model: Any, tokens: int) -> float:
    """How many of a greedy continuation's space-separated words stand in the log's lists."""
    log = read_json("training_log.json")
    prompt = log["samples"]["prompt"]
    known = set(log["common_words"]) | set(train_demo.words(log["excerpt"]["text"]))
    written = train_demo.generate(model, prompt, tokens, temperature=None, seed=0)[len(prompt) :]
    inside = written.rpartition(" ")[0]  # the last word may be cut
    candidates = [re.sub(r"^[^a-z]+|[^a-z]+$", "", word) for word in inside.lower().split(" ") if word]
    return sum(word in known for word in candidates) / max(len(candidates), 1)


def test_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) <= MOST_BYTES, sizes
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_log.json", "README.md"} <= set(sizes)


def test_config_is_the_described_gpt_neox() -> None:
    config = read_json("config.json")
    expected = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 257,
        "intermediate_size": 4 * config["hidden_size"],
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rotary_pct": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float16",
    }
    assert {name: config[name] for name in expected} == expected
    assert config["rope_parameters"]["partial_rotary_factor"] == config["rotary_pct"]


def test_weights_are_fp16_under_the_published_names(model: Any) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(FOLDER / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {"gpt_neox.embed_in.weight", "embed_out.weight", "gpt_neox.final_layer_norm.bias"} <= set(tensors)
    log = read_json("training_log.json")
    count = sum(tensor.numel() for tensor in tensors.values())
    assert count == log["runs"][log["chosen"]]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "It is a truth universally acknowledged",
        "  two  spaces , a comma ; n't\n\n\ttabs\r\n",
        "naïve £5 “quoted”—日本語 🦀 e\u0301",
        "".join(map(chr, range(128))),
    ],
)
def test_tokenizer_is_the_utf8_bytes(tokenizer: Any, text: str) -> None:
    ids = [byte + 1 for byte in text.encode("utf-8")]
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text
    auto = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert auto(text)["input_ids"] == ids
    assert auto.decode(ids) == text


def test_tokenizer_names_every_byte(tokenizer: Any) -> None:
    """Bytes that are no UTF-8 cannot be a str, but each has its token, and the token names its byte."""
    characters = train_demo.byte_characters()
    assert tokenizer.get_vocab_size() == 257
    assert [tokenizer.token_to_id(character) for character in characters] == list(range(1, 257))
    assert tokenizer.decode([0x80 + 1]) == "\ufffd"


def test_end_of_text_is_token_zero(tokenizer: Any) -> None:
    assert tokenizer.encode(f"a{END_OF_TEXT}b").ids == [98, 0, 99]
    auto = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert (auto.eos_token, auto.eos_token_id, auto.bos_token_id) == (END_OF_TEXT, 0, 0)


def test_held_out_excerpt_costs_what_the_log_says(model: Any, untrained: Any) -> None:
    excerpt = read_json("training_log.json")["excerpt"]
    assert len(excerpt["text"]) > 2500
    assert bits_per_byte(model, excerpt["text"]) == pytest.approx(excerpt["bits_per_byte"], rel=0.02)
    assert bits_per_byte(untrained, excerpt["text"][:200]) > 3 * excerpt["bits_per_byte"]


def test_greedy_text_is_mostly_english(model: Any, untrained: Any) -> None:
    assert english_share(model, tokens=160) >= 0.8
    assert english_share(untrained, tokens=40) < 0.4


def test_card_is_made_from_the_log() -> None:
    log = read_json("training_log.json")
    weights = (FOLDER / "model.safetensors").stat().st_size
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == train_demo.card(log, weights)
    assert (FOLDER / "loss_curve.svg").read_text(encoding="utf-8") == train_demo.loss_curve(log)
