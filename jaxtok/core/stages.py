"""Site layers: one method at several places of a decoder, each with a number of image rows of its own, and places where it only looks on."""

import dataclasses

from jaxtok.core import check
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner
from jaxtok.core.select import identity
from jaxtok.core.types import Evidence, Plan, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedPruner(Pruner):
    """A pruner with a schedule. Name the same method at all places of `schedule(method)`; its state goes from one to the next.

    stages: (K, image rows that stay) for each place before 0-based layer K at which rows go, K rising, rows falling; () = it acts where it
    is named, with `capacity`. Otherwise `capacity` is what the last stage leaves. watch: further places, at which it only observes.
    passive: the instance at such a place. ValueError for stages out of order.
    """

    stages: tuple[tuple[int, int], ...] = ()
    watch: tuple[int, ...] = ()
    passive: bool = False

    def __post_init__(self):
        super().__post_init__()
        check.kind("stages", self.stages, tuple)
        check.kind("watch", self.watch, tuple)
        check.kind("passive", self.passive, bool)
        at, left = -1, self.images
        for stage in self.stages:
            check.kind("stages", stage, tuple)
            if len(stage) != 2:
                raise ValueError(f"stages={self.stages} must be pairs (layer, image rows that stay)")
            check.count("stages", stage[0], at + 1)
            check.count("stages", stage[1], 0, left)
            at, left = stage
            if not left and stage != self.stages[-1]:
                raise ValueError(f"stages={self.stages}: no image row is left behind layer {at}; end there")
        if self.stages and left != self.capacity:
            raise ValueError(f"capacity={self.capacity} must be what the last of stages={self.stages} leaves")
        for k in self.watch:
            check.count("watch", k, 0)

    def layer(self, i: int, layers: int) -> "StagedPruner":
        if not self.stages:
            return self
        come = min((stay for k, stay in self.stages if k < i), default=self.images)
        stay = dict(self.stages).get(i)
        if stay is None:  # rows stay where they stand
            return dataclasses.replace(self, stages=(), watch=(), passive=True, capacity=come, images=max(come, 1), positions="keep")
        return dataclasses.replace(self, stages=(), watch=(), capacity=stay, images=come)

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        if self.passive:
            return self.observe(params, state, tokens, evidence), identity(tokens.pos.shape)
        return super().plan(params, state, tokens, evidence, keep)


def schedule(method: StagedPruner) -> tuple[tuple[int, StagedPruner], ...]:
    """The entries of Recipe.layers: the method at each of its stages and wherever it watches."""
    check.kind("method", method, StagedPruner)
    return tuple((k, method) for k in sorted({*method.watch, *(k for k, _ in method.stages)}))
