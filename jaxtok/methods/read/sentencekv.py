"""SentenceKV. Source: arXiv:2504.00970; zzbright1998/SentenceKV, models/sentencekv/custom_llama_sentencekv.py."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxtok.core import check, score, select
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reader import Reader, Sight, Traffic, attended
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import segment_sum
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Needs, Protect
from jaxtok.ops.offload import newest, whole
from jaxtok.ops.read import attend_all, attend_slots

CITE: dict[str, Any] = dict(
    paper="arXiv:2504.00970",
    title="SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching",
    authors="Yuxuan Zhu and Ali Falahati and David H. Yang and Mohammad Mohammadi Amiri",
)
DEAD = -2  # in Sentences.segment; -1 is a live token of no sentence
FAR = 1e38  # scores of sentences stay within it


class Sentences(NamedTuple):
    """The sentences of a layer: finished ones by their mean key, and the one being written."""

    segment: jax.Array  # i32 [b g s] sentence of each slot
    mean: jax.Array  # [b g n d] in the keys' dtype
    known: jax.Array  # bool [b g n] sentences that are finished and have a token here
    open: jax.Array  # i32 [b] number of the sentence being written
    length: jax.Array  # i32 [b] its tokens so far
    query: jax.Array  # f32 [b h d] sum of their queries
    key: jax.Array  # f32 [b g d] sum of their keys


def sentencekv(*, ends: tuple[int, ...], budget: int = 1024, factor: float = 3.0, start: int = 32, recent: int = 32, **options) -> Recipe:
    """The paper's two sites: keep factor * budget tokens, read `budget` of them."""
    reader = SentenceKV(ends=ends, budget=budget, start_tokens=start, recent=recent, **options)
    return Recipe(cache=SentenceKVCache(capacity=int(factor * budget)), reader=reader)


@register("sentencekv.cache", site="cache", **CITE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceKVCache(CacheScorer):
    """Keep the last `window` tokens and the keys that they attend to most, for each KV head.

        score_j = max over 7 slots around j of  sum over the last 32 queries i of  mean over the h/g query heads of  A_ij

    capacity = r tau in the paper (3 * 1024), the window counted in it. Official: for each query head on repeated keys.
    """

    capacity: int
    window: int = 32
    group: str = "mean"

    def __post_init__(self):
        check.budget("capacity", self.capacity, self.window)
        check.one_of("group", self.group, tuple(score.REDUCTIONS))

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.window)

    @property
    def protect(self) -> Protect:  # type: ignore[override]
        return Protect(recent=self.window)

    def score(self, params, kv: KV, evidence: Evidence) -> Float[Array, "b g s"]:
        candidate, rows = (kv.pos >= 0) & ~self.protect.mask(kv.pos, kv.seen), check.given("rows", evidence.rows)[:, :, -self.window :]
        return score.window_attention(rows, candidate, kv.k.shape[1], how=self.group, over="sum", width=7, kind="max")


@register("sentencekv.reader", site="reader", **CITE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceKV(Reader):
    """Read whole sentences whose mean key the sentence being written asks for.

        finished sentence s:   mu_s = mean of its keys that the cache holds        open sentence: q = mean of its queries so far
        read = first `start_tokens` | last `recent` | the others in the order of their sentence's q . mu_s (group mean), each sentence
               from its first token on, until `budget` tokens are read; the last sentence is cut short

    While the open sentence has at most `threshold` tokens, and at the token that closes one, everything is attended to. A token in
    `ends` closes a sentence; the prompt's last one ends with the prompt, a reply's goes on in the next turn. `decode.prefill` and the
    loops tell the reader what closes one; by hand it takes `decoder.embed(ends=recipe.ends)` and `decoder.step(ids=)`. `sentences` caps how
    many mean keys are held; tokens of later ones, and of none, come last. A step that is whole for one sequence takes its time for all.
    `offload`, as in the paper: the prompt's keys and values stand in host memory; sparse steps fetch what they read of it, whole ones all.

    variant="paper": the open sentence's tokens come before all others, so nothing is out of reach, and a budget that covers the cache
    is full attention. "official": the slot right after the first tokens, and tokens of the open or of no sentence that are not among
    the last, are never read in sparse steps. The official code ranks for each query head on repeated keys.
    """

    ends: tuple[int, ...] = ()
    budget: int = 1024
    start_tokens: int = 32
    recent: int = 32
    threshold: int = 1
    sentences: int = 1024
    variant: str = "paper"
    group: str = "mean"
    offload: bool = False
    attends, hosted = True, ("k", "v")

    def __post_init__(self):
        for name in ("start_tokens", "recent", "threshold", "sentences"):
            check.at_least(name, getattr(self, name), int(name in ("recent", "sentences")))
        check.budget("budget", self.budget, self.start_tokens + self.recent)
        check.one_of("variant", self.variant, ("paper", "official"))
        check.one_of("group", self.group, tuple(score.REDUCTIONS))
        if not self.ends:
            raise ValueError("ends=() closes no sentence; give the token ids that do, those of . ? ! and a line break, say")

    @property
    def needs(self) -> Needs:
        return Needs(segment=True)

    def start(self, params, layer: int, kv: KV, h: int) -> Any:
        (b, g, s, d), n = kv.k.shape, self.sentences
        if self.variant == "paper" and s <= self.budget:
            return ()
        segment = jnp.where(kv.pos >= 0, jnp.full_like(kv.pos, -1) if kv.segment is None else kv.segment, DEAD)
        zero, none = jnp.zeros((b,), jnp.int32), jnp.zeros((b, g, n), bool)
        state = Sentences(segment, jnp.zeros((b, g, n, d), kv.k.dtype), none, zero, zero, jnp.zeros((b, h, d)), jnp.zeros((b, g, d)))
        return self._means(state._replace(open=jnp.maximum(jnp.max(segment, (1, 2)) + 1, 0)), kv)

    def segments(self, state) -> tuple[Int[Array, "b g s"], Int[Array, " b"]] | None:
        return (jnp.maximum(state.segment, -1), state.open) if isinstance(state, Sentences) else None

    def _means(self, state: Sentences, kv: KV) -> Sentences:
        """Mean keys of all finished sentences, afresh."""
        done = (state.segment >= 0) & (state.segment < jnp.minimum(state.open, self.sentences)[:, None, None])
        to, keys = jnp.where(done, state.segment, -1), jnp.where(done[..., None], whole(kv.k), 0)
        size, total = (segment_sum(x, to, self.sentences) for x in (done, keys))
        return state._replace(mean=(total / jnp.maximum(size, 1)[..., None]).astype(kv.k.dtype), known=size > 0)

    def attend(
        self, params, layer: int, state, carry, q: Float[Array, "b h t d"], pos: Int[Array, "b t"], kv: KV, see: Sight
    ) -> tuple[Any, Any, Array, Array]:
        check.reading(q, pos, kv)
        if not isinstance(state, Sentences):
            return state, carry, *attend_all(q, pos, kv, see)
        live, t = pos >= 0, q.shape[2]
        closes = live & (False if see.ids is None else jnp.isin(see.ids, jnp.asarray(self.ends, jnp.int32)))
        number, at = state.open[:, None] + jnp.cumsum(closes, 1, dtype=jnp.int32) - closes.astype(jnp.int32), jnp.maximum(kv.cursor - t, 0)
        rows = jnp.broadcast_to(jnp.where(live, number, DEAD)[:, None], (*kv.pos.shape[:2], t))
        state = state._replace(segment=lax.dynamic_update_slice_in_dim(state.segment, rows, at, 2))
        if t > 1:  # what a chunk of a prompt leaves open goes on in the next; queries are counted from the first step on
            state = self._means(state._replace(open=state.open + jnp.sum(closes, 1, dtype=jnp.int32)), kv)
            return state, carry, *attend_all(q, pos, kv, see)
        state = self._extend(state, q[:, :, 0], newest(kv.k, at), live[:, 0], closes[:, 0])
        every, slots = state.length <= self.threshold, self.choose(state, kv.cursor)
        named = lambda: kv._replace(pos=jnp.where(every[:, None, None] | select.mark(slots, kv.pos.shape[-1]), kv.pos, -1))
        full, some = lambda: attend_all(q, pos, named(), see), lambda: attend_slots(q, pos, kv, slots, see)
        return state, carry, *lax.cond(jnp.any(every & live[:, 0]), full, some)

    def _extend(self, state: Sentences, q: Float[Array, "b h d"], k: Float[Array, "b g d"], live, closes) -> Sentences:
        """One more token of the open sentence; where it closes it, the mean key is known and the next one is open."""
        wide = lambda x: x[:, None, None]
        query = state.query + jnp.where(wide(live), q.astype(jnp.float32), 0.0)
        key = state.key + jnp.where(wide(live), k.astype(jnp.float32), 0.0)
        length = state.length + live.astype(jnp.int32)
        row, to = jnp.arange(live.shape[0]), jnp.where(closes, state.open, self.sentences)
        mean = (key / wide(jnp.maximum(length, 1)).astype(jnp.float32)).astype(state.mean.dtype)
        return state._replace(
            mean=state.mean.at[row, :, to].set(mean, mode="drop"),
            known=state.known.at[row, :, to].set(True, mode="drop"),
            open=state.open + closes.astype(jnp.int32),
            length=jnp.where(closes, 0, length),
            query=jnp.where(wide(closes), 0.0, query),
            key=jnp.where(wide(closes), 0.0, key),
        )

    def choose(self, state: Sentences, cursor: Int[Array, ""]) -> Int[Array, "b g m"]:
        """The slots of a sparse step, ascending; -1 = unused."""
        (b, g, s), n, mine = state.segment.shape, self.sentences, state.segment
        query = (state.query / jnp.maximum(state.length, 1).astype(jnp.float32)[:, None, None]).reshape(b, g, -1, state.query.shape[-1])
        like = score.REDUCTIONS[self.group](jnp.einsum("bgqd,bgnd->bgqn", query, state.mean.astype(jnp.float32)), axis=2)
        like = jnp.where(state.known, jnp.clip(select.finite(like), -FAR, FAR), -2 * FAR)
        first = jnp.where((mine < 0) | (mine >= n), -2 * FAR, jnp.take_along_axis(like, jnp.clip(mine, 0, n - 1), -1))
        first = jnp.where(mine == state.open[:, None, None], 2 * FAR, first)
        count = jnp.sum(mine > DEAD, -1, keepdims=True, dtype=jnp.int32)
        place = jnp.arange(s, dtype=jnp.int32)[None, None] - (cursor - count)  # live slots are the last ones before the cursor
        edge, gone = (place < self.start_tokens) | (place >= count - self.recent), mine == DEAD
        if self.variant == "official":
            gone = gone | (~edge & ((first == 2 * FAR) | (first == -2 * FAR) | (place == self.start_tokens)))
        best, slots = lax.top_k(jnp.where(gone, -jnp.inf, jnp.where(edge, 3 * FAR, first)), min(self.budget, s))
        return jnp.sort(jnp.where(best > -jnp.inf, slots, -1), -1)

    def traffic(self, layer: int, h: int, kv: KV, hit: bool = False) -> Traffic:
        """A sparse step (`hit`) reads the mean keys, and ranks slots by the score of their sentence: 32 bytes each; others read all."""
        b, g, s, d = kv.k.shape
        if not hit or (self.variant == "paper" and s <= self.budget):
            return Traffic(0, attended(kv, h))
        return Traffic(b * self.sentences * (g * d * kv.k.dtype.itemsize + 24 * h) + 32 * b * g * s, attended(kv, h, self.budget))
