"""Is there room? Asked before gigabytes are allocated, so that the answer is an error and not a killed process."""

from __future__ import annotations

from pathlib import Path

import torch

from clusterfusion.errors import DeviceError


def require_memory(what: str, needed_bytes: int, device: torch.device) -> None:
    """Raise DeviceError unless `needed_bytes` are free on `device`, as far as can be known."""
    free = free_bytes(device)
    if free is not None and needed_bytes > free:
        raise DeviceError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free; "
            "take a smaller model, a shorter max_seq_len, a 16-bit dtype, or another device"
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
