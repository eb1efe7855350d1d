"""All units of one plan on a model, as one: the step's runner and those of the groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from layercache.models.adapters import Adapter, BlockList, blocks_of, timeless_blocks
from layercache.models.clock import Clock
from layercache.models.gates import Handler
from layercache.plan import Plan, UnitPlan
from layercache.runtime._groups import Branch, GroupRunner
from layercache.runtime._steps import StepRunner
from layercache.runtime._timeless import TimelessBlocks


def placed(
    plan: Plan, transformer: nn.Module, adapter: Adapter
) -> Iterator[tuple[UnitPlan, BlockList, list[nn.Module]]]:
    """The groups of a plan, each with the declaration and all blocks of the list that it is in."""
    for group in plan.groups:
        declared = adapter.block_list(str(group.block_list))
        yield group, declared, blocks_of(transformer, declared)


class Units:
    """The runners of a plan's units; the step has one also where the plan has no row for it.

    `timeless` are the blocks that are no unit, since they see no timestep. `handlers` is what the
    gates of all blocks do.
    """

    def __init__(
        self,
        plan: Plan,
        transformer: nn.Module,
        adapter: Adapter,
        on_problem: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.plan = plan
        self.step = StepRunner(plan.step_row.schedule(plan.sigmas), plan.sigmas, on_problem)
        self.groups = [
            GroupRunner(group, plan.schedules[group.name], declared, blocks, on_problem, clock)
            for group, declared, blocks in placed(plan, transformer, adapter)
        ]
        self.by_name: dict[str, StepRunner | GroupRunner] = {self.step.name: self.step}
        self.by_name |= {runner.name: runner for runner in self.groups}
        self.timeless = TimelessBlocks(timeless_blocks(transformer, adapter))
        self.handlers: dict[nn.Module, Handler] = dict(self.timeless.handlers)
        for runner in self.groups:
            self.handlers |= runner.handlers

    def begin_run(self) -> None:
        """Start counting bytes anew."""
        for unit in self.by_name.values():
            unit.begin_run()
        self.timeless.begin_run()

    def finish_step(self, step: int) -> None:
        """Free what no step after `step` reads."""
        for unit in self.by_name.values():
            unit.finish_step(step)
        if step == self.plan.num_steps - 1:
            self.timeless.flush()

    def flush(self, branch: Branch | None = None) -> None:
        """Drop what is held, of one branch or of all."""
        for unit in self.by_name.values():
            unit.flush(branch)
        self.timeless.flush(branch)

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors held now."""
        units = sum(unit.held_bytes for unit in self.by_name.values())
        return units + self.timeless.held_bytes
