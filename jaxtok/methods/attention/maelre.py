"""MAELRE. Source: arXiv:2507.19409 (Parag and Elgammal); no official code. What its abstract and figure leave open is our reading."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check
from jaxtok.core.matching import cosine, even_odd, mean_keys, movable, packed_order, removal
from jaxtok.core.mixer import Layer, Mixer
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import segment_sum
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.types import Evidence, Needs, Plan, Tokens

_PAPER, _AUTHORS = "arXiv:2507.19409", "Toufiq Parag and Ahmed Elgammal"
_TITLE = "Modality Agnostic Efficient Long Range Encoder"
LOW = float(jnp.finfo(jnp.float32).min)


def softmax(logit: Float[Array, "b h n m"], size: Float[Array, "b m"]) -> Float[Array, "b h n m"]:
    """Softmax over the keys of positive size, each counted `size` times; a row over nothing is 0."""
    some = (size > 0)[:, None, None]
    weight = jnp.log(jnp.where(some, size[:, None, None], 1.0))
    return jnp.where(some, jax.nn.softmax(jnp.where(some, logit + weight, LOW), -1), 0.0)


def landmark_of(live: Bool[Array, "b n"], landmarks: int) -> Int[Array, "b n"]:
    """The segment of each live row: the live rows in order, cut into `landmarks` parts of nearly the same length; -1 where dead."""
    rank = jnp.cumsum(live.astype(jnp.int32), -1) - 1
    number = jnp.maximum(jnp.sum(live, -1, keepdims=True, dtype=jnp.int32), 1)
    return jnp.where(live, jnp.where(number <= landmarks, rank, rank * landmarks // number), -1)


def means(x: Float[Array, "b h n d"], size: Float[Array, "b n"], segment: Int[Array, "b n"], m: int) -> tuple[Array, Array]:
    """(f32 [b h m d] means of the segments, weighted by size; f32 [b m] their sizes)."""
    total = segment_sum(size, segment, m)
    share = size / jnp.where(segment >= 0, jnp.take_along_axis(total, jnp.maximum(segment, 0), 1), 1.0)
    rows = jnp.where((segment >= 0)[:, None, :, None], x.astype(jnp.float32) * share[:, None, :, None], 0.0)
    return jnp.moveaxis(segment_sum(jnp.moveaxis(rows, 1, 2), segment, m), 2, 1), total


def inverse(a: Float[Array, "... m m"], rounds: int) -> Float[Array, "... m m"]:
    """The Moore-Penrose inverse of rows of probabilities, by `rounds` steps of third order (Nystromformer's); near it, not it."""
    eye = jnp.eye(a.shape[-1], dtype=a.dtype).reshape((1,) * (a.ndim - 2) + a.shape[-2:])
    columns = jnp.max(jnp.sum(jnp.abs(a), -2), axis=-1)[..., None, None]  # the norms of a: by columns, by rows
    z = jnp.swapaxes(a, -1, -2) / jnp.maximum(columns * jnp.max(jnp.sum(jnp.abs(a), -1), axis=-1)[..., None, None], 1e-30)
    for _ in range(rounds):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def approximate(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n d"],
    size: Float[Array, "b n"],
    *,
    kind: str,
    landmarks: int,
    rounds: int = 6,
) -> Float[Array, "b h n d"]:
    """f32: attention at a cost linear in n, see `MAELRE`; size 0 = a dead row, which is not seen and gets 0."""
    live = size > 0
    q, k, v = (jnp.where(live[:, None, :, None], x.astype(jnp.float32), 0.0) for x in (q, k, v))
    if kind == "linear":
        positive = lambda x: jax.nn.elu(x) + 1.0
        key = positive(k) * size[:, None, :, None]
        q, total = positive(q), jnp.sum(key, 2)
        out = jnp.einsum("bhnd,bhde->bhne", q, jnp.einsum("bhnd,bhne->bhde", key, v))
        out = out / jnp.maximum(jnp.einsum("bhnd,bhd->bhn", q, total), 1e-30)[..., None]
        return jnp.where(live[:, None, :, None], out, 0.0)
    segment, scale = landmark_of(live, landmarks), max(q.shape[-1], 1) ** -0.5
    mean = lambda x: means(x, size, segment, landmarks)[0]
    key, total = means(k, size, segment, landmarks)
    dot = lambda a, b: scale * jnp.einsum("bhnd,bhmd->bhnm", a, b)
    near = softmax(dot(q, key), total)
    if kind == "pooled":
        out = near @ mean(v)
    else:
        query, there = mean(q), (total > 0)[:, None, :, None]
        middle = jnp.where(there, softmax(dot(query, key), total), 0.0)
        out = near @ (inverse(middle, rounds) @ (jnp.where(there, softmax(dot(query, k), size), 0.0) @ v))
    return jnp.where(live[:, None, :, None], out, 0.0)


@register("maelre.attention", site="attention", paper=_PAPER, title=_TITLE, authors=_AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MAELRE(Mixer):
    """Approximate attention while the sequence is long, exact attention once merging has made it short.

        n > switch (static number of rows): by `kind`, with m = `landmarks` segment means k~, q~, v~ and their sizes s~
          "linear"   f(q) (f(k)^T s v) / (f(q) f(k)^T s),   f(x) = elu(x) + 1;  landmarks are not used
          "nystrom"  softmax(q k~^T + log s~) softmax(q~ k~^T + log s~)^+ softmax(q~ k^T + log s) v,   logits / sqrt(d)
          "pooled"   softmax(q k~^T + log s~) v~
        n <= switch: the layer's own attention (softmax; the log of sizes by the model's `proportional`)

    The paper approximates while there are more rows than channels, by a matrix of channels by channels, and is exact from then on: switch=None
    is the width, "linear" the kind whose matrix is of that shape. Our reading: which approximation and which merge; the defaults are ours, and
    no figure of the paper is claimed. The pseudo-inverse is iterated `rounds` times. Segments are runs of live rows as they stand in memory (merging
    reorders them), each row weighted by its size. Costs 2 n m d a head and product; m^3 for the inverse.

    switch >= n: the layer's own attention, everywhere. m = number of live rows: "pooled" is exact attention; "nystrom" is it too, as far as
    the inverse has converged. Dead rows count nowhere and give 0. ValueError: an unknown kind, a size < 1.
    """

    switch: int | None = None
    landmarks: int = 64
    kind: str = "linear"
    rounds: int = 6

    def __post_init__(self):
        if self.switch is not None:
            check.count("switch", self.switch, 0)
        check.count("landmarks", self.landmarks)
        check.count("rounds", self.rounds, 1, 1000)
        check.one_of("kind", self.kind, ("nystrom", "pooled", "linear"))

    def mix(self, params: dict[str, Array], state, i: int, layer: Layer) -> tuple[Array, tuple[()]]:
        if layer.q.shape[2] <= (layer.x.shape[2] if self.switch is None else self.switch):
            return layer.out(layer.attend(layer.q, layer.k, layer.v)), ()
        size = jnp.where(layer.pos >= 0, layer.size, 0.0)
        out = approximate(layer.q, layer.k, layer.v, size, kind=self.kind, landmarks=self.landmarks, rounds=self.rounds)
        return layer.out(out.astype(layer.q.dtype)), ()


@register("maelre.vit", site="vit", paper=_PAPER, title=_TITLE, authors=_AUTHORS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MAELREMerge(Reducer):
    """Between two stages: the share `ratio` of the rows stays, the others join the row most like them, weighted by size.

    Bipartite matching of even rows with odd ones by the cosine of keys averaged over heads, between attention and MLP (our reading: the
    abstract says "progressive merging"). At most half of the rows can go at once: ratio >= 0.5. Rows of kind SPECIAL (`special` of
    them, static) neither go nor are joined. keep [b]: live rows to leave. The sum of sizes stays. ratio=1 changes nothing.
    """

    at: ClassVar[str] = "attn"
    conserves: ClassVar[bool] = True

    ratio: float = 0.5
    special: int = 0

    def __post_init__(self):
        check.between("ratio", self.ratio, 0.5, 1)
        check.count("special", self.special, 0)

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    def count(self, n: int, n_kind: int) -> int:
        spare = max(n - self.special, 0)
        return n - (spare - budget.capacity(self.ratio, spare) if spare else 0)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        n = tokens.pos.shape[1]
        room, live, free = self.count(n, n), tokens.pos >= 0, jnp.sum(movable(tokens), -1, dtype=jnp.int32)
        most = n // 2 if keep is not None else n - room
        metric = mean_keys(evidence, packed_order(live))
        remove = removal(live, keep, most, room, free // 2)
        if keep is None:  # of its own rows each sequence keeps its share
            remove = jnp.maximum(free - budget.keep(self.ratio, free), 0)
        return state, even_odd(tokens, cosine(metric[:, ::2], metric[:, 1::2]), remove, most, room)


def maelre(
    layers: int,
    *,
    stages: int = 3,
    ratio: float = 0.5,
    special: int = 0,
    switch: int | None = None,
    landmarks: int = 64,
    kind: str = "linear",
) -> Recipe:
    """The recipe of an encoder of `layers` layers in `stages` stages of nearly the same length: the first layer of each stage but the
    first merges behind its attention. Call `vit.encode(..., proportional=True)`. Three stages and a half each are ours."""
    check.count("layers", layers)
    check.count("stages", stages, 1, layers)
    merge = MAELREMerge(ratio=ratio, special=special)
    return Recipe(
        vit=tuple((j * layers // stages, merge) for j in range(1, stages)) if ratio < 1 else (),
        attention=MAELRE(switch=switch, landmarks=landmarks, kind=kind),
    )
