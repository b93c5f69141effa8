"""Token-level correlation-guided compression. Source: arXiv:2407.14439, a summary of it (the repository holds no code): our reading."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import cosine
from jaxtok.core.registry import register
from jaxtok.core.select import choose_groups
from jaxtok.core.selector import Selector
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "tokencorr",
    site="select",
    paper="arXiv:2407.14439",
    title="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
    authors="Renshan Zhang and Yibo Lyu and Rui Shao and Gongwei Chen and Weili Guan and Liqiang Nie",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCorr(Selector):
    """Let each crop keep as many rows as it has different ones, sampled by what the class row attends to.

        S_ij = cosine of the keys (heads side by side) of the deep layer;  row j repeats where an earlier row i of its crop has S_ij > threshold
        density d_p = 1 - repeating rows / N_p;   k_p = d_p N_p
        sampled without replacement: k_p rows of crop p with p_j ~ (A^local[CLS, j] + A^global[CLS, j]) / 2, means over heads

    The thumbnail (crop 0 of several) is kept whole. Equal rows: density 1 / N; orthogonal ones: 1. Where the k_p leave more than fits, they
    shrink in proportion (floor). Our reading: which rows count as repeating (the paper: those with many like them), that the two layers
    are averaged, `threshold` and the shallow one of `layers` = (local, global) (0-based, negative from the last that ran) were not seen.
    sample=False: the most attended rows. Sampling: the top of log p + Gumbel noise from the call's key, or key 0 where it has none;
    every sequence of a batch has the same noise. Raster order, repacked.
    """

    threshold: float = 0.9
    layers: tuple[int, int] = (8, -1)
    sample: bool = True

    def __post_init__(self):
        super().__post_init__()
        check.between("threshold", self.threshold, -1, 1)
        check.kind("sample", self.sample, bool)
        check.kind("layers", self.layers, tuple)
        if len(self.layers) != 2:
            raise ValueError(f"layers={self.layers} must be (local, global)")
        for i in self.layers:
            check.count("layers", i, -(2**31))

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, keys=True, layers=self.layers)

    def score(self, params, tokens: Tokens, evidence: Evidence):
        p = jnp.mean(jnp.mean(check.given("cls", evidence.cls).astype(jnp.float32), 2), 0)
        if not self.sample:
            return p
        key = jax.random.key(0) if evidence.key is None else evidence.key[0]
        noise = jax.random.gumbel(key, tokens.pos.shape[1:])
        return jnp.log(jnp.maximum(p, 1e-30)) + noise[None]

    def different(self, keys, free, group):
        """i32 [b crops], twice: rows of each crop that repeat no earlier one, and all of them."""
        b, n = free.shape
        metric = jnp.swapaxes(keys, 1, 2).reshape(b, n, -1)
        earlier = jnp.tril(jnp.ones((n, n), bool), -1)[None] & free[:, None] & (group[:, :, None] == group[:, None])
        repeats = jnp.any(earlier & (cosine(metric, metric) > self.threshold), -1)
        own = group[..., None] == jnp.arange(self.crops)[None, None]
        return jnp.sum(own & (free & ~repeats)[..., None], 1, dtype=jnp.int32), jnp.sum(own & free[..., None], 1, dtype=jnp.int32)

    def stay(self, params, tokens: Tokens, evidence: Evidence, free, room):
        group = self.group(tokens)
        k, size = self.different(jax.lax.stop_gradient(check.given("keys", evidence.keys)[1]), free, group)
        if self.crops > 1:
            k = k.at[:, 0].set(jnp.minimum(size[:, 0], room))
            left, k, first = room - k[:, 0], k[:, 1:], k[:, :1]
        else:
            left, first = room, k[:, :0]
        total = jnp.sum(k, -1)
        share = left.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
        less = jnp.floor(k.astype(jnp.float32) * share[:, None] + 1e-4).astype(jnp.int32)
        k = jnp.concatenate([first, jnp.where((total > left)[:, None], less, k)], 1)
        return choose_groups(jax.lax.stop_gradient(self.score(params, tokens, evidence)), group, free, k)
