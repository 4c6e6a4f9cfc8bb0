"""Generation: greedy equals transformers, streams equal whole answers, limits and endings are as promised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_gpt_neox, tiny_llama, tiny_model

import clusterfusion
from clusterfusion.engine import Engine, SamplingOptions
from clusterfusion.engine.sampling import Sampler
from clusterfusion.errors import ArgumentError, ContextLengthError, DeviceError
from clusterfusion.named_shapes import named_shape

IDS = [5, 17, 3, 88]


class Bytes:
    def encode(self, text: str) -> list[int]:
        return [b % 97 for b in text.encode()]

    def decode(self, ids: Any) -> str:
        return "".join(chr(33 + i) for i in ids)


@pytest.fixture
def engine() -> Engine:
    engine = clusterfusion.load(tiny_gpt_neox(eos_token_id=None))
    engine.tokenizer = Bytes()
    return engine


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}])
def test_greedy_is_transformers_token_for_token(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, eos_token_id=None)
    wanted = model.generate(torch.tensor([IDS]), max_new_tokens=100, do_sample=False, **options)[0, len(IDS) :]
    got = clusterfusion.load(model).generate(IDS, 100, **options)
    assert list(got.token_ids) == wanted.tolist()
    assert got.finish_reason == "length"
    assert len(set(got.token_ids)) > 3, "a stuck model proves little"


def test_end_of_sequence(tmp_path: Path) -> None:
    free = clusterfusion.load(tiny_gpt_neox(eos_token_id=None)).generate(IDS, 30).token_ids
    eos = free[4]
    expected = free[: free.index(eos) + 1]
    model = tiny_gpt_neox(eos_token_id=eos)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        result = clusterfusion.load(source).generate(IDS, 30)
        assert (result.token_ids, result.finish_reason) == (expected, "eos")
    # generation_config.json may name more than config.json does
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{free[2]}, {eos}]}}')
    first = min(free.index(free[2]), free.index(eos))
    assert clusterfusion.load(tmp_path).generate(IDS, 30).token_ids == free[: first + 1]


def test_stream_is_generate_in_pieces(engine: Engine) -> None:
    whole = engine.generate(IDS, 20)
    stream = engine.stream(IDS, 20)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == str(stream.result)
    assert len(pieces) == 20
    assert stream.result.token_ids == whole.token_ids
    assert whole.prompt_tokens == len(IDS)
    assert whole.time_to_first_token_s > 0
    assert whole.ms_per_token is not None
    assert whole.ms_per_token > 0
    assert engine.generate(IDS, 1).ms_per_token is None


def test_stop_string_cuts_text_and_ends(engine: Engine) -> None:
    text = engine.generate(IDS, 20).text
    stop = text[7:10]
    cut = text.index(stop)
    for stops in (stop, [stop], ["never here", stop]):
        result = engine.generate(IDS, 20, stop=stops)
        assert (result.text, result.finish_reason) == (text[:cut], "stop")
        assert len(result.token_ids) == cut + 3


def test_closed_stream_keeps_what_came(engine: Engine) -> None:
    stream = engine.stream(IDS, 20)
    first = next(stream)
    stream.close()
    assert (stream.result.text, stream.result.finish_reason) == (first, "closed")
    assert list(stream) == []
    assert engine.generate(IDS, 20).text.startswith(first)


def test_streams_may_interleave(engine: Engine) -> None:
    other = [7, 7, 9]
    alone = [engine.generate(IDS, 15).text, engine.generate(other, 15).text]
    a, b = engine.stream(IDS, 15), engine.stream(other, 15)
    mixed = [""] * 2
    for pair in zip(a, b, strict=True):
        mixed = [text + piece for text, piece in zip(mixed, pair, strict=True)]
    assert mixed == alone


def test_sampling_is_reproducible(engine: Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 0.95}
    assert (
        engine.generate(IDS, 30, seed=3, **options).token_ids == engine.generate(IDS, 30, seed=3, **options).token_ids
    )
    assert (
        engine.generate(IDS, 30, seed=3, **options).token_ids != engine.generate(IDS, 30, seed=4, **options).token_ids
    )


def test_a_tokens_position_decides_its_noise(engine: Engine) -> None:
    """The first new token stands behind the prompt; a session and a sampler of one's own give the same tokens."""
    token_ids = engine.generate(IDS, 12, temperature=1.0, seed=5).token_ids
    session = engine.session()
    logits = session.prefill(IDS)
    for at, token in enumerate(token_ids, start=len(IDS)):
        assert Sampler(SamplingOptions(temperature=1.0, seed=5), []).choose(logits, at) == token
        logits = session.step(token)


def test_context_limits() -> None:
    engine = clusterfusion.load(tiny_gpt_neox(eos_token_id=None), max_seq_len=16)
    assert len(engine.generate(IDS).token_ids) == 12, "by default as many as fit"
    assert len(engine.generate(IDS, 12).token_ids) == 12
    with pytest.raises(
        ContextLengthError, match=r"4 tokens and max_new_tokens 13 .* context of 16 .* up to 128.* at most 12"
    ):
        engine.generate(IDS, 13)
    with pytest.raises(ContextLengthError, match="at most 0 new tokens"):
        engine.generate([1] * 16)
    with pytest.raises(ContextLengthError):
        engine.generate([1] * 17)
    assert len(engine.generate(IDS, 12).token_ids) == 12, "the engine goes on after a refusal"


def test_engine_without_tokenizer() -> None:
    engine = clusterfusion.load(tiny_llama())
    assert engine.generate(IDS, 3).text == ""
    for call in (lambda: engine.generate("text"), lambda: engine.stream(IDS), lambda: engine.generate(IDS, stop="x")):
        with pytest.raises(ArgumentError, match="no tokenizer"):
            call()


def test_empty_text_starts_from_the_beginning_of_sequence_token(engine: Engine) -> None:
    assert engine.encode("") == [engine.config.bos_token_id] == [0]
    assert engine.generate("", 5).token_ids == engine.generate([0], 5).token_ids
    without = clusterfusion.load(tiny_gpt_neox(bos_token_id=None))
    without.tokenizer = Bytes()
    with pytest.raises(ArgumentError, match="prompt is empty"):
        without.generate("")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": []}, "ids is empty"),
        ({"prompt": IDS, "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": IDS, "max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"prompt": IDS, "temperature": -1}, "temperature is -1"),
        ({"prompt": IDS, "stop": ""}, "stop is ''"),
        ({"prompt": IDS, "stop": ["a", 3]}, "stop is"),
        ({"prompt": 5}, "ids is int"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(engine: Engine, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        engine.stream(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ArgumentError, "neither was given"),
        ({"model": "demo", "random_weights": "pythia-14m"}, ArgumentError, "both were given"),
        ({"mode": "warp"}, ArgumentError, "mode is 'warp'; it must be 'auto' or one of"),
        ({"mode": "model"}, ArgumentError, "mode is 'model', which cannot run here"),
        ({"dtype": "int8"}, ArgumentError, "dtype is 'int8'"),
        ({"device": "tpu"}, ArgumentError, "device is 'tpu'"),
        ({"device": "mps"}, ArgumentError, "device is 'mps'"),
        ({"max_seq_len": 0}, ArgumentError, "max_seq_len is 0; it must be an int from 1 to 2048"),
        ({"max_seq_len": 4096}, ArgumentError, "max_seq_len is 4096"),
        ({"max_seq_len": 12.0}, ArgumentError, "max_seq_len is 12.0"),
    ],
)
def test_bad_load_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    if arguments and "model" not in arguments:
        arguments = {"random_weights": "pythia-14m", "device": "cpu"} | arguments
    with pytest.raises(error, match=match):
        clusterfusion.load(**arguments)


def test_shared_model_keeps_its_dtype_and_device() -> None:
    model = tiny_gpt_neox()
    with pytest.raises(ArgumentError, match=r"dtype is torch.float16, but the model's weights are torch.float32"):
        clusterfusion.load(model, dtype="float16")
    assert clusterfusion.load(model, dtype="float32", device="cpu").dtype == torch.float32
    assert clusterfusion.load(model, device="cpu:0").device == clusterfusion.load("demo", device="cpu:7").device


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterfusion.engine.memory.free_bytes", lambda device: 10**9)
    with pytest.raises(DeviceError, match=r"needs 82.2 GB on cpu, where 1.0 GB are free"):
        clusterfusion.load(random_weights="gpt-neox-20b", device="cpu")


def test_numpy_and_torch_numbers_are_numbers(engine: Engine) -> None:
    wanted = engine.generate(IDS, 6, temperature=0.5, top_k=9, seed=3).token_ids
    got = engine.generate(
        np.array(IDS), np.int64(6), temperature=np.float32(0.5), top_k=torch.tensor(9), seed=np.int32(3)
    )
    assert got.token_ids == wanted


@pytest.mark.parametrize(
    "ids",
    [
        np.array(IDS[::-1])[::-1],
        np.array(IDS, dtype=">i4"),
        np.array(IDS, dtype=np.uint64),
        np.array(IDS, dtype=object),
        np.repeat(IDS, 2)[::2],
    ],
    ids=["reversed", "big-endian", "unsigned", "objects", "strided"],
)
def test_integer_arrays_of_any_form_are_ids(engine: Engine, ids: np.ndarray) -> None:
    assert engine.generate(ids, 3).token_ids == engine.generate(IDS, 3).token_ids  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [5, None, b"bytes", [1, 2]])
def test_only_text_is_encoded(engine: Engine, text: Any) -> None:
    with pytest.raises(ArgumentError, match=f"prompt is {type(text).__name__}; it must be text"):
        engine.encode(text)


def test_a_tokenizer_that_cannot_be_read_stops_text_alone(tmp_path: Path) -> None:
    model = tiny_gpt_neox(eos_token_id=None)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    wanted = clusterfusion.load(model).generate(IDS, 3).token_ids
    model.name_or_path = str(tmp_path)
    for source in (tmp_path, model):
        engine = clusterfusion.load(source)
        assert engine.generate(IDS, 3).token_ids == wanted
        for call, argument in ((engine.encode, "text"), (engine.generate, "text"), (engine.stream, IDS)):
            with pytest.raises(ArgumentError, match=r"has no tokenizer \(.*tokenizer.model cannot be read: "):
                call(argument)  # type: ignore[operator]


def test_a_folder_without_a_vocabulary_says_what_was_looked_for(tmp_path: Path) -> None:
    tiny_gpt_neox().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ArgumentError, match=r"holds none of tokenizer.json, .*vocab.json with merges.txt\); pass"):
        clusterfusion.load(tmp_path).generate("text")


def test_extreme_sampling_options_still_sample(engine: Engine) -> None:
    greedy = engine.generate(IDS, 6).token_ids
    for options in ({"temperature": 1e-300}, {"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-320}):
        assert engine.generate(IDS, 6, seed=1, **options).token_ids == greedy


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = tiny_gpt_neox()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    engine = clusterfusion.load(model)
    for temperature in (0.0, 1.0):
        with pytest.raises(DeviceError, match="logits are not finite"):
            engine.generate(IDS, 5, temperature=temperature)


def test_a_session_that_failed_is_not_used_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine.generate(IDS, 5).token_ids
    (failed,) = engine._idle

    def fail(token: int) -> torch.Tensor:
        raise DeviceError("a step gave up")

    monkeypatch.setattr(failed, "step", fail)
    with pytest.raises(DeviceError, match="gave up"):
        engine.generate(IDS, 5)
    assert engine.generate(IDS, 5).token_ids == wanted


def test_inference_mode_leaves_nothing_behind(engine: Engine) -> None:
    with torch.inference_mode():
        inside = engine.generate(IDS, 5).token_ids
    assert engine.generate(IDS, 5).token_ids == inside


def test_a_lone_surrogate_is_refused() -> None:
    engine = clusterfusion.load("demo", device="cpu")
    with pytest.raises(ArgumentError, match="lone surrogate at 1"):
        engine.generate("a\ud800", 3)


def test_auto_says_why() -> None:
    engine = clusterfusion.load(random_weights="pythia-14m", device="cpu")
    assert engine.mode == "reference"
    assert "an NVIDIA GPU" in engine.mode_reason
    engine = clusterfusion.load(random_weights="pythia-14m", device="cpu", dtype="float16")
    assert engine.mode == "reference"
    assert "need an NVIDIA GPU, and the device is 'cpu'" in engine.mode_reason


@pytest.mark.parametrize("shape", ["pythia-14m", "smollm-135m"])
def test_auto_takes_the_whole_step_where_nothing_is_in_its_way(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterfusion.engine import modes

    monkeypatch.setattr(modes, "why_not", lambda name, config, dtype, device: None)
    assert modes.choose_mode("auto", named_shape(shape), torch.float16, torch.device("cuda", 0)).name == "model"


def test_long_contexts_do_not_take_all_memory_by_default() -> None:
    from clusterfusion.engine.loading import DEFAULT_MAX_SEQ_LEN, _parse_max_seq_len

    config = named_shape("llama-3.1-8b")
    assert _parse_max_seq_len(None, config) == DEFAULT_MAX_SEQ_LEN
    assert _parse_max_seq_len(131072, config) == 131072


_MEMORY_PROBE = """
import os, torch, transformers, clusterfusion
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
config = transformers.GPTNeoXConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
                                    num_attention_heads=8, vocab_size=20000)
with torch.device("meta"):
    model = transformers.GPTNeoXForCausalLM(config)
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.fill_(0.01)
size = sum(p.nbytes for p in model.parameters())
clusterfusion.load(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(hidden_size=64, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=1, vocab_size=99)))  # imports and thread pools
before = resident()
engine = clusterfusion.load(model)
print(size, resident() - before, len(engine.generate([1, 2], 3).token_ids))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_loading_a_transformers_model_takes_no_memory() -> None:
    output = subprocess.run([sys.executable, "-c", _MEMORY_PROBE], capture_output=True, text=True, check=True).stdout
    size, added, tokens = map(int, output.split()[-3:])
    assert tokens == 3
    assert size > 400e6
    assert added < 0.01 * size
