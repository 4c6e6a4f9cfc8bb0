"""The end of a step on its own compiles for every shape of test_decoder_block_compiles.py, without spills."""

from __future__ import annotations

import pytest
from jit.test_decode_step_compiles import SHAPES, check_compiled

from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.decoder_block import ElementType
from clusterfusion.jit.lm_head import head_source
from clusterfusion.plan import PlanLimits, plan_block


@pytest.mark.parametrize(("config", "limits", "architecture", "weight_type"), SHAPES.values(), ids=SHAPES)
def test_compiles_without_spills(
    config: DecoderConfig, limits: PlanLimits, architecture: str, weight_type: ElementType
) -> None:
    plan = plan_block(config, limits)
    check_compiled(head_source(plan, weight_type), plan, architecture)
