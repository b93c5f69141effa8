"""CompressKV. Source: arXiv:2508.02401; TUDa-HWAI/CompressKV (methods/compresskv/snapkv_utils.py, longbench/pred_compresskv.py)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check, select
from jaxtok.core import score as scores
from jaxtok.core.protocols import CacheCompressor, CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Protect


@register(
    "compresskv",
    site="cache",
    paper="arXiv:2508.02401",
    title="CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    authors="Xiaolin Lin and Jingcun Wang and Olga Kondrateva and Yiyu Shi and Bing Li and Grace Li Zhang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressKV(CacheScorer):
    """Keep the last `window` tokens and what the layer's semantic retrieval heads attend to from there, the same for all KV heads.

        score_j = mean over the layer's `first_k` best query heads of  pool_j( sum over the last w queries i of A_ij ),   j before the window
        slots of layer i = least + round(e_i (l capacity - l least)), at most `most` * capacity, moved by ones to sum to l capacity exactly

    A and the pooling are SnapKV's; the window is counted in `capacity`. Which heads: `params["heads"]` f32 [l h], the semantic retrieval
    score of every query head (`jaxtok.train.compresskv.calibrate_heads`); its absolute values do not matter, those that equal the
    first_k-th largest all count. `init_params` gives zeros: until a model is calibrated all heads of a layer count alike, which is
    SnapKV's score with one choice for all heads, not CompressKV.

    errors: e of each layer (`jaxtok.train.compresskv.calibrate_layers`; scaled here to sum to 1). () = not calibrated, every layer has
    `capacity` slots; so have layers of equal errors. The odd slots go one by one to the layers of largest error, those too many are taken
    from the smallest. `least` holds the window. A traced `keep` counts for the layer that it is given to, at most that layer's slots.

    Heads of a cache must hold the same tokens when it arrives (true after a prefill). Recipe.heads would make several choices a layer.
    Max pooling (kind="max") makes plateaus, whose ties go to the older slot. The authors' SnapKV baseline groups query heads as
    (h/g, g); this is unaffected, as it does not group.
    """

    aligned: ClassVar[bool] = True

    capacity: int
    window: int = 8
    pool: int = 5
    kind: str = "avg"
    first_k: int = 4
    errors: tuple[float, ...] = ()
    least: int = 32
    most: int = 3

    def __post_init__(self):
        for name in ("window", "first_k", "least", "most"):
            check.count(name, getattr(self, name))
        check.one_of("kind", self.kind, ("avg", "max"))
        check.budget("capacity", self.capacity, self.window)
        check.count("pool", self.pool)
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and >= 1, so that it stays centred; got {self.pool}")
        check.kind("errors", self.errors, tuple)
        if self.errors:
            check.budget("least", self.least, self.window)
            check.budget("capacity", self.capacity, self.least)
            for e in self.errors:
                check.real("errors", e)
            if not all(0 <= e < math.inf for e in self.errors) or not 0 < sum(map(float, self.errors)) < math.inf:
                raise ValueError(f"errors must be finite, >= 0 and not all zero, got {self.errors}")

    @property
    def table(self) -> tuple[int, ...]:
        """Slots of each layer that has an error; they sum to their number * capacity."""
        count, total = len(self.errors), len(self.errors) * (self.capacity - self.least)
        top, whole = self.most * self.capacity, sum(map(float, self.errors))
        out = [min(self.least + round(e / whole * total), top) for e in map(float, self.errors)]
        order = sorted(range(count), key=lambda i: -self.errors[i])
        while (short := count * self.capacity - sum(out)) != 0:
            step = 1 if short > 0 else -1
            can = [i for i in order[::step] if self.least <= out[i] + step <= top]
            for i in can[: abs(short)]:
                out[i] += step
        return tuple(out)

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window)

    @property
    def slots(self) -> int:
        return max(self.table, default=self.capacity)

    def layer(self, i: int, layers: int) -> CacheCompressor:
        if not self.errors:
            return self
        if len(self.errors) != layers:
            raise ValueError(
                f"compresskv has the errors of {len(self.errors)} layers and the model {layers} layers; calibrate it on the model"
            )
        return self.resize(self.table[i])

    def resize(self, capacity: int) -> CacheCompressor:
        """Another capacity; of a layer that has its share, that layer's own."""
        return dataclasses.replace(self, capacity=capacity, errors=())

    def init_params(self, key: jax.Array, cfg) -> Any:
        """Nothing calibrated: all heads alike."""
        return {"heads": jnp.zeros((cfg.layers, cfg.heads), jnp.float32)}

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        rows, layer = check.given("rows", evidence.rows)[:, :, -self.window :], check.given("layer", evidence.layer)
        (b, g, s), h = kv.pos.shape, rows.shape[1]
        if not params or "heads" not in params:
            raise ValueError(
                "compresskv needs params['heads'] [layers, query heads]: from train.compresskv.calibrate_heads, or init_params (not calibrated)"
            )
        table = params["heads"]
        if table.ndim != 2 or table.shape[1] != h or h % g:
            raise ValueError(
                f"compresskv's table of heads is {list(table.shape)} for a layer of {h} query and {g} KV heads; use no Recipe.heads"
            )
        value = select.finite(jnp.asarray(table)[layer])
        best = value >= jnp.sort(value)[-min(self.first_k, h)]
        candidate = (kv.pos >= 0) & ~self.protect.mask(kv.pos, kv.seen)
        each = jnp.where(jnp.repeat(candidate, h // g, 1), jnp.sum(rows.astype(jnp.float32), 2), 0.0)
        each = scores.pool(each, self.pool, self.kind)
        mean = jnp.sum(jnp.where(best[None, :, None], each, 0.0), 1, keepdims=True) / jnp.sum(best).astype(jnp.float32)
        return jnp.broadcast_to(mean, (b, g, s))
