"""The common part of cache methods that hold another one."""

import dataclasses
from typing import Any, ClassVar

import jax

from jaxtok.core.protocols import CacheCompressor, CachePolicy, CacheScorer
from jaxtok.core.types import KV, Evidence, Frozen, Needs, Plan


class Wrapper(CacheCompressor):
    """A compressor around `base`, which answers for everything that a subclass does not do itself. `takes` is what a base must be."""

    base: CacheCompressor
    takes: ClassVar[type] = CacheCompressor

    def check_base(self) -> None:
        """TypeError for a base that is not what this wrapper takes; call it first in __post_init__."""
        if isinstance(self.base, self.takes):
            return
        if self.takes is CacheScorer:
            raise TypeError(
                f"{self.name} needs the scores of its base, a CacheScorer; got {self.base!r}. Put other wrappers around {self.name}"
            )
        raise TypeError(f"{self.name} needs a {self.takes.__name__} as its base, got {self.base!r}")

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self.base.capacity

    @property
    def slots(self) -> int:
        return self.base.slots

    @property
    def needs(self) -> Needs:
        return self.base.needs

    @property
    def reads_rotated(self) -> bool:  # type: ignore[override]
        return self.base.reads_rotated

    @property
    def edits(self) -> bool:  # type: ignore[override]
        return self.base.edits

    @property
    def rotates(self) -> bool:  # type: ignore[override]
        return self.base.rotates

    def init_params(self, key: jax.Array, cfg) -> Any:
        return self.base.init_params(key, cfg)

    def around(self, base: CacheCompressor) -> "Wrapper":
        """This wrapper around another base."""
        return dataclasses.replace(self, base=base)  # type: ignore[type-var]

    def resize(self, capacity: int) -> CacheCompressor:
        return self.around(self.base.resize(capacity))

    def whole(self, n: int) -> bool:
        return self.base.whole(n)

    def layer(self, i: int, layers: int) -> CacheCompressor:
        return self.around(self.base.layer(i, layers))

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        """Which slots stay: the base's."""
        return self.base.plan(params, kv, evidence, keep)

    def freeze(self, params, kv: KV, evidence: Evidence) -> tuple[KV, Frozen | None]:
        return self.base.freeze(params, kv, evidence)


class StepWrapper(CachePolicy):
    """A step policy around `base`, another one, which answers for everything about itself that a subclass does not say."""

    base: CachePolicy

    def check_base(self) -> None:
        """TypeError for a base that is no step policy; call it first in __post_init__."""
        if not isinstance(self.base, CachePolicy):
            raise TypeError(f"{self.name} needs a CachePolicy as its base, got {self.base!r}")

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self.base.capacity

    @property
    def every(self) -> int:  # type: ignore[override]
        return self.base.every

    @property
    def raw(self) -> bool:  # type: ignore[override]
        return self.base.raw

    @property
    def reads_rotated(self) -> bool:  # type: ignore[override]
        return self.base.reads_rotated

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        return self.base.aligned

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.base.groups

    @property
    def needs(self) -> Needs:
        return self.base.needs

    @property
    def step_needs(self) -> Needs:
        return self.base.step_needs

    def init_params(self, key: jax.Array, cfg) -> Any:
        return self.base.init_params(key, cfg)

    def layer(self, i: int, layers: int) -> CachePolicy:
        return dataclasses.replace(self, base=self.base.layer(i, layers))  # type: ignore[type-var]

    def head_group(self, j: int) -> CachePolicy | None:
        base = self.base.head_group(j)
        return None if base is None else dataclasses.replace(self, base=base)  # type: ignore[type-var]
