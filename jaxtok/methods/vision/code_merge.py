"""Token merging for models of code. Source: arXiv:2507.14423 (no code published): our re-implementation from the paper's description."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import merge_plan
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.types import SPECIAL, Evidence, Needs, Plan, Tokens


@register(
    "code_merge",
    site="vit",
    paper="arXiv:2507.14423",
    title="On the Effect of Token Merging on Pre-trained Models for Code",
    authors="Mootez Saad and Hao Li and Tushar Sharma and Ahmed E. Hassan",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeMerge(Reducer):
    """Merge the sub-tokens of a lexical unit (an identifier, a literal) into one row, before a layer (0 = at the input).

        unit = a run of neighbouring rows of one `segment` >= 0, which a lexer gives on the host; other rows stand alone
        x' = sum_i a_i x_i over the unit's rows;   a_i = 1 / their number ("mean"), or softmax over the unit of w . x_i ("learned")

    SPECIAL rows stand alone. A unit takes the place of its first row; `positions`: "repack" (the paper: units are counted anew).
    `capacity`: static number of rows for the units; None = as many as there are rows (nothing is saved, every unit fits). Units that find
    no room go, the first of a sequence first, and are counted in `lost`: choose the capacity as a bucket that fits. A traced `keep` below
    the number of units drops units in the same way.

    The learned scorer starts at w = 0, which is the mean (what it is made of is our reading: the paper's text says softmax weights of a small scorer).
    Units of one row each change nothing. `reduce.gather(y, tokens.source)` gives every sub-token its unit's row.
    """

    floor: ClassVar[bool] = True  # units are not cut to a budget

    capacity: int | None = None
    weights: str = "mean"
    positions: str = "repack"

    def __post_init__(self):
        if self.capacity is not None:
            check.count("capacity", self.capacity)
        check.one_of("weights", self.weights, ("mean", "learned"))
        check.one_of("positions", self.positions, ("keep", "repack", "keep_mrope"))

    @property
    def needs(self) -> Needs:
        return Needs()

    def init_params(self, key, cfg):
        return {"score": jnp.zeros((cfg.width,), jnp.float32)} if self.weights == "learned" else {}

    def count(self, n: int, n_kind: int) -> int:
        return n if self.capacity is None else min(n, self.capacity)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        b, n = tokens.pos.shape
        live = tokens.pos >= 0
        row = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (b, n))
        unit = jnp.where(live & (tokens.kind != SPECIAL), tokens.segment, -1)
        opens = live & ((unit < 0) | (unit != jnp.roll(unit, 1, 1)) | (row == 0))
        first = jax.lax.cummax(jnp.where(opens, row, -1), axis=1)  # the row that opens this row's unit
        weight = live.astype(jnp.float32)
        if self.weights == "learned":
            score = jnp.einsum("bnc,c->bn", tokens.x.astype(jnp.float32), params["score"].astype(jnp.float32))
            score = jnp.where(live, score, 0.0)
            safe = jnp.maximum(first, 0)
            top = jax.vmap(lambda s, i: jnp.full((n,), -jnp.inf).at[i].max(s))(jnp.where(live, score, -jnp.inf), safe)
            weight = jnp.where(live, jnp.exp(score - jax.lax.stop_gradient(jnp.take_along_axis(jnp.where(live, top, 0.0), safe, 1))), 0.0)
        rank = jnp.where(opens, row, -1)
        if keep is not None:
            number = jnp.cumsum(opens[:, ::-1].astype(jnp.int32), 1)[:, ::-1]
            rank = jnp.where(number <= keep[:, None], rank, -1)
        return state, merge_plan(rank, jnp.where(live, first, -1), weight, self.count(n, n))
