"""The whole cache: what every other method is measured against."""

import dataclasses

from jaxtok.core import select
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Plan


@register("full", paper="baseline", site="cache")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(CacheCompressor):
    """Keep every slot.

    `capacity` and `keep` have no effect: they are taken so that this baseline can stand wherever a compressor is asked for. The cache
    goes through `compress` untouched; `plan` names all live slots.
    """

    aligned = True
    capacity: int = 2**31 - 1

    def plan(self, params, kv: KV, evidence: Evidence, keep=None) -> Plan:
        return select.pack(kv.pos >= 0)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        return kv, evidence
