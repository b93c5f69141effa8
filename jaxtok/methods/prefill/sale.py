"""SALE. Source: arXiv:2505.24179; BirdChristopher/SALE (int4_flash_attn, kv_retrieve_calib.py)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.registry import register
from jaxtok.core.sparsifier import Sparsifier, View, best_blocks, for_heads, oldest, reach
from jaxtok.core.types import BlockTable
from jaxtok.ops.block_sparse import block_sparse, low_bit


@register(
    "sale",
    site="sparsify",
    paper="arXiv:2505.24179",
    title="SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
    authors="Xiaodong Ji and Hailin Zhang and Fangcheng Fu and Bin Cui",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SALE(Sparsifier):
    """Read the blocks in which some estimated score is large against the sinks and the local window.

        m_i, Z_i = row maximum and row sum of exact attention to the first block of keys and the local window
        s_ij     = q_i . k_j from codes of `bits` bits (ops.block_sparse.low_bit; the mean query's term is exact)
        r_ij     = exp(s_ij - m_i) / Z_i;   block (x, y) is read  <=>  some visible pair of it has r_ij > tau of its layer and query head

    All keys weigh at least as much as those of the first pass, so with exact s every key that is left out has a softmax weight <= tau.
    tau = 0 reads everything (plain attention); tau = inf only the sinks and the window. The window of query block x ends with it and begins `local` keys
    before it, or up to `segment` - 1 earlier: what lies between it and the first block is whole segments (our reading of the code's rounding).
    Prompts of at most `least` rows are read whole.

    tau: for all heads, unless params["tau"] f32 [l h] says so for each (`init_params` gives `tau`; `jaxtok.train.sale.calibrate`).
    capacity: keys a block of queries reads at most, in whole blocks, the best first; None = all of them. It is what XLA's time follows, since
    XLA goes through a list's static length. What is over it is counted in the table's `lost`. The exact pass over sinks and window is repeated in the
    second: one attention over the union, equal to continuing the first's softmax. Blocks are read in the model's dtype, not in 8 bits.
    The threshold is fixed after the first pass ("two pass" in the code). Biases of merged tokens are not in the estimate, nor is a layer's window:
    a block that straddles its edge may be read for a pair beyond it. What is chosen depends on the prompt's means of queries and keys.
    """

    tau: float = 0.004
    capacity: int | None = None
    local: int = 128
    segment: int = 128
    bits: int = 4
    tile: int = 16
    least: int = 1024
    block_q: int = 64
    block_k: int = 32
    tail: int = 0

    def __post_init__(self):
        for name, low in (("local", 0), ("segment", 1), ("tile", 1), ("least", 0), ("block_q", 1), ("tail", 0)):
            check.count(name, getattr(self, name), low)
        check.count("bits", self.bits, 2, 8)
        check.count("block_k", self.block_k, 1, 512)
        check.at_least("tau", self.tau, 0)
        if self.capacity is not None:
            check.budget("capacity", self.capacity)
            if self.capacity // self.block_k < self.first:
                raise ValueError(
                    f"capacity={self.capacity} has no room for the sinks and the window; give at least {self.first * self.block_k}"
                )

    @property
    def first(self) -> int:
        """Blocks of the first pass, at most."""
        return 2 + -(-(self.local + self.segment + self.block_q) // self.block_k)

    def init_params(self, key: jax.Array, cfg) -> Any:
        """The same threshold for all heads."""
        return {"tau": jnp.full((cfg.layers, cfg.heads), self.tau, jnp.float32)}

    def validate(self, recipe, cfg) -> None:
        super().validate(recipe, cfg)
        if cfg.softcap is not None:
            raise ValueError(f"sale estimates logits without a soft cap; the model has softcap={cfg.softcap}")

    def whole(self, n: int) -> bool:
        return n <= self.least

    def near(self, view: View) -> Bool[Array, "b 1 nq nk"]:
        """The blocks of the first pass."""
        size = self.block_q, self.block_k
        before = (jnp.arange(view.blocks(size[0]), dtype=jnp.int32) * size[0])[None, None, :, None] - self.local - size[1]
        begin = size[1] + before // self.segment * self.segment  # where the window begins; floor division
        end = (jnp.arange(view.blocks(size[1]), dtype=jnp.int32) + 1)[None, None, None] * size[1]
        return reach(view, *size) & ((end > begin) | oldest(view, *size, 1))

    def estimate(self, view: View) -> Float[Array, "b h nq nk"]:
        """log of the largest relative attention score of each block; -inf where no pair is visible."""
        (b, g, n, d), size = view.k.shape, dict[str, Any](block_q=self.block_q, block_k=self.block_k)
        scale = d**-0.5 if view.scale is None else view.scale
        near, pos = self.near(view), jnp.broadcast_to(view.pos[:, None], (b, g, n))
        table = for_heads(best_blocks(jnp.where(near, 0.0, -jnp.inf), near, near, self.first), g)
        see: dict[str, Any] = dict(q_pos=view.pos, k_pos=pos)
        _, lse = block_sparse(view.q, view.k, view.k[..., :1], table, window=view.window, scale=scale, impl=view.impl, **see, **size)
        return low_bit(view.q, view.k, lse=lse, tile=self.tile, bits=self.bits, scale=scale, diagonal=0, impl=view.impl, **see, **size)

    def table(self, params, view: View) -> BlockTable:
        size, heads = (self.block_q, self.block_k), view.sizes[1]
        tau = jnp.full((heads,), self.tau, jnp.float32)
        if params and "tau" in params:
            if params["tau"].ndim != 2 or params["tau"].shape[1] != heads:
                raise ValueError(f"sale's params['tau'] is {list(params['tau'].shape)}; it must be [layers, {heads}]")
            tau = params["tau"][view.layer].astype(jnp.float32)
        score, near, seen = self.estimate(view), self.near(view), reach(view, *size)
        tau = tau[None, :, None, None]
        above = (score > jnp.log(jnp.where(tau > 0, tau, 1.0))) | (tau <= 0)
        most = view.blocks(size[1]) if self.capacity is None else self.capacity // size[1]
        table = best_blocks(score, seen & (above | near), jnp.broadcast_to(near, score.shape), most)
        wanted = jnp.sum(seen & (above | near), -1, dtype=jnp.int32)
        return table._replace(lost=jnp.maximum(wanted - table.count, 0))
