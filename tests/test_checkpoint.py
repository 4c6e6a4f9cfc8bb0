"""Every way in gives the same weights; every way a checkpoint can be broken is one error that names tensor and file."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, tiny_gpt_neox, tiny_llama, tiny_model, weights_of
from torch import Tensor
from transformers import GPTNeoXModel, PreTrainedModel

import clusterfusion
from clusterfusion import checkpoint, reference
from clusterfusion.errors import ArgumentError, CheckpointError, UnsupportedModelError
from clusterfusion.weights import DecoderWeights

CPU = torch.device("cpu")
HEADS = ("embed_out.weight", "lm_head.weight")  # how published Pythia files and newer transformers name it
LAYER_0_DENSE = "gpt_neox.layers.0.attention.dense.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved GPT-NeoX checkpoint, to be broken."""
    tiny_gpt_neox().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> DecoderWeights:
    return checkpoint.load_folder(folder, dtype=None, device=CPU)


def logits(weights: DecoderWeights) -> Tensor:
    ids = random_token_ids(weights.config.vocab_size, 7)
    cache = reference.KVCache.allocate(weights.config, 8, torch.float64, CPU)
    return reference.forward(weights, ids, cache, 0, dtype=torch.float64)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_in_form(model: PreTrainedModel, folder: Path, form: str) -> None:
    model.save_pretrained(folder, max_shard_size="20KB" if form.startswith("sharded") else "5GB")
    if not form.endswith("bin"):
        return
    weight_map: dict[str, str] = {}
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        tensors = load_file(shard)
        name = shard.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(shards) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_form_on_disk_gives_the_models_logits(tmp_path: Path, form: str, family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    save_in_form(model, tmp_path, form)
    shards = len(list(tmp_path.glob("*model-*")))
    assert (shards > 1) == form.startswith("sharded")
    assert torch.equal(logits(load(tmp_path)), logits(weights_of(model)))


def test_published_pythia_spelling(folder: Path) -> None:
    """The published files name the head embed_out, newer ones lm_head; the published ones carry buffers that the model
    rebuilds, here with values that would do harm if used."""
    wanted = logits(load(folder))
    saved_as = next(head for head in HEADS if head in load_file(folder / "model.safetensors"))

    def to_published(tensors: dict[str, Tensor]) -> None:
        head = tensors.pop(saved_as)
        tensors[next(name for name in HEADS if name != saved_as)] = head
        for layer in range(2):
            prefix = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{prefix}.bias"] = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
            tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.full((1,), torch.nan)

    rewrite(folder, to_published)
    assert torch.equal(logits(load(folder)), wanted)


def test_llama_rotary_buffer_is_rebuilt(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    wanted = logits(load(tmp_path))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert torch.equal(logits(load(tmp_path)), wanted)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float16, torch.float32])
def test_dtype_is_the_stored_one_or_the_asked_one(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None
) -> None:
    model = tiny_gpt_neox().to(stored)
    model.save_pretrained(tmp_path)
    weights = checkpoint.load_folder(tmp_path, dtype=asked, device=CPU)
    assert weights.dtype == (asked or stored)
    assert torch.equal(weights.lm_head, model.lm_head.weight.detach().to(asked or stored))


def test_transformers_model_is_shared_not_copied() -> None:
    model = tiny_gpt_neox()
    weights = checkpoint.load_transformers_model(model)
    state = model.state_dict()
    assert weights.lm_head.data_ptr() == state["lm_head.weight"].data_ptr()
    own = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    for layer in weights.layers:
        for tensor in vars(layer).values():
            assert tensor is None or tensor.untyped_storage().data_ptr() in own
    before = logits(weights)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.mul_(1.5)
    assert not torch.equal(logits(weights), before), "a change of the model's parameters does not show"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_loaded_model_does_not_depend_on_the_file(tmp_path: Path, form: str) -> None:
    save_in_form(tiny_gpt_neox(), tmp_path, form)
    weights = load(tmp_path)
    before = logits(weights)
    for file in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]:
        file.write_bytes(b"\0" * file.stat().st_size)  # in place, as copying over it does
    assert torch.equal(logits(weights), before)


# -- what can be wrong ------------------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: (tensors.pop(name), None)[1]


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return put


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop(LAYER_0_DENSE), f"{LAYER_0_DENSE} is missing"),
        (lambda t: [t.pop(head, None) for head in HEADS], "lm_head.weight is missing"),
        (lambda t: t.update({"gpt_neox.layers.7.extra": torch.ones(2)}), "gpt_neox.layers.7.extra in .*model.safetensors is not"),
        (lambda t: t.update({head: torch.ones(97, 32) for head in HEADS}), "is a second copy of one in .*model.safetensors"),
        (replace(LAYER_0_DENSE, lambda w: w[:, :-1].contiguous()), r"attention.dense.weight .* shape \[32, 31\].* \[32, 32\]"),
        (replace(LAYER_0_DENSE, lambda w: w.to(torch.int8)), "attention.dense.weight .* holds I8"),
        (replace(LAYER_0_DENSE, lambda w: w.to(torch.float8_e4m3fn)), "attention.dense.weight .* holds F8_E4M3"),
        (replace(LAYER_0_DENSE, poison(float("nan"))), "attention.dense.weight in .*model.safetensors .* not finite"),
        (replace("gpt_neox.final_layer_norm.bias", poison(float("-inf"))), "final_layer_norm.bias .* not finite"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named_with_its_file(
    folder: Path, change: Callable[[dict[str, Tensor]], None], complaint: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "asked", "value", "fits"),
    [
        (torch.float32, torch.float16, 7e4, "bfloat16"),
        (torch.float32, torch.float16, -65520.0, "bfloat16"),
        (torch.float32, torch.bfloat16, 3.4e38, "float32"),
        (torch.float64, torch.float32, -1e39, "float64"),
    ],
)
def test_values_that_the_wanted_dtype_cannot_hold(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype, value: float, fits: str
) -> None:
    tiny_gpt_neox().to(stored).save_pretrained(tmp_path)
    rewrite(tmp_path, replace(LAYER_0_DENSE, poison(value)))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_folder(tmp_path, dtype=asked, device=CPU)
    name = str(asked).removeprefix("torch.")
    assert str(caught.value) == (
        f"{LAYER_0_DENSE} in {tmp_path / 'model.safetensors'} holds {value:g}, which {name} cannot hold; "
        f"load with dtype='{fits}'"
    )
    for dtype in (getattr(torch, fits), None):
        assert checkpoint.load_folder(tmp_path, dtype=dtype, device=CPU).layers[0].o_weight.isfinite().all()


def test_values_that_round_to_the_largest_are_held(folder: Path) -> None:
    rewrite(folder, replace(LAYER_0_DENSE, poison(65519.0)))
    assert checkpoint.load_folder(folder, dtype=torch.float16, device=CPU).layers[0].o_weight.max() == 65504


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_truncated_file(tmp_path: Path, form: str, keep: float) -> None:
    save_in_form(tiny_gpt_neox(), tmp_path, form)
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    truncate(file, keep)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        load(tmp_path)


def test_safetensors_header_that_lies(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="model.safetensors is not a readable"):
        load(folder)


def test_missing_shard_and_misplaced_tensor(tmp_path: Path) -> None:
    save_in_form(tiny_gpt_neox(), tmp_path, "sharded safetensors")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name, shard = next(iter(raw["weight_map"].items()))
    other = next(s for s in raw["weight_map"].values() if s != shard)
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {"no.such.tensor": other}}))
    with pytest.raises(CheckpointError, match="no.such.tensor is missing from"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {name: "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lies in '../outside.safetensors'; it must be a file beside the index"):
        load(tmp_path)
    index.write_text(json.dumps(raw))
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=re.escape(shard)):
        load(tmp_path)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="weight_map"):
        load(tmp_path)


class _Payload:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("owned"), "code ran"))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_in_form(tiny_gpt_neox(), tmp_path, "bin")
    monkeypatch.chdir(tmp_path)
    torch.save({"gpt_neox.embed_in.weight": _Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_tied_head_that_differs(tmp_path: Path) -> None:
    tiny_gpt_neox(tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["gpt_neox.embed_in.weight"].clone()}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight .* differs from the embedding"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "config.json is missing"),
        ("{", "not readable JSON"),
        ("[1]", "holds list"),
        ("\xff", "not readable JSON"),
    ],
)
def test_config_file(folder: Path, text: str | None, complaint: str) -> None:
    file = folder / "config.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=complaint):
        load(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: looked for model.safetensors"):
        load(folder)


def test_unimplemented_field_of_a_real_folder(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"sliding_window": 512}))
    with pytest.raises(UnsupportedModelError, match="sliding_window = 512") as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_transformers_models_that_cannot_be_taken() -> None:
    model = tiny_gpt_neox()
    with pytest.raises(CheckpointError, match="lm_head.weight is missing|is not a tensor of this"):
        checkpoint.load_transformers_model(GPTNeoXModel(model.config))
    model.gpt_neox.layers[1].half()
    with pytest.raises(CheckpointError, match="several dtypes"):
        checkpoint.load_transformers_model(model)
    with pytest.raises(CheckpointError, match="meta"):
        checkpoint.load_transformers_model(tiny_gpt_neox().to("meta"))
    quantised = tiny_gpt_neox()
    quantised.state_dict = lambda: {"a.weight": torch.ones(2), "b.dtype": torch.qint8}  # as torch.ao's dynamic modules
    with pytest.raises(CheckpointError, match=r"b.dtype in GPTNeoXForCausalLM is dtype, not a tensor"):
        clusterfusion.load(quantised)
    poisoned = tiny_gpt_neox()
    with torch.no_grad():
        poisoned.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"lm_head.weight in GPTNeoXForCausalLM .* not finite"):
        clusterfusion.load(poisoned)


@pytest.mark.parametrize(
    ("model", "error", "complaint"),
    [
        ("no-such-folder", CheckpointError, "neither a folder here nor a hub id"),
        ("", CheckpointError, "neither a folder"),
        ("./a/b/c", CheckpointError, "neither a folder"),
        ("~nosuchuser/x", CheckpointError, "'~nosuchuser/x' is no folder here"),
        ("pythia-2.8b", ArgumentError, "random_weights='pythia-2.8b'"),
        (7, ArgumentError, "model is int"),
        (torch.nn.Linear(2, 2), ArgumentError, "model is Linear"),
    ],
)
def test_what_is_no_model(model: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        clusterfusion.load(model)


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        clusterfusion.load(str(folder / "model.safetensors"))


def test_hub_ids_go_to_the_hub_client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is replaced: no network in tests. Weights are looked for as safetensors first, then as bin."""
    calls: list[tuple[str, str | None, tuple[str, ...]]] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    engine = clusterfusion.load("someone/some-model@step1000")
    assert engine.weights.config.hidden_size == 32
    assert [call[:2] for call in calls] == [("someone/some-model", "step1000")]
    assert "model*.safetensors" in calls[0][2]
    assert not any("bin" in pattern for pattern in calls[0][2])
    assert {"*.json", "tokenizer.model", "merges.txt"} <= set(calls[0][2])

    def no_network(repo_id: str, **_: Any) -> str:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(CheckpointError, match=r"'someone/other' is no local folder.*no route to host \("):
        clusterfusion.load("someone/other")


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors", "a shard", "a tokenizer"])
def test_an_incomplete_cached_copy_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    """Without a network the hub client gives what an earlier, interrupted download left."""
    save_in_form(tiny_gpt_neox(), tmp_path, "sharded safetensors" if absent == "a shard" else "safetensors")
    if absent != "a tokenizer":
        (next(tmp_path.glob("model-*")) if absent == "a shard" else tmp_path / absent).unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: str(tmp_path))
    wanted = "the cached copy of someone/some-model is incomplete.* connect to the network and run again"
    with pytest.raises(ArgumentError if absent == "a tokenizer" else CheckpointError, match=wanted):
        clusterfusion.load("someone/some-model").encode("text")
    with pytest.raises((ArgumentError, CheckpointError)) as caught:
        clusterfusion.load(tmp_path).encode("text")
    assert "cached copy of" not in str(caught.value)


def test_a_process_without_a_stderr_downloads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import enable_progress_bars, tqdm

    def snapshot_download(repo_id: str, **_: Any) -> str:
        list(tqdm(range(3)))  # as the real one does
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        assert clusterfusion.load("someone/some-model").weights.config.hidden_size == 32
    finally:
        enable_progress_bars()
