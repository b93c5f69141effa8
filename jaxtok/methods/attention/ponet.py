"""PoNet. Source: arXiv:2110.02442; lxchtan/PoNet (examples/LRA/code/attention_ponet.py), Apache-2.0."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.mixer import Layer, Mixer
from jaxtok.core.registry import register

LOW = float(jnp.finfo(jnp.float32).min)  # of rows that no pool may take


def globally(q: Float[Array, "b h n d"], k: Float[Array, "b h n d"], v: Float[Array, "b h n d"], live: Bool[Array, "b n"]) -> Array:
    """f32 [b h d]: the one vector that attention of the mean query gives."""
    here = live[:, None, :, None]
    q, k, v = (jnp.where(here, x.astype(jnp.float32), 0.0) for x in (q, k, v))
    number = jnp.maximum(jnp.sum(live, -1), 1).astype(jnp.float32)
    mean = jnp.sum(q, 2) / number[:, None, None]
    logit = jnp.einsum("bhd,bhnd->bhn", mean, k) * max(q.shape[-1], 1) ** -0.5
    share = jnp.where(live[:, None], jax.nn.softmax(jnp.where(live[:, None], logit, LOW), -1), 0.0)
    return jnp.einsum("bhn,bhnd->bhd", share, v)


def segment_pool(x: Float[Array, "b n c"], live: Bool[Array, "b n"], segments: int) -> Float[Array, "b n c"]:
    """The maximum over the live ones of each row's segment of n // segments + 1 rows, counted from the first live row; 0 in dead rows."""
    b, n, c = x.shape
    size, first = n // segments + 1, jnp.argmax(live, -1, keepdims=True).astype(jnp.int32)
    row = jnp.arange(n, dtype=jnp.int32)[None]
    turn = lambda x, by: jnp.take_along_axis(x, ((row + by) % n)[..., None], 1)
    front = turn(jnp.where(live[..., None], x, LOW), first)  # segments are counted from the first live row
    cut = jnp.pad(front, ((0, 0), (0, -n % size), (0, 0)), constant_values=LOW).reshape(b, -1, size, c)
    most = jnp.repeat(jnp.max(cut, 2), size, 1)[:, :n]
    return jnp.where(live[..., None], turn(most, -first), 0.0)


def local_pool(x: Float[Array, "b n c"], live: Bool[Array, "b n"], window: int) -> Float[Array, "b n c"]:
    """The maximum over the `window` live rows around each row; 0 in dead rows, which stand behind or before all live ones."""
    n, half = x.shape[1], window // 2
    wide = jnp.pad(jnp.where(live[..., None], x, LOW), ((0, 0), (half, half), (0, 0)), constant_values=LOW)
    out = wide[:, :n]
    for i in range(1, window):
        out = jnp.maximum(out, wide[:, i : i + n])
    return jnp.where(live[..., None], out, 0.0)


def pool(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n d"],
    out: Float[Array, "b n c"],
    segment: Float[Array, "b n c"],
    local: Float[Array, "b n c"],
    live: Bool[Array, "b n"],
    *,
    segments: int,
    window: int = 3,
) -> Float[Array, "b n c"]:
    """f32: (G + max over the segment) * out + max over the window, heads side by side (c = h d); 0 in dead rows."""
    b, h, n, d = q.shape
    out, segment, local = (x.astype(jnp.float32) for x in (out, segment, local))
    whole = globally(q, k, v, live).reshape(b, 1, h * d)
    mixed = (whole + segment_pool(segment, live, segments)) * out + local_pool(local, live, window)
    return jnp.where(live[..., None], mixed, 0.0)


@register(
    "ponet",
    site="attention",
    paper="arXiv:2110.02442",
    title="PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
    authors="Chao-Hong Tan and Qian Chen and Wen Wang and Qinglin Zhang and Siqi Zheng and Zhen-Hua Ling",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PoNet(Mixer):
    """Three poolings in the place of attention: of everything, of each segment, of each row's neighbours. Cost linear in n.

        g = mean_t Q_t;   a = softmax_t(g . K_t / sqrt(d));   G = sum_t a_t V_t                      one vector a head
        S_t = max of the segment projection over t's segment;   L_t = max of the local one over the `window` rows around t
        out_t = (G + S_t) * O_t + L_t   (by elements),   then the layer's output projection

    Q, K, V are the layer's own projections; O, segment and local are the method's (`out`, `segment`, `local` [c h*d], with biases).
    variant="official": V = K, the layer's v is not used; "paper": a V of its own, the layer's v. A segment holds n // segments + 1
    rows from the first live row on, as the official code for LRA cuts them, so trailing segments may be empty; n counts dead rows too:
    padding that changes n changes the segments, and nothing else. `segments` is ours to choose: pre-trained models take sentences, which are not carried here. Only max
    pooling; a query never weighs single rows, so equal neighbours cannot be told apart by content, only by maxima.

    Special cases: one row: out = (V + S) * O + L. segments=1: one maximum over everything. Dead rows neither count nor are pooled; they
    give 0 (the official code fills -1e4 before it pools). Ties of a maximum share its gradient. Float32 throughout.
    ValueError: segments or window < 1, an even window, another variant.
    """

    segments: int = 64
    window: int = 3
    variant: str = "official"

    def __post_init__(self):
        check.count("segments", self.segments)
        check.count("window", self.window)
        check.one_of("variant", self.variant, ("official", "paper"))
        if self.window % 2 == 0:
            raise ValueError(f"window={self.window} must be odd: as many rows before as behind")

    def weights(self, key: jax.Array, cfg, i: int) -> dict[str, Array]:
        wide, names = cfg.heads * cfg.head_dim, ("out", "segment", "local")
        draw = lambda j: cfg.width**-0.5 * jax.random.normal(jax.random.fold_in(key, j), (cfg.width, wide), jnp.float32)
        return {name: draw(j) for j, name in enumerate(names)} | {name + "_bias": jnp.zeros((wide,), jnp.float32) for name in names}

    def mix(self, params: dict[str, Array], state, i: int, layer: Layer) -> tuple[Array, tuple[()]]:
        b, h, n, d = layer.q.shape
        project = lambda name: layer.x @ params[name].astype(layer.x.dtype) + params[name + "_bias"].astype(layer.x.dtype)[None, None]
        v = layer.k if self.variant == "official" else layer.v
        out, segment, local = (project(name) for name in ("out", "segment", "local"))
        mixed = pool(layer.q, layer.k, v, out, segment, local, layer.pos >= 0, segments=self.segments, window=self.window)
        return layer.out(mixed.astype(layer.x.dtype).reshape(b, n, h, d).transpose(0, 2, 1, 3)), ()
