"""KeyRerotation: what stays stands close together."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.reduce import ranks
from jaxtok.core.registry import register
from jaxtok.core.rotary import turn
from jaxtok.core.types import KV, Evidence, Needs, live_count
from jaxtok.core.wrap import Wrapper


@register(
    "key_rerotation",
    site="cache",
    paper="arXiv:2408.00167",
    title="Finch: Prompt-guided Key-Value Cache Compression",
    authors="Giulio Corallo and Paolo Papotti",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyRerotation(Wrapper):
    """Compress by `base`, then rotate the keys that stay to compact positions: k_j = R(id_j) k_j^unrotated.

    id_j = C - (live keys of the head) + (how many of them are older than j), with C = the largest number of live keys of a row's
    heads: the newest key of every head gets C - 1, and the next token gets C whatever the head (`delta` = C - `seen`). Heads with
    fewer keys begin later. Order (`pos`, `seen`) stays, so causality and windows are untouched. Since R(a) R(b) = R(a + b) this is
    the rotation by id_j minus the old id.

    Nothing dropped is the identity where the rows came in without gaps; where `base` has nothing to do statically, nothing moves.
    Source: FINCH's position policy, kvpress's KeyRerotationPress (heads of equal budgets there).
    """

    rotates: ClassVar[bool] = True

    base: CacheCompressor

    def __post_init__(self):
        self.check_base()

    @property
    def needs(self) -> Needs:
        return self.base.needs | Needs(keys=True)

    def compress(self, params, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Evidence]:
        if evidence.keys is None or evidence.freqs is None:
            raise ValueError("key_rerotation needs the keys before the rotary embedding and its frequencies: a model with rotary positions")
        if keep is None and self.whole(kv.pos.shape[-1]):
            return kv, evidence
        kv, evidence = self.base.compress(params, kv, evidence, keep)
        live = live_count(kv.pos)
        end = jnp.max(live, -1)
        ids = jnp.where(kv.pos >= 0, ranks(kv.pos) + (end[:, None] - live)[..., None], 0)
        k = turn(evidence.keys, ids, evidence.freqs).astype(kv.k.dtype)  # type: ignore[arg-type]
        return kv._replace(k=k, delta=end - kv.seen), evidence
