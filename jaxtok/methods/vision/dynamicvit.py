"""DynamicViT. Source: arXiv:2106.02034; raoyongming/DynamicViT (models/dyvit.py), MIT."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import movable
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import choose, pack
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


@register(
    "dynamicvit",
    site="vit",
    paper="arXiv:2106.02034",
    title="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    authors="Yongming Rao and Wenliang Zhao and Benlin Liu and Jiwen Lu and Jie Zhou and Cho-Jui Hsieh",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicViT(Reducer):
    """Keep the `capacity` rows that a learned predictor scores highest, before a layer (inference).

        z_j = gelu(W_0 norm(x_j) + b_0), split in halves;   u = mean over rows of the second halves
        log P_j = log softmax(W_3 gelu(W_2 gelu(W_1 [first half of z_j, u] + b_1) + b_2) + b_3)   (keep, drop);   score log P_j(keep)

    The widths of W_0..W_3 are c, c/2, c/4, 2. SPECIAL rows (`special` of them, static) are not scored and stay. The paper's recipe:
    before layers 3, 6, 9 with int(196 rho), int(196 rho^2), int(196 rho^3) rows, rho = 0.7 (`schedule`). Kept rows stay in order. The
    weights must be trained (the paper: with Gumbel masks, a ratio loss and distillation); those of `init_params` are random. A capacity
    of all rows changes nothing. `keep` [b]: live rows to leave, SPECIAL ones counted.
    """

    capacity: int
    special: int = 1

    def __post_init__(self):
        check.count("capacity", self.capacity)
        check.count("special", self.special, 0)

    @property
    def needs(self) -> Needs:
        return Needs()

    def init_params(self, key, cfg):
        c = cfg.width
        half, quarter = max(c // 2, 1), max(c // 4, 1)
        sizes = {"in": (c, c), "mid1": (c, half), "mid2": (half, quarter), "out": (quarter, 2)}
        keys = jax.random.split(key, len(sizes))
        out = {name: a**-0.5 * jax.random.normal(k, (a, b)) for k, (name, (a, b)) in zip(keys, sizes.items(), strict=True)}
        return (
            out
            | {name + "_bias": jnp.zeros((b,)) for name, (_, b) in sizes.items()}
            | {"norm": jnp.ones((c,)), "norm_bias": jnp.zeros((c,))}
        )

    def count(self, n: int, n_kind: int) -> int:
        return min(n, self.special + self.capacity)

    def score(self, params, x, free):
        """f32 [b n 2]: log probabilities of keep and drop."""
        p = {name: a.astype(jnp.float32) for name, a in params.items()}
        product = lambda name, y: y @ p[name] + p[name + "_bias"][None, None]
        gelu = lambda y: jax.nn.gelu(y, approximate=False)
        x = jnp.where(free[..., None], x.astype(jnp.float32), 0.0)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["norm"][None, None] + p["norm_bias"][None, None]
        z = gelu(product("in", x))
        half, counted = z.shape[-1] // 2, free.astype(jnp.float32)[..., None]
        mean = jnp.sum(z[..., half:] * counted, 1, keepdims=True) / jnp.maximum(jnp.sum(counted, 1, keepdims=True), 1.0)
        z = jnp.concatenate([z[..., :half], jnp.broadcast_to(mean, (*z.shape[:2], z.shape[-1] - half))], -1)
        return jax.nn.log_softmax(product("out", gelu(product("mid2", gelu(product("mid1", z))))), -1)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        b, n = tokens.pos.shape
        live, free, room = tokens.pos >= 0, movable(tokens), self.count(n, n)
        fixed = live & ~free
        budget = jnp.full((b,), room, jnp.int32) if keep is None else jnp.minimum(keep, room)
        stays = jnp.maximum(budget - jnp.sum(fixed, -1, dtype=jnp.int32), 0)
        return state, pack(choose(self.score(params, tokens.x, free)[..., 0], free, stays) | fixed, room)


def schedule(
    rows: int = 196, ratio: float = 0.7, layers: tuple[int, ...] = (3, 6, 9), special: int = 1
) -> tuple[tuple[int, DynamicViT], ...]:
    """The entries of Recipe.vit: int(rows * ratio^1), int(rows * ratio^2), ... rows before these layers."""
    return tuple((k, DynamicViT(capacity=math.floor(rows * ratio ** (i + 1)), special=special)) for i, k in enumerate(layers))
