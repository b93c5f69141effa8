"""AIM: merging before the decoder, pruning between its layers. Source: arXiv:2412.03248; LaVi-Lab/AIM (llava/model/token_merge.py, qwen2/modeling_qwen2.py), Apache-2.0: written
from the formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxtok.core import budget, check
from jaxtok.core.compose import compose
from jaxtok.core.matching import bipartite, cosine, merge_plan, packed_order, scatter
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import apply, gather
from jaxtok.core.registry import register
from jaxtok.core.selector import Selector, pictured
from jaxtok.core.stages import StagedPruner, schedule
from jaxtok.core.types import Evidence, Needs, Plan, Rank, Tokens


@register(
    "aim.select",
    site="select",
    paper="arXiv:2412.03248",
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    authors="Yiwu Zhong and Zhuoming Liu and Yin Li and Liwei Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AIMSelect(Selector):
    """Merge image rows that are alike before the language model, in rounds of a bipartite matching on the rows themselves.

        a round: even rows A, odd rows B, S_ij = cos(x_i, x_j); the r rows of A most like their best partner join it
        x'_j = (x_j + sum of those that joined) / (1 + their number): a plain mean, whatever they stand for

    Rounds remove half of the rows, the last one what is left to remove: 25% of 196 rows takes 98, then 49. Output of a round: what stays
    of A by falling similarity, then B in order (the place in the image is lost). A sequence is an image or one frame of a video, pooled
    before as the model does; other rows (kind SPECIAL) stay in front. capacity = all rows: the identity. Ties: the older row.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.crops != 1:
            raise ValueError(f"AIM merges one image or frame a sequence, got crops={self.crops}")

    def _round(self, x, free, fixed, remove, most: int) -> Plan:
        """All rows in, all rows out, the live ones last."""
        b, n = free.shape
        order = packed_order(free)
        take = lambda a: jnp.take_along_axis(a, order, 1)
        here = take(free)
        y = jnp.take_along_axis(x, order[..., None], 1)
        partner, best = bipartite(cosine(y[:, ::2], y[:, 1::2]), here[:, ::2], here[:, 1::2], remove, most)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        falling = jnp.argsort(jnp.argsort(-best, axis=-1, stable=True), axis=-1).astype(jnp.int32)
        place = jnp.broadcast_to(2 * n + row, (b, n)).at[:, ::2].set(n + falling)
        goes = jnp.zeros((b, n), jnp.int32).at[:, ::2].set(partner + 1) - 1
        into = jnp.where(goes >= 0, 2 * goes + 1, row)
        rank = scatter(order, jnp.where(here & (goes < 0), place, -1))
        into = scatter(order, jnp.where(here, jnp.take_along_axis(order, into, 1), -1))
        as_is = fixed | (free & (remove == 0)[:, None])
        rank, into = jnp.where(as_is, row, rank), jnp.where(as_is, row, into)
        return merge_plan(rank, into, jnp.ones((b, n), jnp.float32), n)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, Plan]:
        free = pictured(tokens)
        fixed = (tokens.pos >= 0) & ~free
        b, n = free.shape
        room = jnp.maximum(self.room(tokens, keep), 1)
        x = jax.lax.stop_gradient(tokens.x)
        rows = self.count(n, n)
        rounds = max(math.ceil(math.log2(n)), 1) if keep is not None else max(math.ceil(math.log2(max(n / self.capacity, 1))), 1)
        whole = None
        for _ in range(rounds):
            many = jnp.sum(free, -1, dtype=jnp.int32)
            plan = self._round(x, free, fixed, jnp.clip(many - room, 0, many // 2), n // 2)
            x = apply(plan, x)
            free, fixed = (gather(a, plan.index) for a in (free, fixed))
            whole = plan if whole is None else compose(whole, plan)
        assert isinstance(whole, Plan)
        last = Plan(whole.index[:, n - rows :], jnp.maximum(whole.assign - (n - rows), -1), whole.weight, whole.lost)
        return state, last._replace(lost=jnp.sum(whole.index[:, : n - rows] >= 0, -1, dtype=jnp.int32))


@register(
    "aim.layers",
    site="layers",
    paper="arXiv:2412.03248",
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    authors="Yiwu Zhong and Zhuoming Liu and Yin Li and Liwei Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AIMLayers(StagedPruner):
    """Keep the image rows of highest PageRank in the attention of the layer before.

        M = softmax(logits / tau) of each head (causal);   rank = uniform over the rows, then `rounds` times  rank_j = sum_i rank_i M_ij
        score_j = sqrt(mean over heads of rank_j^2)

    No damping, so what is seen from far behind the most gathers the rank: the first rows. M is not built (ops.evidence.ranked). Rows keep
    their rotary ids; decoding reads in each layer the rows that were there. The official code drops rows by masks only: a dropped row goes
    on asking (it counts in the first round), and saves nothing; here it is gone. M = I keeps the ranks uniform. Ties: the older row.
    The paper's schedule: `aim`.
    """

    tau: float = 0.1
    rounds: int = 5

    def __post_init__(self):
        super().__post_init__()
        check.between("tau", self.tau, 1e-6, 1e6)
        check.count("rounds", self.rounds, 0, 1000)

    @property
    def needs(self) -> Needs:
        return Needs() if self.passive else Needs(ranked=Rank(self.tau, self.rounds))

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        rank = check.given("ranked", evidence.ranked).astype(jnp.float32)
        return jnp.sqrt(jnp.mean(jnp.square(rank), 1))


def aim(
    rows: int = 196, pictures: int = 1, *, ratio: float = 0.25, first: int = 14, last: int = 22, special: int = 0, layers: int = 28
) -> Recipe:
    """The paper's recipe: `ratio` of the `rows` of each of `pictures` images or frames are left by merging; after 0-based layer
    l >= first the share max(0, 1 - (l - first + 1) / (last - first)) of these, rounded down, so that none is left before layer `last`.

    special: rows of kind SPECIAL that an image has at most (a class row: 1). layers: the decoder's.
    """
    check.count("first", first, 0)
    check.count("last", last, first + 1, layers - 1)
    check.count("pictures", pictures)
    left = budget.capacity(ratio, rows)
    images, steps = left * pictures, last - first
    stages = tuple((first + j, images * (steps - j) // steps) for j in range(1, steps + 1))
    stages = tuple(s for j, s in enumerate(stages) if not j or stages[j - 1][1])  # nothing goes where nothing is left
    method = AIMLayers(capacity=0, images=images, stages=stages)
    return Recipe(select=AIMSelect(capacity=left, special=special), layers=schedule(method))
