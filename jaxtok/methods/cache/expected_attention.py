"""Expected attention. Source: arXiv:2510.00636; NVIDIA/kvpress ExpectedAttentionPress (the authors' code)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.core import check, select
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.score import grouped
from jaxtok.core.types import KV, Evidence, Needs, Protect


@register(
    "expected_attention",
    site="cache",
    paper="arXiv:2510.00636",
    title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    authors="Alessio Devoto and Maximilian Jeblick and Simon Jégou",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(CacheScorer):
    """Keep the keys that future queries can be expected to attend to, were they Gaussian like the past ones.

        z_j = m . k_j / sqrt(d) + k_j' C k_j / (2 d),     m = R mu,  C = R Sigma R'
        score_j = (mean over the h/g query heads of softmax_j z_j + epsilon) * |v_j|_2,    j live and not a sink

    mu, Sigma: moments of each head's queries before the rotary embedding, from order `sinks` on. R: the mean of the rotation matrices of
    the next `future` rotary ids (kv.seen + kv.delta and on): z_j is log E[exp(q . k_j / sqrt(d))] for q ~ N(m, C), the paper's stand-in
    for queries at those ids. The first `sinks` tokens are kept. A slot that stands for several
    tokens counts as many times (log count added to z). `covariance=False`: Sigma = 0, the attention of the mean query; `vnorm=False`:
    no factor |v|. kvpress sets epsilon to 0, and to 0.02 under AdaKV.

    Moments are those of the queries themselves, after query norms (Qwen3, Gemma3) and with biases, as in kvpress 0.5.5, whose kept tokens
    these are. `scale` stands for 1/sqrt(d) where a model has another; soft-capping and sliding windows are not modelled.
    """

    reads_rotated: ClassVar[bool] = True
    capacity: int
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    vnorm: bool = True
    epsilon: float = 0.0
    scale: float | None = None

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.count("future", self.future, 1)
        check.at_least("epsilon", self.epsilon, 0)
        check.budget("capacity", self.capacity, self.sinks)

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.sinks)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(sinks=self.sinks)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        mean, cov = check.given("queries", evidence.queries)
        _, g, _, d = kv.k.shape
        scale = d**-0.5 if self.scale is None else self.scale
        if evidence.freqs is not None:
            turn = mean_rotation(kv.seen + kv.delta, evidence.freqs, self.future, d)
            mean = jnp.einsum("bij,bhj->bhi", turn, mean)
            cov = jnp.einsum("bij,bhjk,blk->bhil", turn, cov, turn)
        scored = ((kv.pos >= 0) & ~self.protect.mask(kv.pos, kv.seen))[:, :, None]
        k = jnp.where(scored[:, :, 0, :, None], kv.k.astype(jnp.float32), 0.0)
        z = scale * jnp.einsum("bgqd,bgsd->bgqs", grouped(mean, g), k)
        if self.covariance:
            spread = jnp.einsum("bgqde,bgse->bgqsd", grouped(cov, g), k)
            z = z + scale**2 / 2 * jnp.einsum("bgqsd,bgsd->bgqs", spread, k)
        share = jax.nn.softmax(jnp.where(scored, z + kv.bias[:, :, None], select.NEG), -1)
        share = jnp.mean(share, 2)
        if not self.vnorm:
            return share
        v = kv.v.astype(jnp.float32)
        return (share + self.epsilon) * jnp.sqrt(jnp.sum(v * v, -1))


def mean_rotation(first: Int[Array, " b"], freqs: Float[Array, " r"], count: int, d: int) -> Float[Array, "b d d"]:
    """The mean of the rotary matrices of the ids first, ..., first + count - 1 (half-split; channels from 2r on stay)."""
    r = freqs.shape[0]
    ids = (first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]).astype(jnp.float32)
    angle = ids[..., None] * freqs[None, None]
    cos, sin = jnp.mean(jnp.cos(angle), 1), jnp.mean(jnp.sin(angle), 1)
    i = jnp.arange(r)
    out = jnp.broadcast_to(jnp.eye(d, dtype=jnp.float32)[None], (first.shape[0], d, d))
    out = out.at[:, i, i].set(cos).at[:, i + r, i + r].set(cos)
    return out.at[:, i, i + r].set(-sin).at[:, i + r, i].set(sin)
