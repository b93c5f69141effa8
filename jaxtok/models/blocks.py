"""The parts of a decoder as pure functions of (cfg, parameters, arrays), and the parallel pass without a cache.

Parameters are one plain nested dict (weights are [in, out], y = x @ w; c, h, g, d, f, l as in `Config`):

    {"embed": [vocab c], "norm": [c], "head": [c vocab] (absent when cfg.tied),
     "layers": a tuple of l dicts, or one dict whose arrays have a leading l axis (see `stack`)}

    a layer: attn_norm [c], q [c h*d], k [c g*d], v [c g*d], o [h*d c], mlp_norm [c], gate [c f], up [c f], down [f c]
             qkv_bias: q_bias [h*d], k_bias [g*d], v_bias [g*d];  qk_norm: q_norm [d], k_norm [d];
             sandwich: attn_post_norm [c], mlp_post_norm [c]

The tuple is for inference (unrolled), the stacked dict for training (scanned). Activations have the parameters' dtype;
norms, rotations and logits are computed in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.attention import Attention, Rows
from jaxtok.core.layer import Halves, draw, layer_shapes
from jaxtok.core.reader import Sight
from jaxtok.core.recipe import Recipe
from jaxtok.core.rotary import rotate_by
from jaxtok.models.config import Config
from jaxtok.ops.attention import Impl, Shared, attention

Params = dict[str, Any]

_NO_WINDOW = 2**30  # a traced window no distance reaches; the scan needs one dtype for local and global layers


def norm(x: Float[Array, "*b c"], w: Float[Array, " c"], eps: float, offset: float = 0.0) -> Float[Array, "*b c"]:
    """RMS norm over the last axis, x / rms(x) * (w + offset): float32 inside, x's dtype outside."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (w.astype(jnp.float32) + offset).reshape((1,) * (x.ndim - 1) + w.shape)).astype(x.dtype)


# --- rotary positions -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def frequencies(cfg: Config, layer: int) -> np.ndarray:
    """Radians a position of 0-based `layer`, f32 [r/2] with r = rotary_dim: theta**(-2i/r), scaled as cfg.rope_scaling says."""
    r = cfg.head_dim if cfg.rotary_dim is None else cfg.rotary_dim
    freq = cfg.layer_theta(layer) ** (-np.arange(0, r, 2, dtype=np.float64) / r)
    # Gemma3's local layers keep their own unscaled base; Mistral's have no base of their own
    s = None if cfg.layer_window(layer) and cfg.rope_theta_local is not None else cfg.rope_scaling
    if s is not None and s.kind == "linear":
        freq = freq / s.factor
    elif s is not None:  # llama3: long wavelengths are interpolated, short ones kept, a linear ramp between
        turns = s.original_context * freq / (2 * math.pi)
        smooth = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        freq = (1 - smooth) * freq / s.factor + smooth * freq
    out = freq.astype(np.float32)
    out.flags.writeable = False  # it is cached: nobody may change it
    return out


def rotate(
    cfg: Config, layer: int, x: Float[Array, "b e n d"], ids: Int[Array, "*i"], axes: Sequence[int] | None = None
) -> Float[Array, "b e n d"]:
    """`rotate_by` with the frequencies of 0-based `layer` (Gemma3's local layers have their own base)."""
    return rotate_by(x, ids, frequencies(cfg, layer), axes)


def axes(cfg: Config, rope: Int[Array, "b n a"]) -> tuple[int, ...] | None:
    """Which rotary id each frequency follows; rows of text alone have one id for all of them."""
    if rope.shape[-1] not in (1, 3 if cfg.mrope else 1):
        raise ValueError(f"tokens have {rope.shape[-1]} rotary ids a row; a model with mrope={cfg.mrope} takes {3 if cfg.mrope else 1}")
    return cfg.axes if rope.shape[-1] > 1 else None


# --- the halves of a layer --------------------------------------------------------------------------------------------


def _linear(p: Params, name: str, x: Array) -> Array:
    y = x @ p[name]
    return y + p[name + "_bias"][None, None] if name + "_bias" in p else y


def normed(cfg: Config, p: Params, x: Float[Array, "b n c"], name: str = "attn_norm") -> Float[Array, "b n c"]:
    """What queries, keys and values of a layer are made of: the residual stream x after the layer's first norm (or its "mlp_norm")."""
    return norm(x, p[name], cfg.norm_eps, cfg.norm_offset)


def qkv(
    cfg: Config, p: Params, x: Float[Array, "b n c"]
) -> tuple[Float[Array, "b h n d"], Float[Array, "b g n d"], Float[Array, "b g n d"]]:
    """Queries, keys and values of a layer from the residual stream x: norm, projections with biases, q/k norms; NOT rotated."""
    b, n, _ = x.shape
    y = normed(cfg, p, x)
    q, k, v = (_linear(p, name, y).reshape(b, n, -1, cfg.head_dim).transpose(0, 2, 1, 3) for name in "qkv")
    if cfg.qk_norm:
        q, k = norm(q, p["q_norm"], cfg.norm_eps, cfg.norm_offset), norm(k, p["k_norm"], cfg.norm_eps, cfg.norm_offset)
    return q, k, v


def out_proj(cfg: Config, p: Params, x: Float[Array, "b n c"], o: Float[Array, "b h n d"]) -> Float[Array, "b n c"]:
    """x + the output projection of the attended values o (normed after, with cfg.sandwich)."""
    b, _, n, _ = o.shape
    y = o.transpose(0, 2, 1, 3).reshape(b, n, -1) @ p["o"]
    return x + (norm(y, p["attn_post_norm"], cfg.norm_eps, cfg.norm_offset) if cfg.sandwich else y)


def channels(cfg: Config, p: Params, y: Float[Array, "b n c"], which: slice = slice(None)) -> Float[Array, "b n c"]:
    """down(act(gate(y)) * up(y)) of normed rows y by some of the hidden channels; those of all channels add up to the MLP's."""
    gate = y @ p["gate"][:, which]
    gate = jax.nn.silu(gate) if cfg.act == "silu" else jax.nn.gelu(gate, approximate=True)
    return (gate * (y @ p["up"][:, which])) @ p["down"][which]


def mlp(cfg: Config, p: Params, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """x + down(act(gate(y)) * up(y)), y = norm(x) (normed after, with cfg.sandwich)."""
    return after_mlp(cfg, p, x, channels(cfg, p, normed(cfg, p, x, "mlp_norm")))


def after_mlp(cfg: Config, p: Params, x: Float[Array, "b n c"], y: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """x + what the channels of the MLP make of it (normed, with cfg.sandwich)."""
    return x + (norm(y, p["mlp_post_norm"], cfg.norm_eps, cfg.norm_offset) if cfg.sandwich else y)


# --- the ends ---------------------------------------------------------------------------------------------------------


def embed(cfg: Config, params: Params, ids: Int[Array | np.ndarray, "b n"]) -> Float[Array, "b n c"]:
    """Token embeddings times embed_scale (rounded to their dtype, as Gemma does). Ids of dead rows may be anything in range."""
    x = params["embed"][ids]
    return x if cfg.embed_scale == 1.0 else x * jnp.asarray(cfg.embed_scale, x.dtype)


def mean_embedding(cfg: Config, params: Params, ids: Int[Array, "b n"], among: Bool[Array, "b n"]) -> Float[Array, "b c"]:
    """The mean of the embeddings of the ids of `among`, float32; 0 where there are none."""
    weight = among.astype(jnp.float32)
    total = jnp.einsum("bnc,bn->bc", embed(cfg, params, ids).astype(jnp.float32), weight)
    return total / jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1.0)


def logits(cfg: Config, params: Params, x: Float[Array, "b n c"]) -> Float[Array, "b n vocab"]:
    """Final norm, output head (the embedding when tied), soft-cap: float32 logits of the next token. Slice x first to save work."""
    y = norm(x, params["norm"], cfg.norm_eps, cfg.norm_offset)
    if cfg.tied:
        z = jnp.einsum("bnc,vc->bnv", y, params["embed"], preferred_element_type=jnp.float32)
    else:
        z = jnp.matmul(y, params["head"], preferred_element_type=jnp.float32)
    return z if cfg.logit_softcap is None else cfg.logit_softcap * jnp.tanh(z / cfg.logit_softcap)


# --- whole parameters -------------------------------------------------------------------------------------------------


def shapes(cfg: Config) -> Params:
    """The tree of shapes of `params` (layers as a tuple): what `init` makes and `load` demands."""
    out: Params = {"embed": (cfg.vocab, cfg.width), "layers": tuple(layer_shapes(cfg) for _ in range(cfg.layers)), "norm": (cfg.width,)}
    return out if cfg.tied else out | {"head": (cfg.width, cfg.vocab)}


def is_shape(node: Any) -> bool:
    """Whether a node of `shapes` is a shape and not the tuple of layers."""
    return isinstance(node, tuple) and all(isinstance(i, int) for i in node)


def init(cfg: Config, key: Array, dtype: Any = jnp.float32, *, embed_std: float | None = None) -> Params:
    """Random parameters, layers as a tuple: matrices N(0, 1/in), those that write the residual stream (o, down) divided by
    sqrt(2 l), norms 1, biases 0, embeddings N(0, embed_std**2) with embed_std = c**-0.5 (logits of order one when tied).
    """

    std = cfg.width**-0.5 if embed_std is None else embed_std

    def one(key, name, shape):
        if name == "embed":
            return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        return draw(cfg, key, name, shape, dtype)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(cfg), is_leaf=is_shape)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([one(k, path[-1].key, shape) for k, (path, shape) in zip(keys, leaves, strict=True)])


def stack(params: Params) -> Params:
    """Layers as ONE dict with a leading l axis (what training scans); already stacked parameters come back as they are."""
    if isinstance(params["layers"], dict):
        return params
    return params | {"layers": jax.tree.map(lambda *a: jnp.stack(a), *params["layers"])}


def unstack(params: Params) -> Params:
    """Layers as a tuple (what inference unrolls): the inverse of `stack`."""
    layers = params["layers"]
    if not isinstance(layers, dict):
        return params
    n = next(iter(layers.values())).shape[0]
    return params | {"layers": tuple({name: a[i] for name, a in layers.items()} for i in range(n))}


def reorder_heads(cfg: Config, params: Params, order: Sequence[Sequence[int]]) -> Params:
    """The same model with the KV heads of each layer, each with its query heads, in the order [l g] (a permutation for each layer).

    Every output stays the same; the caches' head axis follows the order, so that the head groups of `Recipe.heads` can be any heads
    (`core.heads.split` makes both). Nothing is undone later: do it once, after loading.
    """
    table = np.asarray(order)
    right = np.arange(cfg.kv_heads)[None]
    if table.shape != (cfg.layers, cfg.kv_heads) or not (np.sort(table, 1) == right).all():
        raise ValueError(f"order must have for each of {cfg.layers} layers the numbers 0 to {cfg.kv_heads - 1} once, got {order!r}")
    if (table == right).all():
        return params
    stacked = isinstance(params["layers"], dict)
    layers = unstack(params)["layers"]
    if len(layers) != cfg.layers:
        raise ValueError(f"params have {len(layers)} layers, cfg says {cfg.layers}")
    wide = cfg.heads // cfg.kv_heads * cfg.head_dim

    def moved(name: str, w: Array, row: np.ndarray) -> Array:
        axis, size = {"q": (-1, wide), "k": (-1, cfg.head_dim), "v": (-1, cfg.head_dim), "o": (0, wide)}[name.removesuffix("_bias")]
        at = (row[:, None] * size + np.arange(size)).reshape(-1)
        return jnp.take(w, at, axis)

    heads = {name + end for name in "qkv" for end in ("", "_bias")} | {"o"}
    out = tuple({name: moved(name, w, row) if name in heads else w for name, w in p.items()} for p, row in zip(layers, table, strict=True))
    new = params | {"layers": out}
    return stack(new) if stacked else new


# --- the parallel pass ------------------------------------------------------------------------------------------------


def positions(live: Bool[Array | np.ndarray, "b n"]) -> Int[Array, "b n"]:
    """Order of each live row among the live ones, -1 for dead rows: padding may stand left, right or between."""
    return jnp.where(live, jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1, -1)


def _layer(cfg: Config, p: Params, x: Array, pos: Array, freq: Any, window: Any, impl: Impl) -> Array:
    q, k, v = qkv(cfg, p, x)
    q, k = rotate_by(q, pos, freq), rotate_by(k, pos, freq)
    out, _ = attention(q, k, v, q_pos=pos, k_pos=pos, window=window, softcap=cfg.softcap, scale=cfg.scale, diagonal=0, impl=impl)
    return mlp(cfg, p, out_proj(cfg, p, x, out))


def halves(cfg: Config, p: Params, turn: Callable[[Array], Array]) -> Halves:
    """A layer's halves with the weights `p`, for a method of site attention; turn(x [b e n d]) is the rows' rotary embedding.

    Weights that the method brings (`using`) are taken in the model's dtype."""

    def rows(x):
        q, k, v = qkv(cfg, p, x)
        return turn(q), turn(k), v

    of = lambda f: functools.partial(f, cfg, p)
    using = lambda own: halves(cfg, {name: w.astype(p["q"].dtype) for name, w in own.items()}, turn)
    return Halves(of(normed), rows, of(out_proj), of(mlp), using)


def front(live: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """The order of rows that puts the live ones first; the inverse is its argsort."""
    return jnp.argsort(~live, axis=1, stable=True).astype(jnp.int32)


def _attended(cfg: Config, params: Params, ids, live, method: Attention, remat: bool, impl: Impl) -> Array:
    """`hidden` with a method of site attention, rows in order in between."""
    Recipe(attention=method).validate(cfg)
    if isinstance(impl, Shared):
        raise ValueError(f"{method.name} runs on one device; leave out impl=, or shard the batch")
    own = params.get("methods", {}).get("attention")
    if own is None or len(own) != cfg.layers:
        raise ValueError(f"params['methods']['attention'] must have {cfg.layers} entries; Recipe(attention=...).init_params makes them")
    ids, order = jnp.asarray(ids), None if live is None else front(jnp.asarray(live))
    live = jnp.ones(ids.shape, bool) if live is None else jnp.asarray(live)
    put = lambda x, order: x if order is None else jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)
    ids, live = put(ids, order), put(live, order)
    pos = positions(live)
    mark = jnp.zeros(ids.shape, bool) if method.token is None else live & (ids == method.token)
    count, x = jnp.sum(live, -1, dtype=jnp.int32), embed(cfg, params, ids)
    stacked = isinstance(params["layers"], dict)
    freqs = [frequencies(cfg, i) for i in range(cfg.layers)]  # all layers are global: all the same

    def one(p, own, x):
        rows = Rows(pos, count, mark, Sight(jnp.asarray(freqs[0]), None, cfg.softcap, cfg.scale, impl))
        turn = lambda y: rotate_by(y, jnp.maximum(pos, 0), freqs[0])
        return method.compose(own, halves(cfg, p, turn), x, lambda j, q, k, v, *more: method.attend(j, q, k, v, rows, *more))

    if stacked:
        body = lambda x, s: (one(s[0], s[1], x), None)
        xs = (params["layers"], jax.tree.map(lambda *a: jnp.stack(a), *own))
        x = jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x, xs)[0]
    else:
        for p, mine in zip(params["layers"], own, strict=True):
            x = (jax.checkpoint(one) if remat else one)(p, mine, x)
    return put(x, None if order is None else jnp.argsort(order, axis=1))


def hidden(
    cfg: Config,
    params: Params,
    ids: Int[Array | np.ndarray, "b n"],
    live: Bool[Array | np.ndarray, "b n"] | None = None,
    *,
    method: Attention | None = None,
    remat: bool = True,
    impl: Impl = "auto",
) -> Float[Array, "b n c"]:
    """The residual stream after the last layer (before the final norm) of the causal pass over whole sequences, without a cache.

    live marks the real tokens (None = all); padding may stand left or right, positions count live rows only. Rows that are
    dead come out finite and meaningless. Stacked layers are scanned, a tuple is unrolled; remat recomputes each layer's
    inside in the backward pass, so that memory is one residual stream a layer. impl: as in `ops.attention`; over several devices
    (`parallel.Spread`) windows must be the same in all layers or the layers a tuple.
    method: a trained attention (site attention), with its weights in params["methods"]["attention"].
    """
    if live is not None and live.shape != ids.shape:
        raise ValueError(f"live {live.shape} must have the shape of ids {ids.shape}")
    if method is not None:
        return _attended(cfg, params, ids, live, method, remat, impl)
    pos = positions(jnp.ones(ids.shape, bool) if live is None else live)
    x = embed(cfg, params, ids)
    if isinstance(impl, Shared):
        x, pos = impl.hold(impl.place(x), "data", "sequence", None), impl.hold(impl.place(pos), "data", "sequence")
        back = lambda x: impl.hold(impl.restore(x), "data", "sequence", None)
    else:
        back = lambda x: x
    run = functools.partial(_layer, cfg, impl=impl.laid() if isinstance(impl, Shared) else impl)
    layers = params["layers"]
    freqs = [frequencies(cfg, i) for i in range(cfg.layers)]
    windows = [cfg.layer_window(i) for i in range(cfg.layers)]
    if not isinstance(layers, dict):
        if len(layers) != cfg.layers:
            raise ValueError(f"params have {len(layers)} layers, cfg says {cfg.layers}")
        for p, freq, window in zip(layers, freqs, windows, strict=True):
            # window is static here: attention may skip blocks by it
            f = lambda p, x, pos, freq=freq, window=window: run(p, x, pos, freq, window)
            x = (jax.checkpoint(f) if remat else f)(p, x, pos)
        return back(x)
    if len(set(windows)) == 1 and len({f.tobytes() for f in freqs}) == 1:
        body = lambda x, p: (run(p, x, pos, freqs[0], windows[0]), None)
        xs = layers
    else:
        body = lambda x, s: (run(s[0], x, pos, s[1], s[2]), None)
        table = [_NO_WINDOW if w is None else w for w in windows]
        xs = (layers, jnp.asarray(np.stack(freqs)), jnp.asarray(table, jnp.int32))
    # prevent_cse is needed outside a scan only
    return back(jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x, xs)[0])


def forward(
    cfg: Config,
    params: Params,
    ids: Int[Array | np.ndarray, "b n"],
    live: Bool[Array | np.ndarray, "b n"] | None = None,
    *,
    method: Attention | None = None,
    remat: bool = True,
    impl: Impl = "auto",
) -> Float[Array, "b n vocab"]:
    """Logits f32 of the next token at every row: `logits` of `hidden`."""
    return logits(cfg, params, hidden(cfg, params, ids, live, method=method, remat=remat, impl=impl))
