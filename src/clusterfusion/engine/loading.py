"""`load`: from a model's name, folder or object to an Engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from clusterfusion import checkpoint
from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import as_int
from clusterfusion.engine.engine import Engine
from clusterfusion.engine.memory import require_memory
from clusterfusion.engine.modes import choose_mode
from clusterfusion.engine.progress import progress_bar
from clusterfusion.engine.text import VOCABULARIES, FastTokenizer, TextTokenizer, read_tokenizer
from clusterfusion.errors import ArgumentError, CheckpointError, DeviceError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.random_weights import random_weights as make_random_weights
from clusterfusion.weights import DecoderWeights

DEMO = "demo"
# A K/V cache is allocated whole, so long-context models get this much unless asked for more.
DEFAULT_MAX_SEQ_LEN = 8192

_DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
}


def load(
    model: str | Path | Any | None = None,
    *,
    mode: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    max_seq_len: int | None = None,
    random_weights: str | DecoderConfig | None = None,
    seed: int = 0,
) -> Engine:
    """Load a decoder and return an Engine.

    model: a hub id ("EleutherAI/pythia-2.8b", or "owner/name@revision"), a checkpoint folder, "demo", or an
        instantiated transformers model, whose storage is shared: later changes of its parameters show here.
    mode: "auto" for the fastest that device and model support, or "reference", "split", "fused", "graph", "model".
    dtype: of weights and K/V cache. None: on a GPU as stored, on the CPU float32 (exact, and fast there); for an
        instantiated model its own.
    device: None for the current GPU where there is one, else the CPU; for an instantiated model its own.
    max_seq_len: tokens a session has room for; None for the model's limit, at most 8192.
    random_weights: a named shape ("pythia-2.8b"; `clusterfusion models` lists them) or a DecoderConfig, built without a
        checkpoint, reproducibly from `seed`, on every device alike.

    Raises ArgumentError, CheckpointError, UnsupportedModelError or DeviceError; nothing half-loaded survives.
    """
    if (model is None) == (random_weights is None):
        got = "neither was" if model is None else "both were"
        raise ArgumentError(f"load needs either model or random_weights; {got} given")
    wanted_dtype = _parse_dtype(dtype)
    if random_weights is not None:
        return _load_random(random_weights, seed, mode, wanted_dtype, device, max_seq_len)
    checkpoint.check_model_argument(model)
    if isinstance(model, (str, Path)):
        return _load_named(str(model), mode, wanted_dtype, device, max_seq_len)
    return _load_object(model, mode, wanted_dtype, device, max_seq_len)


def _load_random(
    shape: str | DecoderConfig,
    seed: int,
    mode: str,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    max_seq_len: int | None,
) -> Engine:
    config = shape if isinstance(shape, DecoderConfig) else named_shape(shape)
    name = "random weights" if isinstance(shape, DecoderConfig) else f"{shape} (random weights)"
    place = _parse_device(device)
    dtype = dtype or _default_dtype(config, place) or torch.float16
    choice = choose_mode(mode, config, dtype, place)
    room = _parse_max_seq_len(max_seq_len, config)
    total = config.num_parameters * dtype.itemsize
    require_memory(name, total, place)
    with progress_bar(f"making {name}", total) as on_bytes:
        weights = _guard_memory(
            name,
            place,
            lambda: make_random_weights(config, seed=seed, dtype=dtype, device=place, on_bytes=on_bytes),
        )
    return Engine(weights, name=name, mode=choice, max_seq_len=room, tokenizer=None, eos_token_ids=config.eos_token_ids)


def _load_named(
    model: str, mode: str, dtype: torch.dtype | None, device: str | torch.device | None, max_seq_len: int | None
) -> Engine:
    if model.lower() in NAMED_SHAPES and not Path(model).is_dir():
        raise ArgumentError(
            f"model is {model!r}, the name of a shape and not of a checkpoint; pass a hub id (owner/name) or a folder, "
            f"or load(random_weights={model!r}) for random weights"
        )
    place = _parse_device(device)
    folder = demo_folder() if model == DEMO else checkpoint.locate(model)
    try:
        return _load_folder(folder, model, mode, dtype, place, max_seq_len)
    except checkpoint.MissingFileError as error:
        raise CheckpointError(f"{error}{checkpoint.explain_missing(model)}") from error


def _load_folder(
    folder: Path, model: str, mode: str, dtype: torch.dtype | None, place: torch.device, max_seq_len: int | None
) -> Engine:
    config = checkpoint.read_config_file(folder)
    dtype = dtype or _default_dtype(config, place)
    choice = choose_mode(mode, config, dtype or torch.float16, place)
    room = _parse_max_seq_len(max_seq_len, config)
    total = config.num_parameters * (dtype or torch.float16).itemsize
    require_memory(model, total, place)
    with progress_bar(f"loading {model}", total) as on_bytes:
        weights = _guard_memory(
            model, place, lambda: checkpoint.load_folder(folder, dtype=dtype, device=place, on_bytes=on_bytes)
        )
    tokenizer, reason = _read_tokenizer(lambda: read_tokenizer(folder))
    if tokenizer is None and not reason:
        looked_for = ", ".join(map(" with ".join, VOCABULARIES))
        reason = f"{folder} holds none of {looked_for}{checkpoint.explain_missing(model)}"
    return Engine(
        weights,
        name=model,
        mode=choice,
        max_seq_len=room,
        tokenizer=tokenizer,
        eos_token_ids=checkpoint.read_eos_token_ids(folder, config),
        no_tokenizer_reason=reason,
    )


def _load_object(
    model: Any, mode: str, dtype: torch.dtype | None, device: str | torch.device | None, max_seq_len: int | None
) -> Engine:
    weights = checkpoint.load_transformers_model(model)
    if dtype not in (None, weights.dtype):
        raise ArgumentError(
            f"dtype is {dtype}, but the model's weights are {weights.dtype} and are shared, not copied; "
            f"convert it first (model.to({dtype})) or leave dtype out"
        )
    if device is not None and _parse_device(device) != weights.device:
        raise ArgumentError(
            f"device is {str(device)!r}, but the model is on {str(weights.device)!r} and is shared, not copied; "
            "move it first (model.to(device)) or leave device out"
        )
    config = weights.config
    tokenizer, reason = _read_tokenizer(lambda: _tokenizer_of(model))
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos_ids = checkpoint.check_eos_token_ids(eos, "generation_config.eos_token_id") or config.eos_token_ids
    return Engine(
        weights,
        name=getattr(model, "name_or_path", "") or type(model).__name__,
        mode=choose_mode(mode, config, weights.dtype, weights.device),
        max_seq_len=_parse_max_seq_len(max_seq_len, config),
        tokenizer=tokenizer,
        eos_token_ids=eos_ids,
        no_tokenizer_reason=reason,
    )


def demo_folder() -> Path:
    """The folder of the built-in demo model."""
    folder = Path(str(resources.files("clusterfusion"))) / "demo_model"
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"the demo model is missing from this installation: {folder} holds no config.json")
    return folder


def _read_tokenizer(read: Callable[[], TextTokenizer | None]) -> tuple[TextTokenizer | None, str]:
    """A tokenizer, or None and the reason: a model whose tokenizer cannot be read still generates from token ids."""
    try:
        return read(), ""
    except ArgumentError as error:
        return None, str(error)


def _tokenizer_of(model: Any) -> TextTokenizer | None:
    """The tokenizer beside an instantiated model's checkpoint, if it is on this machine."""
    source = getattr(model, "name_or_path", "") or ""
    if source and Path(source).is_dir():
        return read_tokenizer(Path(source))
    if checkpoint.HUB_ID.fullmatch(source):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "tokenizer.json")
        if isinstance(cached, str):
            return FastTokenizer(Path(cached))
    return None


def _guard_memory(name: str, device: torch.device, make: Callable[[], DecoderWeights]) -> DecoderWeights:
    try:
        return make()
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{name} does not fit the memory of {device}: {str(error).splitlines()[0]}") from None


def _default_dtype(config: DecoderConfig, device: torch.device) -> torch.dtype | None:
    if device.type == "cpu":
        return torch.float64 if config.dtype == "float64" else torch.float32
    return _DTYPES[config.dtype] if config.dtype else None


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, _DTYPES))}, or None")
    return _DTYPES[name]


def _parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:N'") from error
    if place.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:N'")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device is {str(device)!r}, but PyTorch sees no GPU here; use device='cpu'")
        if place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        elif place.index >= torch.cuda.device_count():
            raise DeviceError(f"device is {str(device)!r}, but there are only {torch.cuda.device_count()} GPUs")
    return torch.device("cpu") if place.type == "cpu" else place  # "cpu:0" is the CPU too


def _parse_max_seq_len(max_seq_len: int | None, config: DecoderConfig) -> int:
    if max_seq_len is None:
        return min(config.max_position, DEFAULT_MAX_SEQ_LEN)
    return as_int("max_seq_len", max_seq_len, 1, config.max_position)
