"""InfiniRetri: any length through one window. Source: arXiv:2502.12962; PyPI infini-retri 0.0.3 (thoughts.py, retrieval.py, chunks.py)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, select
from jaxtok.core.protocols import PromptMethod
from jaxtok.core.reduce import gather, segment_sum
from jaxtok.core.registry import register
from jaxtok.core.types import Plan


class Retained(NamedTuple):
    """What is left of the text read so far; rows packed, dead first."""

    ids: jax.Array  # i32 [b m]
    order: jax.Array  # i32 [b m] place in the whole text; -1 = dead
    sentence: jax.Array  # i32 [b m] number in the whole text; -1 = dead
    weight: jax.Array  # f32 [b q] of the question's rows, from the first chunk
    read: jax.Array  # i32 [b] tokens of the text read so far
    closed: jax.Array  # i32 [b] sentences that have ended in them
    lost: jax.Array  # i32 [b] tokens of chosen sentences that found no room


@register(
    "infiniretri",
    site="prompt",
    paper="arXiv:2502.12962",
    title="Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing",
    authors="Xiaoju Ye and Zhichun Wang and Jingyuan Wang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniRetri(PromptMethod):
    """Read a text of any length chunk by chunk and take along the sentences that the question looks at; answer from these.

        s_j = sum over |i - j| within a box of `width` of  sum over question rows r of  w_r^2 * sum over heads of A_ri

    A: attention of the question's tokens in layer `sees` (the paper's: the last) over (what was retained, the next chunk, the question),
    softmax over all of it. A small model may look its facts up before its last layer, and layers behind `sees` do not run.
    The box covers j - width // 2 to j + (width - 1) // 2, zeros beyond the context. Of the context's tokens the `topk` of largest s are
    selected, every sentence with a selected token is retained whole, and the next chunk comes. No keys or values survive, only token ids;
    the model gets the retained ones and the question, with positions from 0.

    Tokens: the last `question` tokens of a prompt are the question (officially the last 512 characters where there is none); an id of
    `ends` closes a sentence (() = each chunk is one). A chunk is the text's next `chunk` tokens up to the last sentence end among them,
    all of them where there is none. `capacity` counts retained tokens and the question, so the window is capacity + chunk.
    w_r: attention of question row r to the question itself in the first chunk, summed over heads; `weigh=False`: 1.

    Static sizes ask for a rule that the original, which is unbounded, lacks: chosen sentences stay in the order of their best token's
    score as long as all of them fit (ties: the older); the first that does not, and the worse ones, go and are counted in `lost`. The very
    best, if it alone is too long, is cut to its best tokens. A text that fits is kept as it is.

    topk >= context drops nothing but for the capacity; width=1, weigh=False is the plain column sum. variant="official": with weigh=False
    the first chunk is weighted all the same. Departures: no prompt template around context and question (put it into the ids), methods 1
    and 2 of the package, which crash as shipped, are left out.
    """

    capacity: int
    question: int = 32
    chunk: int = 1024
    topk: int = 300
    width: int = 8
    weigh: bool = True
    ends: tuple[int, ...] = ()
    sees: int = -1
    variant: str = "paper"

    def __post_init__(self):
        for name in ("question", "chunk", "topk", "width"):
            check.count(name, getattr(self, name))
        check.kind("ends", self.ends, tuple)
        check.kind("sees", self.sees, int)
        for end in self.ends:
            check.count("ends", end, 0)
        check.one_of("weigh", self.weigh, (True, False))
        check.one_of("variant", self.variant, ("paper", "official"))
        check.budget("capacity", self.capacity, self.question + 1)

    @property
    def room(self) -> int:
        """Static number of tokens that are retained beside the question."""
        return self.capacity - self.question

    def scores(self, rows: Float[Array, "b h q n"], weight: Float[Array, "b q"]) -> Float[Array, "b n"]:
        """s of each context token from the question's attention; 0 in the columns of dead tokens."""
        column = jnp.einsum("bhqn,bq->bn", rows.astype(jnp.float32), weight * weight)
        half = self.width // 2, (self.width - 1) // 2
        return lax.reduce_window(column, 0.0, lax.add, (1, self.width), (1, 1), ((0, 0), half))

    def plan(self, score: Float[Array, "b n"], sentence: Int[Array, "b n"], keep=None, whole: Bool[Array, " b"] | None = None) -> Plan:
        """The plan [b min(room, n)] that retains sentences (numbered, ascending; -1 = dead) and counts what finds no room.

        `keep` i32 [b]: traced room. `whole`: rows of which all is chosen.
        """
        b, n = score.shape
        live, score, cap = sentence >= 0, select.finite(score), min(self.room, n)
        room = budget.per_head(keep, (b, 1), cap)[:, 0]
        picked = select.choose(score, live, min(self.topk, n))
        picked = picked if whole is None else picked | (live & whole[:, None])
        fresh = jnp.concatenate([jnp.ones_like(live[:, :1]), sentence[:, 1:] != sentence[:, :-1]], 1)
        place = jnp.where(live, jnp.cumsum(fresh, 1, dtype=jnp.int32) - 1, -1)  # sentences of this buffer, numbered from 0
        hit = segment_sum(picked.astype(jnp.float32), place, n) > 0
        size = jnp.where(hit, segment_sum(jnp.ones_like(score), place, n), 0).astype(jnp.int32)
        best = jax.vmap(lambda s, p: jnp.full((n + 1,), -jnp.inf).at[jnp.where(p < 0, n, p)].max(s)[:n])(score, place)
        order = jnp.argsort(-jnp.where(hit, best, -jnp.inf), axis=-1, stable=True)
        total = jnp.cumsum(jnp.take_along_axis(size, order, -1), -1)
        fits = (total <= room[:, None]) | (jnp.arange(n) < 1)[None]
        fits = jnp.take_along_axis(fits, jnp.argsort(order, axis=-1), -1) & hit
        chosen = live & jnp.take_along_axis(hit, jnp.maximum(place, 0), -1)
        stay = chosen & jnp.take_along_axis(fits, jnp.maximum(place, 0), -1)
        stay = select.choose(score, stay, room, most=cap)
        lost = jnp.sum(chosen, -1, dtype=jnp.int32) - jnp.sum(stay, -1, dtype=jnp.int32)
        return select.pack(stay, cap)._replace(lost=lost)

    def start(self, b: int) -> Retained:
        """Nothing read yet."""
        zero, none = jnp.zeros((b,), jnp.int32), jnp.full((b, self.room), -1, jnp.int32)
        return Retained(jnp.zeros_like(none), none, none, jnp.ones((b, self.question), jnp.float32), zero, zero, zero)

    def absorb(
        self,
        look: Any,
        state: Retained,
        ids: Int[Array, "b c"],
        count: Int[Array, " b"],
        question: Int[Array, "b q"],
        asked: Bool[Array, "b q"],
        last: Bool[Array, " b"],
        whole: Bool[Array, " b"],
        keep=None,
    ) -> tuple[Retained, Int[Array, " b"]]:
        """Read on: `ids` are the text's next tokens, the first `count` of them there, `last` where it ends with them, `whole` where it fits.

        look(ids, live, rows): attention of the last `rows` tokens. Returns the state, and how many tokens were taken.
        """
        q = question.shape[1]
        at = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        ending = (at < count[:, None]) & jnp.isin(ids, jnp.asarray(self.ends, jnp.int32))
        upto = jnp.max(jnp.where(ending, at + 1, 0), -1)
        taken = jnp.where(last | (upto == 0), count, upto)
        there = at < taken[:, None]
        stop = (ending & there).astype(jnp.int32)
        ended = jnp.cumsum(stop, -1)
        mine = ids, state.read[:, None] + at, state.closed[:, None] + ended - stop
        joined = [jnp.concatenate([old, jnp.where(there, new, -1)], 1) for old, new in zip(state[:3], mine, strict=True)]
        live = joined[1] >= 0
        packed = select.pack(live).index
        text, order, sentence = (jnp.where(packed >= 0, gather(x, packed), -1) for x in joined)
        n = text.shape[1]
        # the question right behind the context: dead rows of either go to the front
        both = jnp.concatenate([jnp.maximum(text, 0), question], 1)
        move = select.pack(jnp.concatenate([order >= 0, asked], 1))
        (rows,) = look(gather(both, move.index), move.index >= 0, q)
        rows = jnp.where((jnp.arange(q)[None] >= q - jnp.sum(asked, -1, keepdims=True))[:, None, :, None], rows.astype(jnp.float32), 0.0)
        column = jnp.where(move.assign >= 0, move.assign, 0)[:, None, None]
        rows = jnp.where((move.assign >= 0)[:, None, None], jnp.take_along_axis(rows, column, -1), 0.0)
        first = (state.read == 0)[:, None]
        weight = jnp.where(first, jnp.sum(rows[..., n:], (1, 3)), state.weight)
        used = weight if self.weigh else jnp.where(first & (self.variant == "official"), weight, 1.0)
        plan = self.plan(self.scores(rows[..., :n], used), sentence, keep, whole)
        left = [jnp.pad(jnp.where(plan.index >= 0, gather(x, plan.index), -1), ((0, 0), (self.room - plan.index.shape[1], 0)),
                        constant_values=-1) for x in (text, order, sentence)]  # fmt: skip
        new = Retained(left[0], left[1], left[2], weight, state.read + taken, state.closed + ended[:, -1], state.lost + plan.lost)
        some = taken > 0  # a text that has ended stays as it is
        return jax.tree.map(lambda a, o: jnp.where(some.reshape(-1, *(1,) * (a.ndim - 1)), a, o), new, state), taken

    def run(self, params, look, ids: Int[Array, "b n"], live: Bool[Array, "b n"], keep=None) -> Plan:
        if ids.ndim != 2 or live.shape != ids.shape:
            raise ValueError(f"ids are {list(ids.shape)} and live {list(live.shape)}; both must be [b n]")
        (b, n), q = ids.shape, min(self.question, ids.shape[1])
        length = jnp.sum(live, -1, dtype=jnp.int32)
        if keep is None and self.capacity >= n:
            return select.pack(live)
        text = jnp.maximum(length - q, 0)
        room = budget.per_head(keep, (b, 1), self.capacity)[:, 0] - self.question
        question, asked = ids[:, n - q :], live[:, n - q :]
        asked = jnp.pad(asked, ((0, 0), (self.question - q, 0)))
        question = jnp.pad(question, ((0, 0), (self.question - q, 0)))

        def more(state: Retained):
            return jnp.any(state.read < text)

        def one(state: Retained) -> Retained:
            at = (n - length + state.read)[:, None] + jnp.arange(self.chunk, dtype=jnp.int32)[None]
            window = jnp.take_along_axis(ids, jnp.clip(at, 0, n - 1), 1)
            left = text - state.read
            count, last = jnp.clip(left, 0, self.chunk), left <= self.chunk
            return self.absorb(look, state, window, count, question, asked, last, text <= room, room)[0]

        state = lax.while_loop(more, one, self.start(b))
        kept = select.mark(jnp.where(state.order >= 0, state.order + (n - length)[:, None], -1), n)
        plan = select.pack(kept | (live & (jnp.arange(n) >= n - q)[None]), self.capacity)
        return plan._replace(lost=plan.lost + state.lost)
