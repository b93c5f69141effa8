"""SCOUT. Source: arXiv:2509.00935; ArefJafari/SCOUT, model/scout_swa/{modeling,configuration}_scout_swa.py; arXiv:2405.05254 (retention)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.core import check, select
from jaxtok.core.attention import Attention, Rows
from jaxtok.core.layer import Halves, draw, draw_layer
from jaxtok.core.registry import register
from jaxtok.ops.attention import attention, merge
from jaxtok.ops.banded import banded
from jaxtok.ops.retention import retain, retained, retention
from jaxtok.ops.store import Store, begin, extend, write

MIXER, CHECKPOINTS = 0, 1
CALM = 16.0  # what the gates' logarithms are divided by (arXiv:2405.05254)


class Memory(NamedTuple):
    """The state of the retention mixer."""

    s: jax.Array  # f32 [b g d d]


@register(
    "scout",
    site="attention",
    paper="arXiv:2509.00935",
    title="SCOUT: Toward Sub-Quadratic Attention via Segment Compression for Optimized Utility in Transformers",
    authors="Aref Jafari and Yuhe Fan and Benyamin Jamialahmadi and Parsa Farinneya and Boxing Chen and Marzieh S. Tahaei",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SCOUT(Attention):
    """Mix near tokens, then attend to one token a segment.

        layer: x += mixer(norm x);  x += MLP(norm x);  x += checkpoint attention(norm x);  x += MLP(norm x)
        checkpoint attention: query i sees itself and the checkpoints c < i among segment - 1, 2 segment - 1, ..., at their own positions
        mixer="window": softmax attention, query i sees the keys j with 0 <= i - j < window
        mixer="retention": with y = norm x,   log gamma_t = log sigmoid(y_t W_fade) / 16 [g],   S_t = gamma_t S_(t-1) + k_t v_t^T [g d d],
            out_t = silu(y_t W_swish) * rms(q_t S_t / sqrt(d)), normed by head, without a weight

    A checkpoint is the last token of its segment as the mixer has left it; nothing is pooled and no weight compresses. The second half of
    the layer (checkpoint attention, MLP) has weights of its own, named as a layer's, in `init_params`; the first is the model's layer.

    The released model's mixer is the window. The paper's other one is Mamba, which is not built; in its place stands gated retention
    (ops.retention), YOCO's: q, k (with rotary embedding), v and the output projection are the model's, W_fade [c g] and W_swish [c h*d]
    in `init_params`. Gate and state are one a KV head. `window`, and the model's soft-cap in the mixer, do not count then.

    A layer costs O(n window + n^2 / segment), or O(n (64 + d) + n^2 / segment); a decode step holds `window` keys of the mixer (or one
    state of [d d] a KV head) and a key a segment: a key that is no checkpoint is used once, by its own token. segment = 1 makes the
    checkpoint attention plain causal attention; window >= n, the mixer.

    Defaults of the released configurations (the class's own segment is 50).
    """

    segment: int = 10
    window: int = 1024
    mixer: str = "window"
    times = 2

    def __post_init__(self):
        check.count("segment", self.segment)
        check.count("window", self.window)
        check.one_of("mixer", self.mixer, ("window", "retention"))

    def layer_params(self, key: jax.Array, cfg) -> dict[str, Array]:
        own = draw_layer(cfg, key)
        if self.mixer == "window":
            return own
        wide = {"fade": cfg.kv_heads, "swish": cfg.heads * cfg.head_dim}
        return own | {name: draw(cfg, jax.random.fold_in(key, 100 + i), name, (cfg.width, m)) for i, (name, m) in enumerate(wide.items())}

    def compose(self, own, half: Halves, x: Float[Array, "b n c"], attend: Callable[..., Array]) -> Float[Array, "b n c"]:
        x = half.mlp(half.out(x, self._mixed(own, half, x, attend)))
        more = half.using(own)
        return more.mlp(more.out(x, attend(CHECKPOINTS, *more.qkv(x))))

    def _mixed(self, own, half: Halves, x: Array, attend: Callable[..., Array]) -> Float[Array, "b h n d"]:
        if self.mixer == "window":
            return attend(MIXER, *half.qkv(x))
        y = half.normed(x)
        fade = jax.nn.log_sigmoid((y @ own["fade"].astype(y.dtype)).astype(jnp.float32)) / CALM
        out = attend(MIXER, *half.qkv(x), jnp.swapaxes(fade, 1, 2))
        out = out * jax.lax.rsqrt(jnp.mean(out * out, -1, keepdims=True) + 1e-6)
        swish = jax.nn.silu(y @ own["swish"].astype(y.dtype)).astype(jnp.float32)
        return (out * jnp.swapaxes(swish.reshape(*y.shape[:2], out.shape[1], -1), 1, 2)).astype(x.dtype)

    def attend(self, j: int, q, k, v, rows: Rows, fade=None) -> Float[Array, "b h n d"]:
        n, s, see = q.shape[2], self.segment, rows.see
        if j == MIXER and self.mixer == "retention":
            return retention(q, *_living(k, v, fade, rows), scale=see.scale)
        if j == MIXER:
            first = np.maximum(0, np.arange(n) - self.window + 1)
            return banded(q, k, v, first, softcap=see.softcap, scale=see.scale, impl=see.impl)[0].astype(q.dtype)
        pos = jnp.asarray(np.arange(s - 1, n, s) + 1, jnp.int32)[None]  # later tokens see it: the token itself is there already
        return self._read(q, k, v, k[:, :, s - 1 :: s], v[:, :, s - 1 :: s], jnp.broadcast_to(pos, (q.shape[0], pos.shape[1])), rows)

    def start(self, j: int, q, k, v, rows: Rows, slots: int, fade=None) -> Store | Memory:
        if j == MIXER and self.mixer == "retention":
            return Memory(retained(*_living(k, v, fade, rows)))
        n, s, count = k.shape[2], self.segment, rows.count
        if j == MIXER:
            return begin(k, v, count, max(1, min(self.window, slots)))
        state = begin(k[:, :, s - 1 :: s], v[:, :, s - 1 :: s], jnp.minimum(count, n) // s, max(1, slots // s))
        return state._replace(pos=jnp.where(state.pos < 0, -1, (state.pos + 1) * s))

    def step(self, j: int, state, q, k, v, rows: Rows, fade=None) -> tuple[Float[Array, "b h 1 d"], Store | Memory]:
        s, see, pos = self.segment, rows.see, rows.pos[:, 0]
        if j == MIXER and self.mixer == "retention":
            out, new = retain(state.s, q, *_living(k, v, fade, rows), scale=see.scale)
            return out, Memory(new)
        if j == MIXER:
            state = extend(state, k, v, pos)
            out, _ = attention(q, state.k, state.v, q_pos=rows.pos, k_pos=state.pos, softcap=see.softcap, scale=see.scale, impl=see.impl)
            return out, state
        out = self._read(q, k, v, state.k, state.v, state.pos, rows)
        return out, write(state, k, v, jnp.where((pos >= 0) & ((pos + 1) % s == 0), pos // s, -1), pos + 1)

    def _read(self, q, k, v, keys, values, k_pos, rows: Rows) -> Float[Array, "b h n d"]:
        """Attention of each row to itself and to those of `keys` whose k_pos is at most its own."""
        (b, h, n, d), e, see = q.shape, k.shape[1], rows.see
        y = jnp.einsum("bernd,bend->bern", q.reshape(b, e, h // e, n, d), k, preferred_element_type=jnp.float32).reshape(b, h, n)
        y = y * (d**-0.5 if see.scale is None else see.scale)
        y = y if see.softcap is None else see.softcap * jnp.tanh(y / see.softcap)
        y = select.finite(y)
        far, lse = attention(
            q, keys, values, q_pos=rows.pos, k_pos=k_pos, softcap=see.softcap, scale=see.scale, out_dtype=jnp.float32, impl=see.impl
        )
        return merge(jnp.repeat(v, h // e, 1).astype(jnp.float32), y, far, lse)[0].astype(q.dtype)


def _living(k, v, fade, rows: Rows) -> tuple[Array, Array, Array]:
    """Keys, values and gates (None: nothing fades); a dead row's leave a state as it is."""
    if k.ndim != 4 or v.ndim != 4 or rows.pos.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"k, v, pos are {[list(x.shape) for x in (k, v, rows.pos)]}; they must be [b g n d], [b g n d], [b n]")
    live = (rows.pos >= 0)[:, None]
    fade = jnp.zeros(k.shape[:3], jnp.float32) if fade is None else jnp.where(live, fade, 0.0)
    return jnp.where(live[..., None], k, jnp.zeros((), k.dtype)), v, fade
