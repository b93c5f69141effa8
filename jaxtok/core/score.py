"""Parts of scores that several methods share. Scores are float32, higher = more important, whatever the model's dtype."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.types import Evidence

REDUCTIONS = {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum}


def grouped(x: Float[Array, "b h *rest"], g: int) -> Float[Array, "b g q *rest"]:
    """The q = h/g query heads of each KV head together: query head i reads KV head i // (h/g)."""
    check.count("g", g)
    b, h = x.shape[:2]
    if h % g:
        raise ValueError(f"{h} query heads cannot share {g} KV heads")
    return x.reshape(b, g, h // g, *x.shape[2:])


def to_kv_heads(x: Float[Array, "b h *rest"], g: int, how: str = "mean") -> Float[Array, "b g *rest"]:
    """Reduce over the h/g query heads that read the same KV head (query head i reads i // (h/g))."""
    check.one_of("how", how, tuple(REDUCTIONS))
    return REDUCTIONS[how](grouped(x.astype(jnp.float32), g), axis=2)


def pool(x: Float[Array, "*B n"], width: int, kind: str = "avg") -> Float[Array, "*B n"]:
    """Pooling of odd `width` along the last axis, same length; "avg" divides by `width` and takes zeros past the ends (SnapKV)."""
    check.one_of("pool kind", kind, ("avg", "max"))
    check.count("pooling width", width, 0)
    if width % 2 == 0:
        raise ValueError(f"pooling width must be odd and >= 1, got {width}")
    if width == 1:
        return x
    window, stride = (1,) * (x.ndim - 1) + (width,), (1,) * x.ndim
    half = [(0, 0)] * (x.ndim - 1) + [(width // 2, width // 2)]
    if kind == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, stride, half)
    return lax.reduce_window(x, 0.0, lax.add, window, stride, half) / width


def window_attention(
    rows: Float[Array, "b h w n"], candidate, g: int, *, how: str = "mean", over: str = "mean", width: int = 1, kind: str = "avg"
) -> Float[Array, "b g n"]:
    """SnapKV's score: attention of the window's queries, reduced `over` the window and `how` over the group, then pooled over keys.

    `candidate` bool [b g n]: rows that are scored; the others count as 0 in the pooling (dead rows and the window itself).
    """
    check.one_of("over", over, tuple(REDUCTIONS))
    score = REDUCTIONS[over](rows, axis=2)
    return pool(jnp.where(candidate, to_kv_heads(score, g, how), 0.0), width, kind)


def moments(q: Float[Array, "b h n d"], counted: Bool[Array, "b n"]) -> tuple[Float[Array, "b h d"], Float[Array, "b h d d"]]:
    """Mean and covariance (divided by the count) of the counted queries of each head, float32; zeros where none is counted."""
    if q.ndim != 4 or counted.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"q is {list(q.shape)} and counted {list(counted.shape)}; they must be [b h n d] and [b n]")
    weight = counted.astype(jnp.float32)
    number = jnp.maximum(jnp.sum(weight, -1), 1.0)[:, None, None]
    q = jnp.where(counted[:, None, :, None], q.astype(jnp.float32), 0.0)
    mean = jnp.sum(q, 2) / number
    centred = jnp.where(counted[:, None, :, None], jnp.clip(q - mean[:, :, None], -1e15, 1e15), 0.0)  # squares stay finite
    return mean, jnp.einsum("bhni,bhnj->bhij", centred, centred) / number[..., None]


def output_norm(v: Float[Array, "b g n d"], o: Float[Array, "hd c"], power: int) -> Float[Array, "b h n"]:
    """|v_j W_O|_power (1 or 2) of every query head, float32: how much a value can write into the residual stream.

    `o` are the rows h * d of the output projection, query head i's (which reads KV head i // (h/g)) from row i * d on. One query head
    of each group at a time: memory O(b g n c).
    """
    check.one_of("power", power, (1, 2))
    (b, g, n, d), (rows, c) = v.shape, o.shape
    if not g * d or rows % (g * d):
        raise ValueError(f"an output projection of {rows} rows does not belong to {g} KV heads of {d} channels")
    by_head = jnp.swapaxes(o.astype(jnp.float32).reshape(g, rows // (g * d), d, c), 0, 1)
    v, most = v.astype(jnp.float32), float(jnp.finfo(jnp.float32).max)

    def one(w):
        y = jnp.einsum("bgnd,gdc->bgnc", v, w)
        norm = jnp.sum(jnp.abs(y), -1) if power == 1 else jnp.sqrt(jnp.sum(y * y, -1))
        return jnp.where(norm < most, norm, most)  # products of finite numbers may overflow

    return jnp.moveaxis(lax.map(one, by_head), 0, 2).reshape(b, rows // d, n)


def nearest(
    x: Float[Array, "b g n d"], y: Float[Array, "b g m d"], there: Bool[Array, "b g m"], block: int = 256
) -> tuple[Float[Array, "b g n"], Int[Array, "b g n"]]:
    """(cosine similarity, index) of the row of y most like each row of x, float32; -inf where no row of y is `there`.

    Ties: the first. Rows of zero length have similarity 0. `block` rows of x at a time: memory O(b g block m).
    """
    unit = lambda a: a / jnp.maximum(jnp.sqrt(jnp.sum(a * a, -1, keepdims=True)), 1e-6)
    check.count("block", block)
    if x.shape[:2] != y.shape[:2] or x.shape[3:] != y.shape[3:] or there.shape != y.shape[:3]:
        raise ValueError(f"x, y, there are {[list(a.shape) for a in (x, y, there)]}; they must be [b g n d], [b g m d], [b g m]")
    (b, g, n, d), size = x.shape, max(min(block, x.shape[2]), 1)
    y = unit(jnp.where(there[..., None], y.astype(jnp.float32), 0.0))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -n % size), (0, 0))).reshape(b, g, -(-n // size), size, d)

    def one(rows):
        like = jnp.einsum("bgnd,bgmd->bgnm", unit(rows.astype(jnp.float32)), y)
        like = jnp.where(there[:, :, None], like, -jnp.inf)
        return jnp.max(like, -1), jnp.argmax(like, -1).astype(jnp.int32)

    joined = lambda a: jnp.moveaxis(a, 0, 2).reshape(b, g, -(-n // size) * size)[..., :n]
    like, index = lax.map(one, jnp.moveaxis(x, 2, 0))
    return joined(like), joined(index)


def change(a: Float[Array, "b n c"], b: Float[Array, "b n c"]) -> Float[Array, "b n 2"]:
    """|b| / |a| and cos(b, a), row by row, float32; 0 where a row is 0."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    la, lb = jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(b, axis=-1)
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.stack([lb / jnp.maximum(la, tiny), jnp.sum(a * b, -1) / jnp.maximum(la * lb, tiny)], -1)


def softmax(x: Float[Array, "*B n"], among: Bool[Array, "*B n"]) -> Float[Array, "*B n"]:
    """Softmax over the rows that are `among` it, float32; 0 elsewhere, and all 0 where there are none."""
    x = jnp.where(among, jnp.clip(x.astype(jnp.float32), -1e30, 1e30), -2e30)
    e = jnp.where(among, jnp.exp(x - jnp.max(x, -1, keepdims=True, initial=-2e30)), 0.0)
    return e / jnp.maximum(jnp.sum(e, -1, keepdims=True), 1e-30)


def drawing_key(evidence: Evidence, seed: int) -> Array:
    """The PRNG key of a method that draws: the model's (another for each layer); where the call has none, made of `seed` and the layer."""
    if evidence.key is not None:
        return jax.random.fold_in(evidence.key, seed)
    return jax.random.fold_in(jax.random.key(seed), 0 if evidence.layer is None else evidence.layer)


def by_order(key: Array, pos: Int[Array, "*B n"]) -> Float[Array, "*B n"]:
    """Numbers drawn from U[0, 1), a function of (key, order) alone: the same wherever a row lies and whatever else is in the batch."""
    draw = lambda p: jax.random.uniform(jax.random.fold_in(key, p), dtype=jnp.float32)
    return jax.vmap(draw)(jnp.maximum(pos, 0).ravel()).reshape(pos.shape)


def energy(
    like: Float[Array, "b n n"], among: Bool[Array, "b n"], margin: float, *, kind: str = "elu", alpha: float = 1.0, itself: bool = True
) -> Float[Array, "b n"]:
    """PiToMe's energy: how many close neighbours each row has, the mean of f(cosine) over the rows `among`; float32.

    kind "elu": f(c) = c - margin above the margin, alpha (exp(c - margin) - 1) below it; "cut": c above it, the same below it; "gauss":
    the normal density of 1 - c with deviation 1 - margin. `itself`: a row is among its own neighbours; else the sum over the others.
    """
    check.one_of("kind", kind, ("elu", "cut", "gauss"))
    like = like.astype(jnp.float32)
    if kind == "gauss":
        f = jnp.exp(-0.5 * jnp.square((1.0 - like) / (1.0 - margin))) / ((1.0 - margin) * (2.0 * jnp.pi) ** 0.5)
    else:
        f = jnp.where(like > margin, like - (margin if kind == "elu" else 0.0), alpha * jnp.expm1(jnp.minimum(like - margin, 0.0)))
    pair = among[:, None, :] if itself else among[:, None, :] & ~jnp.eye(like.shape[-1], dtype=bool)[None]
    number = jnp.maximum(jnp.sum(among.astype(jnp.float32), -1, keepdims=True), 1.0) if itself else 1.0
    return jnp.sum(jnp.where(pair, f, 0.0), -1) / number


def pagerank(probs: Float[Array, "b h n n"], among: Bool[Array, "b n"], iterations: int) -> Float[Array, "b h n"]:
    """Weighted PageRank of the attention graph: s_0 = 1 / rows, s' = A^T s, A the attention among the rows `among`, each row's sum 1.

    Float32, sums to 1 over these rows; the others get 0.
    """
    check.count("iterations", iterations, 0)
    pair = among[:, None, :, None] & among[:, None, None, :]
    a = jnp.where(pair, probs.astype(jnp.float32), 0.0)
    mass = jnp.sum(a, -1, keepdims=True)
    a = a / jnp.where(mass > 0, mass, 1.0)
    start = among.astype(jnp.float32) / jnp.maximum(jnp.sum(among.astype(jnp.float32), -1, keepdims=True), 1.0)
    start = jnp.broadcast_to(start[:, None], a.shape[:3])
    return lax.fori_loop(0, iterations, lambda _, s: jnp.einsum("bhij,bhi->bhj", a, s, precision=lax.Precision.HIGHEST), start)
