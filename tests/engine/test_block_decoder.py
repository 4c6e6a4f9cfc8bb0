"""What a step of BlockDecoder holds for whatever it runs. What it runs needs a GPU: tests/gpu."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clusterfusion.engine.block_decoder import BlockDecoder


@pytest.mark.parametrize("inference", [False, True])
def test_a_step_records_no_gradient(inference: bool) -> None:
    seen = []

    class Decoder(BlockDecoder):
        def __init__(self) -> None:
            self._weights = SimpleNamespace(device=-1)  # type: ignore[assignment]  # to torch, no device

        def check_error(self) -> None:
            pass

        def _step(self, token: int, position: int) -> Tensor:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return torch.zeros(1)

    with torch.inference_mode(inference):
        Decoder().step(1, 0)
    assert seen == [(False, False)]
