"""MCTF, multi-criteria token fusion. Source: arXiv:2403.10030; mlvlab/MCTF (utils/mctf.py, models/), MIT."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import bipartite, by_falling, cosine, merge_plan, movable, packed_order, removal, scatter
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import identity
from jaxtok.core.types import Evidence, Needs, Plan, Tokens

WHEN = {"ahead": "ahead", "recompute": "block", "behind": "block"}
POOLING = ("attention", "size", "mean")


@register(
    "mctf",
    site="vit",
    paper="arXiv:2403.10030",
    title="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    authors="Sanghyeok Lee and Joonmyung Choi and Hyunwoo J. Kim",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MCTF(Reducer):
    """Fuse rows that are alike, uninformative and small, ahead of a layer's attention.

        W_ij = W_sim W_info W_size,  i among the even rows A, j among the odd rows B, x the rows that enter the layer
        W_sim = ((cos(x_i, x_j) + 1) / 2)^(1 / tau_sim)
        W_info = (b_i b_j)^(1 / tau_info),  b_i = (1 / a_i) / max(1 / a),  a_i = the layer's attention to i, mean over heads and queries
        W_size = (z_i z_j)^(1 / tau_size),  z_i = (1 / s_i) / max(1 / s),  s the sizes
        r // 2 rows of A (all r without `both`) with the largest max_j W_ij join B; then as many of B as are missing, with the largest
        W to an A that stayed, join that (rows that joined them go along)
        x' = sum w x / sum w,  w_i = a_i s_i ("attention"), s_i ("size"), 1 ("mean")

    A tau of 0 turns its factor off. `when`: "ahead" (the paper: the layer's attention matrix of the rows before is fused too, columns
    summed, rows averaged by w, and used in place of the layer's own), "recompute" (fused on the layer's matrix, which is then computed
    afresh), "behind" (fused on the matrix of the layer before: behind its block). At least `least` rows stay, and half of those that are
    not SPECIAL (`special` of them, static; they neither go nor are joined: the official code protects rows 0 and 2 where there are two,
    which is a mistake). Max pooling of the official code is no weighted mean and not offered. Output: A in order (special=0: by falling score), then B, with `both` by falling score.

    remove=0 changes nothing; tau_info = tau_size = 0, both=False, pooling="size" is ToMe on hidden rows. `keep` [b]: live rows to leave.
    """

    conserves = True

    remove: int
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    both: bool = True
    pooling: str = "attention"
    when: str = "ahead"
    least: int = 10
    special: int = 1

    def __post_init__(self):
        check.count("remove", self.remove, 0)
        check.count("least", self.least, 0)
        check.count("special", self.special, 0)
        check.one_of("when", self.when, tuple(WHEN))
        check.one_of("pooling", self.pooling, POOLING)
        for name in ("tau_sim", "tau_info", "tau_size"):
            check.at_least(name, getattr(self, name), 0)

    @property
    def at(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return WHEN[self.when]

    @property
    def needs(self) -> Needs:
        return Needs(probs=True, own=self.when == "recompute")

    def count(self, n: int, n_kind: int) -> int:
        return n - max(min(self.remove, max(n - self.special, 0) // 2, n - self.least), 0)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        room, live = self.count(n, n), tokens.pos >= 0
        if room == n and keep is None:
            return state, identity(tokens.pos.shape)
        order = packed_order(live)
        take = lambda a: jnp.take_along_axis(a, order, 1)
        here, free = take(live), take(movable(tokens))
        alive = jnp.sum(here, -1, keepdims=True, dtype=jnp.int32)
        spare = jnp.minimum(jnp.sum(free, -1, dtype=jnp.int32) // 2, jnp.maximum(alive[:, 0] - self.least, 0))
        r = removal(live, keep, n - room, room, spare)
        probs = check.given("probs", evidence.probs).astype(jnp.float32)
        got = jnp.sum(jnp.mean(probs, 1), 1) / jnp.maximum(alive, 1).astype(jnp.float32)
        top = lambda a: jnp.maximum(jnp.max(jnp.where(live, a, 0.0), -1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        got = jnp.where(live, jnp.maximum(got / top(got), 1e-30), 1.0)  # only ratios matter
        size = jnp.where(live & (tokens.size > 0), tokens.size, 1.0)
        score = self._scores(tokens.x, got, size, live, order)
        first = r // 2 if self.both else r
        one, best = bipartite(score, free[:, ::2], free[:, 1::2], first, n // 2)
        stays = free[:, ::2] & (one < 0)
        two, second = bipartite(jnp.swapaxes(score, 1, 2), free[:, 1::2], stays, r - first, n // 2)
        row = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], here.shape)
        into = row.at[:, ::2].set(jnp.where(one >= 0, 2 * one + 1, row[:, ::2])).at[:, 1::2].set(jnp.where(two >= 0, 2 * two, row[:, 1::2]))
        rank = jnp.where(row % 2 == 0, row, n + row)
        if self.both:
            rank = rank.at[:, 1::2].set(n + by_falling(second, free[:, 1::2]))
        if not self.special:
            rank = rank.at[:, ::2].set(by_falling(best, free[:, ::2]))
        rank = jnp.where(here & (into == row), rank, -1)
        into = jnp.take_along_axis(into, into, 1)  # a row that joined B goes where that B goes
        into = jnp.where(here, jnp.take_along_axis(order, into, 1), -1)
        weight = {"attention": got * (size / top(size)), "size": size, "mean": jnp.ones_like(size)}[self.pooling]
        return state, merge_plan(scatter(order, rank), scatter(order, into), jnp.where(live, weight, 0.0), room)

    def _scores(self, x, got, size, live, order):
        def pairs(a):  # a product over both sides, of what is small for the largest
            a = jnp.take_along_axis(jnp.where(live, 1.0 / a, 0.0), order, 1)
            a = a / jnp.maximum(jnp.max(a, -1, keepdims=True), jnp.finfo(jnp.float32).tiny)
            return a[:, ::2, None] * a[:, None, 1::2]

        x = jnp.take_along_axis(x, order[..., None], 1)
        score = jnp.ones((1, 1, 1), jnp.float32)
        if self.tau_sim:
            score = jnp.maximum((cosine(x[:, ::2], x[:, 1::2]) + 1.0) / 2.0, 0.0) ** (1.0 / self.tau_sim)
        if self.tau_info:
            score = score * pairs(got) ** (1.0 / self.tau_info)
        if self.tau_size:
            score = score * pairs(size) ** (1.0 / self.tau_size)
        return jnp.broadcast_to(score, (x.shape[0], -(-x.shape[1] // 2), x.shape[1] // 2))


def schedule(remove: int | Sequence[int], layers: int, fast: bool = False, special: int = 1) -> tuple[tuple[int, MCTF], ...]:
    """The entries of Recipe.vit: `remove` rows in each of the layers 1 to layers - 1 (`fast`: in layers 3, 6, 9), or one number each."""
    where = [i for i in (3, 6, 9) if i < layers] if fast else list(range(1, layers))
    each = [remove] * len(where) if isinstance(remove, int) else list(remove)
    if len(each) != len(where):
        raise ValueError(f"{len(each)} numbers of rows for the layers {where}; give one each")
    return tuple((i, MCTF(remove=r, special=special)) for i, r in zip(where, each, strict=True) if r)
