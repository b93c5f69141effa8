"""PerLayer: a budget of its own for each layer."""

import dataclasses

from jaxtok.core import budget, check
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Plan
from jaxtok.core.wrap import Wrapper


@register(
    "per_layer",
    site="cache",
    paper="https://github.com/NVIDIA/kvpress",
    title="KVPress",
    authors="NVIDIA",
    year=2024,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayer(Wrapper):
    """Layer i keeps `capacities[i]` slots a head by `base`, instead of `base`'s own capacity.

    Either `capacities`, or `weights`: then layer i gets weights[i] / sum(weights) of layers * base.capacity, rounded by largest
    remainder, each from `least` to `most`, so the sum over the layers is exactly layers * base.capacity. Equal capacities are `base`.
    Budgets that `base` itself would make from the layer (a pyramid) give way; the rest of its `layer` stays.

    A traced `keep` counts for the layer that it is given to. ValueError where the model has another number of layers.
    Source: PerLayerCompressionPress (ratios there, slots here).
    """

    base: CacheCompressor
    capacities: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    least: int = 1
    most: int | None = None

    def __post_init__(self):
        self.check_base()
        if bool(self.capacities) == bool(self.weights):
            raise ValueError(
                f"per_layer takes either capacities or weights, one number a layer; got capacities={self.capacities}, weights={self.weights}"
            )
        for capacity in dict.fromkeys(self.table):
            check.budget("capacities", capacity)
            self.base.resize(capacity)  # raises what the base has to say

    @property
    def table(self) -> tuple[int, ...]:
        """Slots of each layer."""
        if self.capacities:
            return self.capacities
        return budget.shares(self.weights, self.base.capacity * len(self.weights), self.least, self.most)

    @property
    def capacity(self) -> int:  # type: ignore[override]
        """Of the average layer, round half up."""
        return (2 * sum(self.table) + len(self.table)) // (2 * len(self.table))

    @property
    def slots(self) -> int:
        """Of the largest layer."""
        return self.base.resize(max(self.table)).slots

    def resize(self, capacity: int) -> CacheCompressor:
        """A layer's instance has its capacity; the table as a whole cannot be resized."""
        raise ValueError(f"per_layer has the capacities {self.table}; put per_layer around other wrappers, not inside")

    def layer(self, i: int, layers: int) -> CacheCompressor:
        table = self.table
        if len(table) != layers:
            raise ValueError(f"per_layer has {len(table)} capacities and the model {layers} layers; give one number a layer")
        return self.base.layer(i, layers).resize(table[i])

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        raise ValueError("per_layer plans for one layer at a time; ask per_layer.layer(i, layers) for its instance")
