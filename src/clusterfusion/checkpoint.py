"""Checkpoints to DecoderWeights: a local folder, a hub id, or an instantiated `transformers` model.

Everything structural (names, shapes, dtypes, files) is checked before the first tensor is read, and every tensor is
checked for finite values, so a checkpoint either loads whole or raises one CheckpointError that names tensor and file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError, CheckpointError, UnsupportedModelError
from clusterfusion.weights import LM_HEAD, NAMES, DecoderWeights, assemble, expected_tensors

# Buffers of older checkpoints that the model rebuilds from its config.
_REBUILT = re.compile(
    r"(^|\.)(attention\.bias|attention\.masked_bias|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached)$"
)
_ALIASES = {"embed_out.weight": LM_HEAD}
_MOST_COMPLAINTS = 5
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class MissingFileError(CheckpointError):
    """A checkpoint lacks a file that it needs."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a checkpoint file, not yet read."""

    name: str  # as the file spells it
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]  # to host memory


def read_config_file(folder: Path) -> DecoderConfig:
    """The DecoderConfig of a checkpoint folder."""
    path = folder / "config.json"
    raw = _read_json(path)
    try:
        return DecoderConfig.from_dict(raw)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error} (in {path})") from None


def read_eos_token_ids(folder: Path, config: DecoderConfig) -> tuple[int, ...]:
    """End-of-sequence ids: those of `generation_config.json` where it names some, else those of the config."""
    path = folder / "generation_config.json"
    if path.is_file():
        value = _read_json(path).get("eos_token_id")
        return check_eos_token_ids(value, f"eos_token_id in {path}") or config.eos_token_ids
    return config.eos_token_ids


def check_eos_token_ids(value: object, where: str) -> tuple[int, ...]:
    """A token id, a list of them, or None, as a tuple. Raises CheckpointError for anything else."""
    ids = tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{where} is {value!r}; it must be a token id, a list of them, or null")
    return tuple(i for i in ids if i >= 0)


def load_folder(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> DecoderWeights:
    """The weights in a checkpoint folder, in `dtype` (None: as the embedding is stored) on `device`.

    Reads model.safetensors, its sharded form, pytorch_model.bin or its sharded form, in that order of preference.
    `on_bytes` is called with the size of each tensor as it is read. Raises CheckpointError.
    """
    config = read_config_file(folder)
    with contextlib.ExitStack() as files:
        stored = match_tensors(config, _open_weights(folder, files), str(folder))
        target = dtype or _torch_dtype(stored[NAMES[config.family].embedding])
        tensors: dict[str, Tensor] = {}
        for name, entry in stored.items():
            try:
                host = entry.read()
            except Exception as error:  # the file is mapped lazily: damage shows at the read
                raise CheckpointError(f"{entry.name} in {entry.file} cannot be read: {error}") from error
            _check_finite(host, entry.name, str(entry.file), target)
            # Always a copy: files are mapped, and whoever rewrites one later must not change or crash a loaded model.
            tensors[name] = host.to(device=device, dtype=target, copy=True).contiguous()
            on_bytes(tensors[name].nbytes)
    _check_tied(config, tensors, str(folder))
    return assemble(config, tensors)


def load_transformers_model(model: Any) -> DecoderWeights:
    """The weights of an instantiated transformers model, sharing its storage: nothing is copied.

    Raises UnsupportedModelError for an architecture outside the two families, CheckpointError for tensors that are
    missing, unexpected, misshapen, not finite, or spread over several devices or dtypes.
    """
    config = DecoderConfig.from_dict(model.config.to_dict())
    source = type(model).__name__
    entries = [_in_memory(name, tensor, Path(source)) for name, tensor in model.state_dict().items()]
    stored = match_tensors(config, entries, source)
    tensors = {name: entry.read() for name, entry in stored.items()}
    for what, values in (
        ("device", {t.device for t in tensors.values()}),
        ("dtype", {t.dtype for t in tensors.values()}),
    ):
        if len(values) > 1:
            raise CheckpointError(f"{source} has tensors of several {what}s ({_listed(values)}); move it to one first")
    for name, tensor in tensors.items():
        _check_finite(tensor, name, source, tensor.dtype)
    _check_tied(config, tensors, source)
    return assemble(config, tensors)


def match_tensors(config: DecoderConfig, entries: list[StoredTensor], source: str) -> dict[str, StoredTensor]:
    """Entries by the name `expected_tensors` uses. Raises CheckpointError listing what is missing, unexpected or
    misshapen, by tensor name and file."""
    expected = expected_tensors(config)
    found: dict[str, StoredTensor] = {}
    complaints: list[str] = []
    for entry in entries:
        name = _ALIASES.get(entry.name, entry.name)
        if name in found:
            complaints.append(f"{entry.name} in {entry.file} is a second copy of one in {found[name].file}")
        elif name in expected or (name == LM_HEAD and config.tied_embeddings):
            shape = expected.get(name, (config.vocab_size, config.hidden_size))
            if entry.shape != shape:
                complaints.append(
                    f"{entry.name} in {entry.file} has shape {list(entry.shape)}; the config needs {list(shape)}"
                )
            elif _FLOATING.get(entry.dtype) is None:
                complaints.append(
                    f"{entry.name} in {entry.file} holds {entry.dtype}; supported are float16, bfloat16, float32, float64"
                )
            found[name] = entry
        elif not _REBUILT.search(name):
            complaints.append(f"{entry.name} in {entry.file} is not a tensor of this {config.family} model")
    complaints += [f"{name} is missing from {source}" for name in expected if name not in found]
    if complaints:
        more = len(complaints) - _MOST_COMPLAINTS
        listed = "; ".join(complaints[:_MOST_COMPLAINTS]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{source} does not fit its config: {listed}")
    return found


def locate(model: str) -> Path:
    """The folder of `model`: a local one, or a hub id (`owner/name`, or `owner/name@revision`) downloaded or cached.

    Raises CheckpointError saying what was looked for, and where.
    """
    try:
        path = Path(model).expanduser()
        if model and path.is_dir():
            return path
        if model and path.exists():
            raise CheckpointError(f"{model!r} is a file; a checkpoint is a folder with config.json and the weights")
    except OSError as error:
        raise CheckpointError(f"model of {len(model)} characters is no folder's name: {error.strerror}") from error
    except RuntimeError as error:  # there is no such user
        raise CheckpointError(f"{model!r} is no folder here: {error}") from error
    if model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is neither a folder here nor a hub id of the form owner/name")
    repo_id, _, revision = model.partition("@")
    return _download(repo_id, revision or None)


def explain_missing(model: str) -> str:
    """What to say after naming a file that is missing from where `locate` found `model`; "" for a local folder.

    Without a network the hub client gives whatever an earlier download left.
    """
    if not HUB_ID.fullmatch(model) or Path(model).is_dir():
        return ""
    return (
        f"; the cached copy of {model} is incomplete, or the repository lacks the file: "
        "connect to the network and run again"
    )


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr is None:  # a daemon: the client would write its bars all the same
        disable_progress_bars()
    common = ["*.json", "tokenizer.model", "merges.txt"]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*common, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*common, "pytorch_model*.bin"]))
    except Exception as error:  # the hub client raises many kinds: no network, no such repository, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repo_id!r} is no local folder, and the hub did not give it: {reason} "
            "(check the name and the network, or pass a checkpoint folder)"
        ) from error
    return folder


def _open_weights(folder: Path, files: contextlib.ExitStack) -> list[StoredTensor]:
    single, sharded = folder / "model.safetensors", folder / "model.safetensors.index.json"
    single_bin, sharded_bin = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if single.is_file():
        return list(_open_safetensors(single, files))
    if sharded.is_file():
        return _open_shards(sharded, lambda path: _open_safetensors(path, files))
    if single_bin.is_file():
        return list(_open_pickle(single_bin))
    if sharded_bin.is_file():
        return _open_shards(sharded_bin, _open_pickle)
    raise MissingFileError(
        f"{folder} holds no weights: looked for {single.name}, {sharded.name}, {single_bin.name}, {sharded_bin.name}"
    )


def _open_shards(index: Path, open_file: Callable[[Path], Iterator[StoredTensor]]) -> list[StoredTensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} holds no weight_map from tensor names to files")
    entries: list[StoredTensor] = []
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        names = [name for name, file in weight_map.items() if file == shard]
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} says that {names[0]} lies in {shard!r}; it must be a file beside the index")
        if not _is_file(path):
            raise MissingFileError(
                f"{path} is missing; {index.name} says it holds {names[0]} and {len(names) - 1} more"
            )
        entries += open_file(path)
    held = {entry.name for entry in entries}
    for name, shard in weight_map.items():
        if name not in held:
            raise CheckpointError(f"{name} is missing from {index.parent / shard}, where {index.name} says it lies")
    return entries


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False


def _open_safetensors(path: Path, files: contextlib.ExitStack) -> Iterator[StoredTensor]:
    from safetensors import safe_open

    try:
        handle = files.enter_context(safe_open(path, framework="pt"))
        names = list(handle.keys())
    except Exception as error:  # SafetensorError (truncated, malformed header) or OSError
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    for name in names:
        piece = handle.get_slice(name)
        yield StoredTensor(
            name, path, tuple(piece.get_shape()), str(piece.get_dtype()), functools.partial(handle.get_tensor, name)
        )


def _open_pickle(path: Path) -> Iterator[StoredTensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # truncated zip, foreign pickle, or the old format, which cannot be mapped
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            printable = "".join(c if c.isprintable() else "?" for c in reason)
            raise CheckpointError(f"{path} is not a readable PyTorch weights file: {printable}") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds {type(state).__name__}; it must hold a mapping of names to tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds a tensor under {name!r}; tensors are named by strings")
        yield _in_memory(name, tensor, path)


def _in_memory(name: str, tensor: object, source: Path) -> StoredTensor:
    """An entry of a state dict, whose tensor is used where it lies."""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{name} in {source} is {type(tensor).__name__}, not a tensor (quantised models hold such entries, and are not supported)"
        )
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{name} in {source} is {tensor.layout} on {tensor.device}; it must be dense, with values"
        )
    return StoredTensor(name, source, tuple(tensor.shape), str(tensor.dtype), functools.partial(_itself, tensor))


_FLOATING = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "torch.float16": torch.float16,
    "torch.bfloat16": torch.bfloat16,
    "torch.float32": torch.float32,
    "torch.float64": torch.float64,
}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _torch_dtype(entry: StoredTensor) -> torch.dtype:
    return _FLOATING[entry.dtype]


def _check_finite(tensor: Tensor, name: str, source: str, target: torch.dtype) -> None:
    """Raise CheckpointError for values that are not finite, or would not be in `target`."""
    bounds = torch.stack(torch.aminmax(tensor.detach()))  # one pass, no temporary of the tensor's size; NaN propagates
    if not bounds.isfinite().all():
        raise CheckpointError(f"{name} in {source} holds values that are not finite (NaN or infinity)")
    if not bounds.to(target).isfinite().all():
        largest = bounds[bounds.abs().argmax()]
        wide = next(t for t in (torch.bfloat16, torch.float32, torch.float64) if largest.to(t).isfinite())
        raise CheckpointError(
            f"{name} in {source} holds {largest.item():g}, which {_short(target)} cannot hold; "
            f"load with dtype={_short(wide)!r}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tied(config: DecoderConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    head = tensors.get(LM_HEAD)
    if not config.tied_embeddings or head is None:
        return
    embedding = tensors[NAMES[config.family].embedding]
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise CheckpointError(f"{LM_HEAD} in {source} differs from the embedding that tie_word_embeddings says it is")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or absurd numbers
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; it must hold an object")
    return value


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def check_model_argument(model: object) -> None:
    """Raise ArgumentError unless `model` is something `load` can take."""
    if isinstance(model, (str, Path)):
        return
    if not (hasattr(model, "state_dict") and hasattr(getattr(model, "config", None), "to_dict")):
        raise ArgumentError(
            f"model is {type(model).__name__}; it must be a hub id, a checkpoint folder, 'demo', "
            "or an instantiated transformers model"
        )
