"""What tests of the step's schedule share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from plan.orders import Edit

from clusterfusion.plan import BlockPlan, step
from clusterfusion.plan.block_check import Role
from clusterfusion.plan.step import Action


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], None]:
    """Puts an edit between the schedule and whoever asks for it."""
    original = step.step_schedule

    def use(edit: Edit) -> None:
        def schedule(plan: BlockPlan, cta: int, role: Role, position: int = 0) -> Iterator[Action]:
            yield from edit(cta, list(original(plan, cta, role, position)))

        monkeypatch.setattr(step, "step_schedule", schedule)

    return use
