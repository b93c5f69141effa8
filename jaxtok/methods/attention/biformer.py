"""BiFormer, bi-level routing attention. Source: arXiv:2303.08810; rayleizhu/BiFormer (ops/bra_legacy.py, ops/torch/rrsda.py), MIT."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.mixer import Layer, Mixer
from jaxtok.core.registry import register

LOW = float(jnp.finfo(jnp.float32).min)


def regions(x: Array, grid: tuple[int, int], side: int) -> Array:
    """[b rows*columns ...] by rows of the grid -> [b side*side p ...]: regions by rows, cells of a region by rows; zeros pad right and below."""
    (rows, cols), rest = grid, x.shape[2:]
    high, wide = -(-rows // side), -(-cols // side)
    x = x.reshape(x.shape[0], rows, cols, *rest)
    x = jnp.pad(x, ((0, 0), (0, high * side - rows), (0, wide * side - cols), *((0, 0) for _ in rest)))
    x = x.reshape(x.shape[0], side, high, side, wide, *rest)
    return jnp.moveaxis(x, 3, 2).reshape(x.shape[0], side * side, high * wide, *rest)


def cells(x: Array, grid: tuple[int, int], side: int) -> Array:
    """`regions` undone; what was padded goes."""
    (rows, cols), rest = grid, x.shape[3:]
    high, wide = -(-rows // side), -(-cols // side)
    x = jnp.moveaxis(x.reshape(x.shape[0], side, side, high, wide, *rest), 3, 2)
    x = x.reshape(x.shape[0], side * high, side * wide, *rest)[:, :rows, :cols]
    return x.reshape(x.shape[0], rows * cols, *rest)


def route(q: Float[Array, "b r p c"], k: Float[Array, "b r p c"], there: Bool[Array, "b r p"], topk: int, scale: float):
    """(i32 [b r topk] regions by falling affinity, f32 [b r topk] affinities; LOW for a region without a live cell). No gradient."""
    number = jnp.sum(there, -1)
    mean = lambda x: (
        jnp.sum(jnp.where(there[..., None], x.astype(jnp.float32), 0.0), 2) / jnp.maximum(number, 1)[..., None].astype(jnp.float32)
    )
    affinity = scale * jnp.einsum("bic,bjc->bij", mean(q), mean(k))
    value, index = lax.top_k(lax.stop_gradient(jnp.where(number[:, None] > 0, affinity, LOW)), topk)
    return index.astype(jnp.int32), value


def regional(
    q: Float[Array, "b r p h d"],
    k: Float[Array, "b s o h d"],
    v: Float[Array, "b s o h e"],
    there: Bool[Array, "b s o"],
    graph: Int[Array, "b f r m"],
    scale: float,
    share: Float[Array, "b r m"] | None = None,
) -> Float[Array, "b r p h e"]:
    """Each region's queries attend to the live cells of the regions that `graph` lists for it (f = 1: for all heads alike, or h lists).

    share: factor of the keys and values of a listed region. A query that sees no cell gets 0. Logits and softmax are float32."""
    b, r, _, h, _ = q.shape
    m, o = graph.shape[3], k.shape[2]

    def listed(x: Array, by: Array) -> Array:  # [b s o f ...], [b f r m] -> [b f r m*o ...]
        picked = jax.vmap(jax.vmap(lambda a, i: a[i], (2, 0)))(x, by)
        return picked.reshape(b, by.shape[1], r, m * o, *x.shape[4:])

    def heads(x: Array) -> Array:  # [b s o h .] -> [b h r m*o .]
        if graph.shape[1] == h:
            return listed(x, graph)
        flat = listed(x.reshape(b, *x.shape[1:3], 1, h * x.shape[4]), graph)[:, 0]
        return jnp.moveaxis(flat.reshape(b, r, m * o, h, -1), 3, 1)

    if share is not None:
        factor = jnp.repeat(share, o, -1)[:, None, :, :, None].astype(k.dtype)
        keys, values = heads(k) * factor, heads(v) * factor
    else:
        keys, values = heads(k), heads(v)
    there = jnp.broadcast_to(there[..., None], (*there.shape, graph.shape[1]))
    seen = listed(there, graph)[:, :, :, None]  # [b f r 1 m*o]
    logit = scale * jnp.einsum("brphd,bhrsd->bhrps", q, keys, preferred_element_type=jnp.float32)
    prob = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logit, LOW), -1), 0.0)
    return jnp.einsum("bhrps,bhrsd->brphd", prob.astype(values.dtype), values)


def enhance(v: Float[Array, "b n c"], kernel: Float[Array, "y x 1 c"], bias: Float[Array, " c"], grid: tuple[int, int]) -> Array:
    """Depthwise convolution of the values over the grid [b n c]; beyond its edge are zeros."""
    b, n, c = v.shape
    out = lax.conv_general_dilated(
        v.reshape(b, *grid, c), kernel.astype(v.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=c
    )
    return out.reshape(b, n, c) + bias.astype(v.dtype)[None, None]


@register(
    "biformer",
    site="attention",
    paper="arXiv:2303.08810",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    authors="Lei Zhu and Xinjiang Wang and Zhanghan Ke and Wayne Zhang and Rynson Lau",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiFormer(Mixer):
    """Each region of a picture attends to the regions most like it, and values are sharpened by a depthwise convolution.

        side x side regions;   q_r, k_r = mean of q and of k over a region, all heads side by side;   A = q_r k_r^T / sqrt(c)
        R_r = the topk regions of largest A (one list for all heads, no gradient);   out = softmax(q k_R^T scale) v_R + conv(v)

    and the layer's output projection behind the sum. `topk`: one number a stage, the layers shared out evenly among the stages (the
    paper's four); -2: every cell sees every other, by the layer's own attention. Cost of the operator: n * topk * n / side^2 + side^4; with
    side growing as n^(1/3), the number of regions as n^(2/3), it is n^(4/3); with a fixed number of
    regions it is quadratic. Rows are the cells of the grid, by rows, and nothing else: no class token, nothing merged before.
    variant="paper": scale = head_dim^-0.5; "official" (for checkpoints): c^-0.5, and cells that pad a grid that `side` does not divide
    are attended as keys of zeros (the older op pads x, so that its pads carry the biases, and the nchw op makes more regions then). A dead row is no key and counts
    in no mean, whatever the variant; as a query it gives 0.
    soft: keys and values of a listed region are multiplied by the softmax of its topk affinities (soft_routing). kernel=0: no convolution.
    Not carried: pooled keys and values (kv_per_win), learned routing, the blocks' own 3 x 3 positional convolution.

    topk = side^2 (or more regions than there are): attention over everything + conv(v). side=1 the same.
    ValueError: rows that are no grid, topk > side^2 at least 1 or -2, an even kernel.
    """

    side: int = 7
    topk: tuple[int, ...] = (1, 4, 16, -2)
    kernel: int = 5
    variant: str = "paper"
    soft: bool = False

    def __post_init__(self):
        check.count("side", self.side)
        check.kind("topk", self.topk, tuple)
        check.count("kernel", self.kernel, 0)
        check.kind("soft", self.soft, bool)
        check.one_of("variant", self.variant, ("paper", "official"))
        if not self.topk:
            raise ValueError("topk=() names no stage; give one number a stage")
        for k in self.topk:
            check.count("topk", k, -2)
            if k in (0, -1) or k > self.side**2:
                raise ValueError(f"topk={self.topk} must be from 1 to side^2 = {self.side**2}, or -2 (all, by the layer's own attention)")
        if self.kernel and self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd, or 0 for none")

    def layer(self, i: int, layers: int) -> "BiFormer":
        return dataclasses.replace(self, topk=(self.topk[min(i * len(self.topk) // layers, len(self.topk) - 1)],))

    def weights(self, key: jax.Array, cfg, i: int) -> dict[str, Array]:
        if not self.kernel:
            return {}
        c = cfg.heads * cfg.head_dim
        kernel = jax.random.normal(key, (self.kernel, self.kernel, 1, c), jnp.float32) / self.kernel
        return {"lepe": kernel, "lepe_bias": jnp.zeros((c,), jnp.float32)}

    def mix(self, params: dict[str, Array], state, i: int, layer: Layer) -> tuple[Array, tuple[()]]:
        if len(self.topk) != 1:
            raise ValueError(f"topk={self.topk} is for the stages of a model; take the instance of a layer: layer(i, layers)")
        b, h, n, d = layer.q.shape
        grid, k = layer.grid, self.topk[0]
        if grid is None or grid[0] * grid[1] != n:
            raise ValueError(f"{n} rows for a grid of {grid} patches; regions need exactly the patches (no class token, nothing merged)")
        flat = lambda x: x.transpose(0, 2, 1, 3)  # [b n h d]
        values = jnp.where((layer.pos >= 0)[..., None, None], flat(layer.v), jnp.zeros((), layer.v.dtype))
        if k == -2:
            out = flat(layer.attend(layer.q, layer.k, layer.v))
        else:
            out = self.routed(flat(layer.q), flat(layer.k), values, layer.pos >= 0, grid, k)
        if self.kernel:
            out = out + enhance(values.reshape(b, n, h * d), params["lepe"], params["lepe_bias"], grid).reshape(out.shape)
        return layer.out(flat(jnp.where((layer.pos >= 0)[..., None, None], out, jnp.zeros((), out.dtype)))), ()

    def routed(self, q: Array, k: Array, v: Array, live: Bool[Array, "b n"], grid: tuple[int, int], topk: int) -> Float[Array, "b n h d"]:
        """The routing and the attention of it, before convolution and output projection; q, k, v [b n h d]."""
        b, _, h, d = q.shape
        cut = lambda x: regions(x, grid, self.side)
        there, wide = cut(live), lambda x: cut(x.reshape(b, -1, h * d))
        graph, value = route(wide(q), wide(k), there, topk, max(h * d, 1) ** -0.5)
        if self.variant == "official":
            there = there | ~cut(jnp.ones_like(live))  # what pads the grid
        share = jax.nn.softmax(value, -1) if self.soft else None
        scale = max(h * d if self.variant == "official" else d, 1) ** -0.5
        out = regional(cut(q), cut(k), cut(v), there, graph[:, None], scale, share)
        return cells(out, grid, self.side)
