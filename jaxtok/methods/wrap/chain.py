"""Chain: one compressor after the other."""

import dataclasses
import functools

import jax

from jaxtok.core import budget, select
from jaxtok.core.compose import compose
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.reduce import move, reduce_kv
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Frozen, Needs, Plan


@register(
    "chain",
    site="cache",
    paper="https://github.com/NVIDIA/kvpress",
    title="KVPress",
    authors="NVIDIA",
    year=2024,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(CacheCompressor):
    """Compress by `methods[0]`, what is left by `methods[1]`, and so on; each sees the evidence of what is left.

    A traced `keep` is the budget of the last method that counts slots (ThinK, say, does not); the others take their capacities. A method whose capacity is not below the slots
    that reach it does nothing. A chain of one is that method. `params` is a tuple, one entry a method.
    Source: kvpress's ComposedPress.
    """

    methods: tuple[CacheCompressor, ...]

    def __post_init__(self):
        if not self.methods:
            raise ValueError("chain needs at least one method, got ()")
        for method in self.methods:
            if not isinstance(method, CacheCompressor):
                raise TypeError(f"chain takes cache compressors, got {method!r}")

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return min(method.capacity for method in self.methods)

    @property
    def slots(self) -> int:
        return min(method.slots for method in self.methods)

    @property
    def needs(self) -> Needs:
        return functools.reduce(lambda a, b: a | b, (method.needs for method in self.methods))

    @property
    def reads_rotated(self) -> bool:  # type: ignore[override]
        return any(method.reads_rotated for method in self.methods)

    @property
    def edits(self) -> bool:  # type: ignore[override]
        return any(method.edits for method in self.methods)

    @property
    def rotates(self) -> bool:  # type: ignore[override]
        return any(method.rotates for method in self.methods)

    def init_params(self, key: jax.Array, cfg):
        return tuple(method.init_params(jax.random.fold_in(key, i), cfg) for i, method in enumerate(self.methods))

    def resize(self, capacity: int) -> "Chain":
        """The capacity of the method that a budget goes to."""
        methods = [m.resize(capacity) if i == self._last else m for i, m in enumerate(self.methods)]
        return Chain(methods=tuple(methods))

    def layer(self, i: int, layers: int) -> CacheCompressor:
        return Chain(methods=tuple(method.layer(i, layers) for method in self.methods))

    @property
    def _last(self) -> int:
        """Which method a budget is for."""
        return max((i for i, m in enumerate(self.methods) if m.capacity < budget.UNLIMITED), default=len(self.methods) - 1)

    def _links(self, params, keep):
        """(method, its params, its budget) in turn."""
        own = params if params else ({},) * len(self.methods)
        return [(method, p, keep if i == self._last else None) for i, (method, p) in enumerate(zip(self.methods, own, strict=True))]

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        whole = select.identity(kv.pos.shape)
        for method, own, limit in self._links(params, keep):
            if limit is None and method.whole(kv.pos.shape[-1]):
                continue
            plan = method.plan(own, kv, evidence, limit)
            kv, evidence, whole = reduce_kv(plan, kv), move(plan, evidence), compose(whole, plan)
        return whole  # type: ignore[return-value]  (only dense plans compose to a dense one)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        for method, own, limit in self._links(params, keep):
            kv, evidence = method.compress(own, kv, evidence, limit)
        return kv, evidence

    def freeze(self, params, kv: KV, evidence: Evidence) -> tuple[KV, Frozen | None]:
        """What the one method freezes that does, once all have compressed."""
        frozen = None
        for method, own, _ in self._links(params, None):
            kv, more = method.freeze(own, kv, evidence)
            if frozen is not None and more is not None:
                raise ValueError(f"chain: {method.name} would freeze what another of its methods has frozen already; use one of them")
            frozen = frozen if more is None else more
        return kv, frozen
