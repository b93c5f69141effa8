"""ToMe, token merging. Source: arXiv:2210.09461; facebookresearch/ToMe (tome/merge.py, tome/utils.py), CC BY-NC: written from the formulas."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import cosine, even_odd, join, mean_keys, movable, packed_order, removal
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.score import by_order, drawing_key
from jaxtok.core.select import choose
from jaxtok.core.types import Evidence, Needs, Plan, Tokens

_PAPER, _TITLE = "arXiv:2210.09461", "Token Merging: Your ViT But Faster"
_AUTHORS = "Daniel Bolya and Cheng-Yang Fu and Xiaoliang Dai and Peizhao Zhang and Christoph Feichtenhofer and Judy Hoffman"


@register("tome", site="vit", paper=_PAPER, title=_TITLE, authors=_AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMe(Reducer):
    """Merge the `remove` rows most like another one into it, between attention and MLP.

        k_i = mean over heads of the keys,  S_ij = cos(k_i, k_j),   i among the even rows A, j among the odd rows B
        each i of A: best partner j(i) = argmax_B S_ij;   the `remove` rows of A with the largest S_i,j(i) join their partners
        x' = sum of size * x / sum of size,   size' = sum of size

    Even and odd count live rows from 0. Class and distillation tokens (kind SPECIAL) neither go nor are joined. At most half of the other
    rows can go. Output: what stays of A in order (special=0: by falling score), then B. `keep` [b]: live rows to leave, at most n - remove; without it `remove`
    rows go from each sequence, however short. Call the encoder with
    proportional=True (log of the size as key bias) for models trained without merging, not for MAE models.

    `special`: how many of the rows are of kind SPECIAL (static: it bounds what can go; a distilled DeiT has 2). remove=0 changes nothing; if merged rows are equal and proportional=True, the outputs are those of the unmerged model. Ties: the older
    row. `schedule` makes the recipe's entries. Registers (DINOv2) are protected too, which the official code does not know.
    """

    at: ClassVar[str] = "attn"
    conserves: ClassVar[bool] = True

    remove: int
    special: int = 1

    def __post_init__(self):
        check.count("remove", self.remove, 0)
        check.count("special", self.special, 0)

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    def count(self, n: int, n_kind: int) -> int:
        return n - min(self.remove, max(n - self.special, 0) // 2)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        room, live = self.count(n, n), tokens.pos >= 0
        most = n // 2 if keep is not None else n - room
        metric = mean_keys(evidence, packed_order(live))
        spare = jnp.sum(movable(tokens), -1, dtype=jnp.int32) // 2
        remove = removal(live, keep, most, room, spare)
        return state, even_odd(tokens, cosine(metric[:, ::2], metric[:, 1::2]), remove, most, room, sort=not self.special)


@register("tome.kth", site="vit", paper=_PAPER, title=_TITLE, authors=_AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KthToMe(Reducer):
    """Every k-th row is a destination, all others join the one most like them: n rows become n // k.

        of each run of k rows in order the last is a destination; the others: j(i) = argmax of cos(k_i, k_j) over all destinations

    Keys, weights and sizes as in `ToMe`. Rows of kind SPECIAL stand apart (the official function knows none: special=0). What is left
    behind the last full run joins too; `rest="drop"` drops it, as the official code does. A sequence shorter than k becomes its last row.
    `keep` [b]: live rows to leave at most: the runs become so long. k=1 changes nothing.
    """

    at: ClassVar[str] = "attn"

    k: int
    special: int = 1
    rest: str = "join"

    def __post_init__(self):
        check.count("k", self.k)
        check.count("special", self.special, 0)
        check.one_of("rest", self.rest, ("join", "drop"))

    @property
    def conserves(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rest == "join"

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    def count(self, n: int, n_kind: int) -> int:
        spare = max(n - self.special, 0)
        return n - spare + max(spare // self.k, min(spare, 1))

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        free, room = movable(tokens), self.count(n, n)
        number = jnp.sum(free, -1, keepdims=True, dtype=jnp.int32)
        run = jnp.full_like(number, self.k)
        if keep is not None:
            fixed = jnp.sum(tokens.pos >= 0, -1, keepdims=True, dtype=jnp.int32) - number
            run = jnp.maximum(run, -(-number // jnp.maximum(keep[:, None] - fixed, 1)))
        rank = jnp.cumsum(free.astype(jnp.int32), -1) - 1
        full = number // run * run
        target = free & jnp.where(full > 0, (rank % run == run - 1) & (rank < full), rank == number - 1)
        metric = mean_keys(evidence)
        plan = join(tokens, cosine(metric, metric), free & ~target, target, number[:, 0], n, room, weight=tokens.size)
        if self.rest == "drop":
            plan = plan._replace(assign=jnp.where(free & (rank >= full) & (full > 0), -1, plan.assign))
        return state, plan


@register("tome.random", site="vit", paper=_PAPER, title=_TITLE, authors=_AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomToMe(Reducer):
    """`remove` rows drawn at random join the one most like them of all others.  j(i) = argmax of cos(k_i, k_j) over rows not drawn.

    Keys, weights and sizes as in `ToMe`; rows of kind SPECIAL take no part; one row at least is not drawn. The draw is a function of the
    model's key (without one: of `seed` and the layer) and the row's order. The rest stays in order (the official code leaves it in the
    order drawn). remove=0 changes nothing. `keep` [b] as in `ToMe`.
    """

    at: ClassVar[str] = "attn"
    conserves: ClassVar[bool] = True

    remove: int
    special: int = 1
    seed: int = 0

    def __post_init__(self):
        check.count("remove", self.remove, 0)
        check.count("special", self.special, 0)

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    def count(self, n: int, n_kind: int) -> int:
        return n - min(self.remove, max(n - self.special - 1, 0))

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        free, live, room = movable(tokens), tokens.pos >= 0, self.count(n, n)
        remove = removal(live, keep, n - room, room, jnp.maximum(jnp.sum(free, -1, dtype=jnp.int32) - 1, 0))
        drawn = choose(by_order(drawing_key(evidence, self.seed), tokens.pos), free, remove)
        metric = mean_keys(evidence)
        return state, join(tokens, cosine(metric, metric), drawn, free & ~drawn, remove, n, room, weight=tokens.size)


def schedule(remove: int | tuple[int, float] | Sequence[int], layers: int, special: int = 1) -> tuple[tuple[int, ToMe], ...]:
    """The entries of Recipe.vit: `remove` rows in each layer; (r, inflect): from r (1 - inflect) to r (1 + inflect), linearly over the
    layers; or one number a layer. Numbers are cut to ints as in the official code.
    """
    if isinstance(remove, int):
        each = [remove] * layers
    elif isinstance(remove, tuple) and len(remove) == 2 and isinstance(remove[1], float):
        low = int(remove[0] * (1.0 - remove[1]))
        each = [int(low + (2 * remove[0] - 2 * low) * i / max(layers - 1, 1)) for i in range(layers)]
    else:
        each = [*remove, *[0] * layers][:layers]
    return tuple((i, ToMe(remove=r, special=special)) for i, r in enumerate(each) if r)
