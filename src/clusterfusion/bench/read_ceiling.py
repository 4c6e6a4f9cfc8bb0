"""Bytes a second that this GPU reads: measured, and proved to have been read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clusterfusion.bench.samples import Candidate, Summary
from clusterfusion.errors import ClusterFusionError
from clusterfusion.jit.device import device_limits
from clusterfusion.jit.read_ceiling import VARIANTS, ReadArguments, Variant, ctas, prepare
from clusterfusion.random_weights import MATRIX_STD, uniform

LEAST_BYTES = 2 << 30  # dozens of times any L2 cache; shorter reads would count the launch and the tail
MOST_BYTES = 6 << 30
LEAD_BYTES = 1 << 30  # 230 µs on an H200
_FOLD_WORDS = 1 << 26
_STREAM = 0x0C0FFEE  # of the random values; any number


def data_bytes(layer_bytes: int) -> int:
    """Bytes to read for the ceiling beside layers of `layer_bytes`: as many, within bounds, since a longer read has a
    smaller share of launch and tail. A multiple of 16."""
    return min(max(layer_bytes, LEAST_BYTES), MOST_BYTES) // 16 * 16


@dataclasses.dataclass(frozen=True)
class ReadSpeeds:
    """What reading `num_bytes` bytes once took, by variant."""

    num_bytes: int
    times: Mapping[str, Summary]

    def speed(self, variant: str) -> float:
        """Bytes a second of one variant, by its median time."""
        return self.num_bytes / self.times[variant].median_ms * 1e3

    @property
    def ceiling(self) -> float:
        """Bytes a second of the faster variant."""
        return max(self.speed(variant) for variant in self.times)

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes_per_s": self.ceiling,
            "bytes": self.num_bytes,
            "variants": {
                variant: dataclasses.asdict(summary) | {"bytes_per_s": self.speed(variant)}
                for variant, summary in self.times.items()
            },
        }

    def __str__(self) -> str:
        variants = ", ".join(f"{variant} {self.speed(variant) / 1e9:.0f}" for variant in self.times)
        return f"read ceiling {self.ceiling / 1e9:.0f} GB/s ({variants}; {self.num_bytes / 1e9:.1f} GB read once)"


class ReadCeiling:
    """Random data on a GPU and the prepared launches that read it; `lead` reads other data of LEAD_BYTES."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.device = device
        count = (num_bytes + LEAD_BYTES) // 2
        self._data = uniform((count,), 0.0, MATRIX_STD, _STREAM, torch.float16, device)
        multiprocessors = device_limits(device.index).multiprocessors
        self._words = {
            variant: torch.zeros(ctas(variant, multiprocessors), dtype=torch.int32, device=device)
            for variant in VARIANTS
        }
        self._lead_words = torch.zeros_like(self._words["loads"])
        self.lead = self._prepare("loads", 0, LEAD_BYTES, self._lead_words)

    def _prepare(self, variant: Variant, offset: int, num_bytes: int, words: Tensor) -> Callable[[], None]:
        arguments = ReadArguments(self._data.data_ptr() + offset, num_bytes, words.data_ptr())
        return prepare(variant, arguments, self.device.index)

    def _launches(self, num_bytes: int) -> dict[Variant, Callable[[], None]]:
        return {variant: self._prepare(variant, LEAD_BYTES, num_bytes, self._words[variant]) for variant in VARIANTS}

    def candidates(self, samples: int, num_bytes: int | None = None) -> list[Candidate]:
        """One a variant, by the variant's name. They read all of the data, or its first `num_bytes`, a multiple of 16."""
        launches = self._launches(num_bytes or self.num_bytes)
        return [Candidate(name, lambda: None, launch, samples) for name, launch in launches.items()]

    def check(self, num_bytes: int | None = None) -> None:
        """Raise ClusterFusionError unless both variants read every word of all the data, or of its first `num_bytes`:
        their XOR is compared with PyTorch's."""
        num_bytes = num_bytes or self.num_bytes
        expected = xor_of(self._data[LEAD_BYTES // 2 : (LEAD_BYTES + num_bytes) // 2])
        for variant, launch in self._launches(num_bytes).items():
            self._words[variant].zero_()
            launch()
            seen = xor_of(self._words[variant])
            if seen != expected:
                raise ClusterFusionError(
                    f"the read ceiling's kernel ({variant}) folded its data to {seen:#010x}; PyTorch says "
                    f"{expected:#010x}: it does not read what it should, so its speed means nothing"
                )


def xor_of(data: Tensor) -> int:
    """The XOR of all 32-bit words of `data`, a dense 1-D tensor, as an unsigned number."""
    words = data.view(torch.int32)
    total = torch.zeros(1, dtype=torch.int32, device=data.device)
    for start in range(0, len(words), _FOLD_WORDS):
        chunk = words[start : start + _FOLD_WORDS]
        while len(chunk) > 1:
            half = len(chunk) // 2
            folded = chunk[:half] ^ chunk[half : 2 * half]
            if len(chunk) % 2:
                folded[0] ^= chunk[-1]
            chunk = folded
        total ^= chunk
    return int(total) & 0xFFFFFFFF
