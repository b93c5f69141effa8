"""MustDrop. Source: arXiv:2411.10803; liuting20/MustDrop (local_merge.py, clip_encoder.py, modelling_sparse_llama.py), README: Apache-2.0."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.matching import by_falling, merge_plan, movable, unit
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner, questions
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import POSITIONS
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import choose, pack
from jaxtok.core.types import Evidence, Needs, Plan, Tokens

TITLE = "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model"
AUTHORS = "Ting Liu and Liangtao Shi and Richang Hong and Yue Hu and Quanjun Yin and Linfeng Zhang"


def key_set(seen: Float[Array, "b h n"], tokens: Tokens, rate: float = 0.08) -> Bool[Array, "b n"]:
    """The rows that later stages may not drop: the ceil(rate * rows) of largest attention `seen` from the class row, mean over heads.

    `seen` is that of the last layer (CLIP-L/14: 0-based layer 23, one behind the features); rows counts live rows that are not SPECIAL.
    """
    free = movable(tokens)
    count = jnp.ceil(rate * jnp.sum(free, -1).astype(jnp.float32) - 1e-4).astype(jnp.int32)
    return choose(jnp.mean(seen.astype(jnp.float32), 1), free, count)


@register("mustdrop.vit", site="vit", paper="arXiv:2411.10803", title=TITLE, authors=AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MustDropVit(Reducer):
    """Windows of the grid whose rows are alike become one row each, before a layer (the paper: before 0-based layer 1).

        similarity of a window = mean of cos(x_i, x_j) over its pairs i != j;   merged where it is >= threshold
        x' = sum of size * x / sum of size over the window

    Windows are contiguous `window` x `window` cells; one that lacks a live row (at a border of the grid) is left alone. Output: SPECIAL
    rows, the merged windows by falling similarity, the other rows in order; a window takes the place in line of its last row. The number of merged windows
    is data, so the static number of rows stays, and what is spared are dead rows; `most` = r merges the r most similar windows instead, whatever their
    similarity, and takes r (window^2 - 1) rows off the static number. The official code merges equally many windows in all images of a
    batch (the smallest number of them); here each image has its own. Thresholds are set per task (0.8 is TextVQA's). A threshold above 1
    changes nothing. A traced `keep` is not obeyed: a threshold has no budget.
    """

    floor: ClassVar[bool] = True
    conserves: ClassVar[bool] = True

    threshold: float = 0.8
    window: int = 3
    most: int | None = None

    def __post_init__(self):
        check.count("window", self.window, 2)
        check.real("threshold", self.threshold)
        if self.most is not None:
            check.count("most", self.most, 0)

    @property
    def needs(self) -> Needs:
        return Needs()

    def count(self, n: int, n_kind: int) -> int:
        size = self.window**2
        return n - (0 if self.most is None else min(self.most, n_kind // size) * (size - 1))

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        (_, n), full = tokens.pos.shape, self.window**2
        live, free = tokens.pos >= 0, movable(tokens) & (tokens.cell[..., 0] >= 0)
        where = tokens.cell // self.window
        same = jnp.all(where[:, :, None] == where[:, None], -1) & free[:, :, None] & free[:, None]
        u = unit(tokens.x)
        like = jnp.where(same & ~jnp.eye(n, dtype=bool)[None], jnp.einsum("bnc,bmc->bnm", u, u), 0.0)
        each = jnp.sum(like, -1)  # of a row to the others of its window
        similar = jnp.sum(jnp.where(same, each[:, None], 0.0), -1) / (full * (full - 1))
        whole = free & (jnp.sum(same, -1, dtype=jnp.int32) == full)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        last = jnp.max(jnp.where(same, row[:, None], -1), -1)
        heads = whole & (last == row)  # one row a window
        order = by_falling(similar, heads)
        merges = heads & (similar >= self.threshold) if self.most is None else heads & (order < self.most)
        goes = whole & jnp.take_along_axis(merges, jnp.maximum(last, 0), 1)
        into = jnp.where(live, jnp.where(goes, last, row), -1)
        place = jnp.where(merges, n + order, jnp.where(live & ~movable(tokens), row, 2 * n + row))
        rank = jnp.where(live & (into == row), place, -1)
        return state, merge_plan(rank, into, tokens.size, self.count(n, n))


@register("mustdrop.select", site="select", paper="arXiv:2411.10803", title=TITLE, authors=AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MustDropSelect(Reducer):
    """Drop nothing; mark the `key_set` (`Tokens.score` = 1, 0 elsewhere), which `MustDropLayers` may not drop.

    The attention is that of the layer behind the last that ran: for CLIP-L/14 features of layer 22, layer 23.
    """

    floor: ClassVar[bool] = True

    rate: float = 0.08
    positions: str = "repack"

    def __post_init__(self):
        check.share("rate", self.rate)
        check.one_of("positions", self.positions, POSITIONS)

    @property
    def needs(self) -> Needs:
        return Needs(cls=True, own=True)

    def count(self, n: int, n_kind: int) -> int:
        return n

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        return state, pack(tokens.pos >= 0)

    def mark(self, params, state, tokens: Tokens, evidence: Evidence) -> Array:
        seen = jax.lax.stop_gradient(check.given("cls", evidence.cls))
        return key_set(seen, tokens, self.rate).astype(jnp.float32)


@register("mustdrop.layers", site="layers", paper="arXiv:2411.10803", title=TITLE, authors=AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MustDropLayers(Pruner):
    """One stage of the prefill: drop the image rows that the question neither attends to much in all nor in any of its tokens.

        A: attention of layer K - 1, mean over heads;  t: text rows behind the image;  j: image rows
        j goes where  sum_t A_tj < total * sum over t, j' of A_tj'   and   max_t A_tj < peak,   unless it is in the key set

    total, peak: the paper's global and individual threshold, set per task: TextVQA (.001, .001), (.0012, .001), (.011, .01) for 192, 128, 64
    rows in the mean over all layers; VizWiz (.005, .001) for 64. 0 and 0: all stay. Key set: rows of `Tokens.score` > 0 (`MustDropSelect`);
    without a score there is none. How many stay is data: capacity caps it (of too many those of largest sum_t stay, the key set first), and
    capacity=images saves nothing but dead rows. asks: the last rows among which the question is (static). Rows are numbered anew.

    trim: the decode stage. The caches of layer `trim` (paper: 2) and later hold in the end only rows that no stage has dropped, and each
    layer's next rotary id is the number of rows in its own cache. Set it on the last stage.
    """

    total: float = 0.001
    peak: float = 0.001
    asks: int = 128
    trim: int | None = None
    positions: str = "repack"

    def __post_init__(self):
        super().__post_init__()
        check.between("total", self.total, 0, 1e9)
        check.between("peak", self.peak, 0, 1e9)
        check.count("asks", self.asks)
        if self.trim is not None:
            check.count("trim", self.trim, 0)

    @property
    def needs(self) -> Needs:
        return Needs(rows=self.asks)

    def stay(self, params, state: Held, tokens: Tokens, evidence: Evidence, free, room):
        attention, _ = questions(tokens, evidence)
        each = jnp.sum(attention, 1)
        low = each < self.total * jnp.sum(jnp.where(free, each, 0.0), -1, keepdims=True)
        low &= jnp.max(attention, 1) < self.peak
        key = jnp.zeros_like(free) if tokens.score is None else tokens.score > 0
        return choose(jnp.where(key, jnp.inf, each), free & (key | ~low), room, most=self.capacity)


def mustdrop(
    images: int,
    thresholds: tuple[float, float] = (0.001, 0.001),
    capacities: tuple[int, ...] | None = None,
    layers: tuple[int, ...] = (3, 7, 11, 15),
    similar: float = 0.8,
    rate: float = 0.08,
    trim: int | None = 2,
    asks: int = 128,
) -> Recipe:
    """All stages: windows merged behind the encoder's first layer, the key set, four stages before `layers` (0-based), trimmed caches.

    images: rows that enter the decoder (all patches: how many windows merge is data). thresholds: (total, peak) of `MustDropLayers`.
    capacities: image rows left by each stage at most; None = no cap. similar: `MustDropVit.threshold`. ValueError: places out of order.
    """
    check.count("images", images)
    capacities = (images,) * len(layers) if capacities is None else capacities
    if len(capacities) != len(layers) or list(layers) != sorted(set(layers)) or list(capacities) != sorted(capacities, reverse=True):
        raise ValueError(f"layers={layers} must ascend, and each goes with a capacity, at most the one before; got {capacities}")
    left = (images, *capacities)
    stage = lambda i, **more: MustDropLayers(
        capacity=left[i + 1], images=min(left[i], images), total=thresholds[0], peak=thresholds[1], asks=asks, **more
    )
    places = [(k, stage(i, trim=trim if i == len(layers) - 1 else None)) for i, k in enumerate(layers)]
    return Recipe(vit=((1, MustDropVit(threshold=similar)),), select=MustDropSelect(rate=rate), layers=tuple(places))
