"""ToMe, token merging. Source: arXiv:2210.09461; facebookresearch/ToMe (tome/merge.py, tome/utils.py), CC BY-NC: written from the formulas."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import bipartite, cosine, merge_plan, packed_order, scatter
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.types import SPECIAL, Evidence, Needs, Plan, Tokens


@register(
    "tome",
    site="vit",
    paper="arXiv:2210.09461",
    title="Token Merging: Your ViT But Faster",
    authors="Daniel Bolya and Cheng-Yang Fu and Xiaoliang Dai and Peizhao Zhang and Christoph Feichtenhofer and Judy Hoffman",
)
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

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[tuple, Plan]:
        b, n = tokens.pos.shape
        room = self.count(n, n)
        most = n // 2 if keep is not None else n - room
        live = tokens.pos >= 0
        order = packed_order(live)
        take = lambda x: jnp.take_along_axis(x, order, 1)
        here, free = take(live), take(live & (tokens.kind != SPECIAL))
        metric = jnp.take_along_axis(jnp.mean(evidence.keys.astype(jnp.float32), 1), order[..., None], 1)
        score = cosine(metric[:, ::2], metric[:, 1::2])
        spare = jnp.sum(free, -1, dtype=jnp.int32) // 2
        alive = jnp.sum(live, -1, dtype=jnp.int32)
        remove = jnp.minimum(most if keep is None else alive - jnp.minimum(keep, room), spare)
        partner, best = bipartite(score, free[:, ::2], free[:, 1::2], remove, most)
        row = jnp.arange(n, dtype=jnp.int32)
        place = jnp.broadcast_to(jnp.where(row % 2 == 0, row, n + row)[None], (b, n))  # A before B
        if not self.special:
            place = place.at[:, ::2].set(jnp.argsort(jnp.argsort(-best, axis=-1), axis=-1).astype(jnp.int32))
        goes = jnp.zeros((b, n), jnp.int32).at[:, ::2].set(partner + 1) - 1
        into = jnp.where(goes >= 0, 2 * goes + 1, row[None])
        rank = jnp.where(here & (goes < 0), place, -1)
        into = jnp.where(here, jnp.take_along_axis(order, into, 1), -1)
        return state, merge_plan(scatter(order, rank), scatter(order, into), tokens.size, room)


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
