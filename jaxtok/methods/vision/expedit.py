"""Expedit. Source: arXiv:2210.01035; Expedit-LargeScale-Vision-Transformer/Expedit-SAM (hourglass_image_encoder.py), Apache-2.0."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.matching import movable
from jaxtok.core.protocols import Held
from jaxtok.core.reduce import gather
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import pack
from jaxtok.core.types import DensePlan, Evidence, Needs, Tokens


@functools.cache
def layout(grid: tuple[int, int], clusters: tuple[int, int], neighbours: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pooling [m p] of a centroid's first value: bool, neighbourhood [m p] bool, nearest cluster of each pixel [p])."""
    high, wide, m = *grid, clusters[0] * clusters[1]
    y, x = np.divmod(np.arange(high * wide), wide)
    cy, cx = np.divmod(np.arange(m), clusters[1])
    inside = lambda p, c, n, k: (p[None] >= (c * n // k)[:, None]) & (p[None] < (-(-(c + 1) * n // k))[:, None])
    ly, lx = y * clusters[0] // high, x * clusters[1] // wide
    near = (np.abs(ly[None] - cy[:, None]) <= neighbours // 2) & (np.abs(lx[None] - cx[:, None]) <= neighbours // 2)
    return inside(y, cy, high, clusters[0]) & inside(x, cx, wide, clusters[1]), near, ly * clusters[1] + lx


def distances(a: Float[Array, "v n c"], b: Float[Array, "v m c"]) -> Float[Array, "v n m"]:
    """|a_i - b_j|^2, float32."""
    a, b = (jnp.clip(x.astype(jnp.float32), -1e17, 1e17) for x in (a, b))  # squares stay finite
    square = lambda x: jnp.sum(x * x, -1)
    product = jnp.einsum("vnc,vmc->vnm", a, b, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(square(a)[..., None] + square(b)[:, None] - 2 * product, 0.0)


def cluster(
    x: Float[Array, "v p c"], there: Bool[Array, "v p"], pool, near, tau: float, iterations: int
) -> tuple[Float[Array, "v m p"], Float[Array, "v m c"]]:
    """(affinities of the last round, each pixel's sum 1 over its clusters; centroids)."""
    x = jnp.where(there[..., None], x.astype(jnp.float32), 0.0)
    q = jnp.asarray(pool)[None] & there[:, None]
    mean = lambda q: jnp.einsum("vmp,vpc->vmc", q, x, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(jnp.sum(q, -1), 1e-16)[..., None]
    q, near = q.astype(jnp.float32), jnp.asarray(near)[None]
    c = mean(q)
    for _ in range(iterations):
        far = jnp.where(near, jnp.maximum(-tau * jnp.swapaxes(distances(x, c), 1, 2), -1e30), -jnp.inf)
        q = jnp.where(there[:, None], jax.nn.softmax(far, 1), 0.0)
        c = mean(q)
    return q, c


def spread(distance: Float[Array, "v p m"], there: Bool[Array, "v p m"], tau: float, k: int, power: int) -> Float[Array, "v p m"]:
    """Weights of the clusters in each pixel: exp(-tau distance), the k largest (and their equals), divided by their `power`-norm."""
    logit = jnp.where(there, -tau * distance, -jnp.inf)
    w = jnp.where(there, jnp.exp(logit), 0.0)
    least = jax.lax.top_k(w, min(k, w.shape[-1]))[0][..., -1:]
    w = jnp.where(w >= least, w, 0.0)
    norm = jnp.sum(w, -1, keepdims=True) if power == 1 else jnp.sqrt(jnp.maximum(jnp.sum(w * w, -1, keepdims=True), 1e-30))
    return w / jnp.maximum(norm, 1e-12)


@register(
    "expedit",
    site="vit",
    paper="arXiv:2210.01035",
    title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
    authors="Weicong Liang and Yuhui Yuan and Henghui Ding and Xiao Luo and Weihong Lin and Ding Jia and Zheng Zhang and Chao Zhang and Han Hu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Expedit(Reducer):
    """Cluster the grid before a layer, and bring it back before layer `restore`.

        c_m = mean of a cell of the coarse grid `clusters`; then `iterations` times, for the pixels p near cluster m
        Q_mp = softmax over m of -tau |x_p - c_m|^2;   c_m = sum_p Q_mp x_p / sum_p Q_mp;   near: within neighbours // 2 cells
        back: w_pm = exp(-tau |x_p - c_m|^2), the k largest of each p, normalised;   out_p = sum_m w_pm z_m  (z: the rows from deeper layers)

    `grid`: rows and columns of the image's patches (static; `Tokens.cell` says where each row stands; rows without a cell stay apart,
    `special` of them). `window`: the same inside each window of so many pixels a side, with `clusters` in each, zeros past the border
    being clustered too, as in SAM. `variant="official"` divides w by its L2 norm, "paper" by its sum (then constants stay constant).
    Clusters without a live pixel are dead rows and give nothing back (the official code keeps those of the border). A cluster has pos and
    rope of the first live pixel of its cell. No traced budget: the number of clusters is static. As many clusters as pixels, tau large and k = 1
    change nothing. Name the method once in a recipe: its state is that of the last place.
    """

    floor: ClassVar[bool] = True

    grid: tuple[int, int]
    clusters: tuple[int, int]
    restore: int | None
    window: int | None = None
    iterations: int = 5
    tau: float = 0.01
    neighbours: int = 5
    k: int = 20
    special: int = 0
    variant: str = "official"

    def __post_init__(self):
        for name in ("grid", "clusters"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is (rows, columns), both >= 1, got {getattr(self, name)}")
        inner = self.inner
        if self.clusters[0] > inner[0] or self.clusters[1] > inner[1]:
            raise ValueError(f"{self.clusters} clusters on {inner} pixels; take fewer clusters")
        if self.window is not None:
            check.count("window", self.window)
        for name in ("iterations", "neighbours", "k"):
            check.count(name, getattr(self, name))
        check.count("special", self.special, 0)
        check.one_of("variant", self.variant, ("official", "paper"))
        check.real("tau", self.tau)
        if not self.tau > 0:
            raise ValueError(f"tau must be > 0, got {self.tau}")

    @property
    def inner(self) -> tuple[int, int]:
        """Pixels inside which clusters are made."""
        return self.grid if self.window is None else (self.window, self.window)

    @property
    def windows(self) -> tuple[int, int]:
        return -(-self.grid[0] // self.inner[0]), -(-self.grid[1] // self.inner[1])

    @property
    def needs(self) -> Needs:
        return Needs()

    def count(self, n: int, n_kind: int) -> int:
        return min(self.special, n) + self.windows[0] * self.windows[1] * self.clusters[0] * self.clusters[1]

    def place(self, tokens: Tokens):
        """(window [b n] or -1, pixel inside it [b n]) of each row on the grid."""
        y, x = tokens.cell[..., 0], tokens.cell[..., 1]
        on = movable(tokens) & (y >= 0) & (x >= 0) & (y < self.grid[0]) & (x < self.grid[1])
        (high, wide), across = self.inner, self.windows[1]
        return jnp.where(on, y // high * across + x // wide, -1), jnp.where(on, y % high * wide + x % wide, -1)

    def clustered(self, x: Float[Array, "b p c"], there: Bool[Array, "b p"]):
        """(affinities [b v m p], centroids [b v m c]) by window, of pixels [b v * p] by window; pixels past the border are zeros that count."""
        pool, near, _ = layout(self.inner, self.clusters, self.neighbours)
        b, v = x.shape[0], self.windows[0] * self.windows[1]
        split = lambda a: a.reshape(b * v, a.shape[1] // v, *a.shape[2:])
        q, c = cluster(split(x), split(there), pool, near, self.tau, self.iterations)
        return q.reshape(b, v, *q.shape[1:]), c.reshape(b, v, *c.shape[1:])

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, DensePlan]:
        (b, n), (high, wide) = tokens.pos.shape, self.inner
        v, p, m = self.windows[0] * self.windows[1], high * wide, self.clusters[0] * self.clusters[1]
        window, pixel = self.place(tokens)
        flat = jnp.where(window >= 0, window * p + pixel, v * p)
        row = jax.vmap(lambda i: jnp.full((v * p + 1,), -1, jnp.int32).at[i].set(jnp.arange(n, dtype=jnp.int32))[: v * p])(flat)
        at, inside = np.divmod(np.arange(v * p), p)
        border = (at // self.windows[1] * high + inside // wide >= self.grid[0]) | (
            at % self.windows[1] * wide + inside % wide >= self.grid[1]
        )
        q, c = self.clustered(gather(tokens.x, row), (row >= 0) | jnp.asarray(border)[None])
        q = q / jnp.maximum(jnp.sum(q, -1, keepdims=True), 1e-16)
        w = (q[:, :, :, None] * jnp.eye(v)[None, :, None, :, None]).reshape(b, v * m, v * p)
        w = jnp.where((window >= 0)[:, None], jnp.take_along_axis(w, jnp.minimum(flat, v * p - 1)[:, None], 2), 0.0)
        label = jnp.asarray((at * m + layout(self.inner, self.clusters, self.neighbours)[2][inside])[None], jnp.int32)
        first = jax.vmap(lambda i, r: jnp.full((v * m + 1,), n, jnp.int32).at[i].min(r)[: v * m])(jnp.where(row >= 0, label, v * m), row)
        first = jnp.where(first < n, first, -1)
        order = jnp.asarray(self._joined())
        w, first, c = (jnp.take(a, order, 1) for a in (w, first, c.reshape(b, v * m, -1)))
        packed = jnp.argsort(first >= 0, axis=1, stable=True)  # dead clusters stand first
        w, first, c = (jnp.take_along_axis(a, packed.reshape(b, -1, *(1,) * (a.ndim - 2)), 1) for a in (w, first, c))
        alone = pack((tokens.pos >= 0) & (window < 0), min(self.special, n))
        index = jnp.concatenate([alone.index, first], 1)
        w = jnp.concatenate([jax.nn.one_hot(alone.index, n, dtype=jnp.float32), jnp.where((first >= 0)[..., None], w, 0.0)], 1)
        dead = jnp.argsort(index >= 0, axis=1, stable=True)
        index, w = jnp.take_along_axis(index, dead, 1), jnp.take_along_axis(w, dead[..., None], 1)
        put = jax.vmap(lambda i, a: jnp.zeros((n + 1, a.shape[-1]), jnp.float32).at[i].set(a)[:n])
        held = put(jnp.where(first < 0, n, first), c)
        return Held(slots=(held, window)), DensePlan(w, index)

    def _joined(self) -> np.ndarray:
        """Clusters by window -> by the raster of the joined grid."""
        (ny, nx), (h, w) = self.windows, self.clusters
        return np.arange(ny * nx * h * w, dtype=np.int32).reshape(ny, nx, h, w).transpose(0, 2, 1, 3).reshape(-1)

    def undo(self, params, state: Held, tokens: Tokens, before: Tokens) -> Array:
        centroid, theirs = state.slots
        window, _ = self.place(before)
        there = (window[..., None] == theirs[:, None]) & (window[..., None] >= 0) & (tokens.pos >= 0)[:, None]
        w = spread(distances(before.x, centroid), there, self.tau, self.k, 2 if self.variant == "official" else 1)
        back = jnp.einsum("bpm,bmc->bpc", w, tokens.x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return jnp.where((window >= 0)[..., None], back.astype(before.x.dtype), super().undo(params, state, tokens, before))
