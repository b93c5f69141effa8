"""The decoder with a trained attention (site attention): prefill and steps. The method keeps the keys, `Part.attention` holds its states.

The `kv` of a part has keys of no channels: it counts the slots, says which tokens were seen, and what found no room.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.core.attention import Rows
from jaxtok.core.protocols import Held
from jaxtok.core.reader import Sight
from jaxtok.core.recipe import Recipe
from jaxtok.core.rotary import rotate_by
from jaxtok.core.types import KV, SPECIAL, Part, Tokens
from jaxtok.models import blocks
from jaxtok.models.config import Config
from jaxtok.ops.attention import Impl, Shared
from jaxtok.ops.cache import append

Layers = tuple[tuple[Part, ...], ...]


def prefill(
    cfg: Config, params, tokens: Tokens, recipe: Recipe, *, new: int, layers: Layers | None, proportional: bool, impl: Impl
) -> tuple[Tokens, Layers]:
    """`decoder.prefill` with a trained attention. A call that continues runs its rows one after another."""
    method, own = recipe.attention, _weights(cfg, params, recipe)
    if proportional:
        raise ValueError(f"{method.name} knows no sizes of tokens; leave out proportional=")  # type: ignore[union-attr]
    _one_device(recipe, impl)
    live, mark = tokens.pos >= 0, (tokens.kind == SPECIAL) & (method.token is not None)  # type: ignore[union-attr]
    if layers is not None:
        x, layers = _rows(cfg, params, tokens.x, live, mark, grown(layers, tokens.pos.shape[1] + new), recipe, impl)
        return tokens._replace(x=x), layers
    order = blocks.front(live)
    back = jnp.argsort(order, axis=1)
    put = lambda x, order: jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)
    x, rope, (b, n) = put(tokens.x, order), put(tokens.rope, order), live.shape
    kv, out = _slots(cfg, params, b, n + new, tokens), []
    rows = _rows_of(cfg, blocks.positions(put(live, order)), jnp.sum(live, -1, dtype=jnp.int32), put(mark, order), impl)
    for i, p in enumerate(params["layers"]):
        states = {}
        turn = lambda y, i=i: rotate_by(y, rope, blocks.frequencies(cfg, i))

        def attend(j, q, k, v, *more, states=states):
            states[j] = method.start(j, q, k, v, rows, n + new, *more)  # type: ignore[union-attr]
            return method.attend(j, q, k, v, rows, *more)  # type: ignore[union-attr]

        x = method.compose(own[i], blocks.halves(cfg, p, turn), x, attend)  # type: ignore[union-attr]
        out.append((Part(kv, Held(), attention=tuple(states[j] for j in range(method.times))),))  # type: ignore[union-attr]
    return tokens._replace(x=put(x, back)), tuple(out)


def step(
    cfg: Config, params, x: Float[Array, "b t c"], live: Bool[Array, "b t"], layers: Layers, recipe: Recipe, ids, impl: Impl
) -> tuple[Float[Array, "b t c"], Layers]:
    """`decoder.step` with a trained attention, row by row."""
    token = recipe.attention.token  # type: ignore[union-attr]
    if token is not None and ids is None:
        raise ValueError(f"{recipe.attention.name} must know which rows are its tokens; give decoder.step ids=")  # type: ignore[union-attr]
    _one_device(recipe, impl)
    return _rows(cfg, params, x, live, jnp.zeros(live.shape, bool) if token is None else ids == token, layers, recipe, impl)


def empty(cfg: Config, params, b: int, slots: int, recipe: Recipe) -> Layers:
    """Caches of a trained attention for b sequences that have not begun, with room for `slots` tokens."""
    method, dtype = recipe.attention, params["embed"].dtype
    none = lambda e: jnp.zeros((b, e, 0, cfg.head_dim), dtype)
    rows = _rows_of(cfg, jnp.zeros((b, 0), jnp.int32), jnp.zeros((b,), jnp.int32), jnp.zeros((b, 0), bool), "auto")
    start = lambda j: method.start(j, none(cfg.heads), none(cfg.kv_heads), none(cfg.kv_heads), rows, slots)  # type: ignore[union-attr]
    state = lambda: tuple(start(j) for j in range(method.times))  # type: ignore[union-attr]
    return tuple((Part(_slots(cfg, params, b, slots, None), Held(), attention=state()),) for _ in range(cfg.layers))


def grown(layers: Layers, more: int) -> Layers:
    """The caches, or ValueError: states of a trained attention have the room that the first prefill gave them."""
    have = layers[0][0].kv.pos.shape[-1]
    if more > have:
        raise ValueError(f"{more} more tokens do not fit into caches of {have} slots; give the first prefill more room (new=)")
    return layers


def _weights(cfg: Config, params, recipe: Recipe):
    own = params.get("methods", {}).get("attention")
    if own is None or len(own) != cfg.layers:
        raise ValueError(f"params['methods']['attention'] must have {cfg.layers} entries; recipe.init_params makes them")
    return own


def _one_device(recipe: Recipe, impl: Impl) -> None:
    if isinstance(impl, Shared):
        raise ValueError(f"{recipe.attention.name} runs on one device; leave out impl=, or shard the batch")  # type: ignore[union-attr]


def _rows_of(cfg: Config, pos, count, mark, impl) -> Rows:
    return Rows(pos, count, mark, Sight(jnp.asarray(blocks.frequencies(cfg, 0)), None, cfg.softcap, cfg.scale, impl))


def _slots(cfg: Config, params, b: int, slots: int, tokens: Tokens | None) -> KV:
    """A cache of keys without channels, with the rows of `tokens` in it."""
    g, dtype, n = cfg.kv_heads, params["embed"].dtype, 0 if tokens is None else tokens.pos.shape[1]
    zero = jnp.zeros((b,), jnp.int32)
    pos = jnp.full((b, slots), -1, jnp.int32) if tokens is None else jnp.pad(tokens.pos, ((0, 0), (0, slots - n)), constant_values=-1)
    return KV(
        k=jnp.zeros((b, g, slots, 0), dtype),
        v=jnp.zeros((b, g, slots, 0), dtype),
        pos=jnp.broadcast_to(pos[:, None], (b, g, slots)),
        bias=jnp.zeros((b, g, slots), jnp.float32),
        seen=zero if tokens is None else tokens.seen,
        delta=zero if tokens is None else tokens.delta,
        cursor=jnp.full((), n, jnp.int32),
        lost=jnp.broadcast_to((zero if tokens is None else tokens.lost)[:, None], (b, g)),
    )


def _rows(cfg: Config, params, x, live, mark, layers: Layers, recipe: Recipe, impl: Impl) -> tuple[Array, Layers]:
    if x.shape[1] == 1:
        return _row(cfg, params, x, live, mark, layers, recipe, impl)

    def one(layers, row):
        y, live, mark = (a[:, None] for a in row)
        y, layers = _row(cfg, params, y, live, mark, layers, recipe, impl)
        return layers, y[:, 0]

    layers, out = jax.lax.scan(one, layers, (jnp.swapaxes(x, 0, 1), live.T, mark.T))
    return jnp.swapaxes(out, 0, 1), layers


def _row(cfg: Config, params, x, live, mark, layers: Layers, recipe: Recipe, impl: Impl) -> tuple[Array, Layers]:
    method, own, out = recipe.attention, _weights(cfg, params, recipe), []
    for i, (p, (part,)) in enumerate(zip(params["layers"], layers, strict=True)):
        kv, (b, g, slots) = part.kv, part.kv.pos.shape
        order = jnp.sum(kv.pos[:, 0] >= 0, -1, dtype=jnp.int32)[:, None]
        known = live & (kv.cursor < slots)
        count = order[:, 0] + known[:, 0].astype(jnp.int32)
        rows = _rows_of(cfg, jnp.where(known, order, -1), count, mark & known, impl)
        pos = jnp.where(live, kv.seen[:, None], -1)
        rope = jnp.maximum(pos, 0) + kv.delta[:, None]
        turn = lambda y, i=i, rope=rope: rotate_by(y, rope, blocks.frequencies(cfg, i))
        states = dict(enumerate(part.attention))

        def attend(j, q, k, v, *more, states=states, rows=rows):
            o, states[j] = method.step(j, states[j], q, k, v, rows, *more)  # type: ignore[union-attr]
            return o

        x = method.compose(own[i], blocks.halves(cfg, p, turn), x, attend)  # type: ignore[union-attr]
        none = jnp.zeros((b, g, 1, 0), kv.k.dtype)
        kv = append(kv, none, none, pos, jnp.zeros((b, g, 1), jnp.float32))
        kv = kv._replace(seen=kv.seen + live[:, 0].astype(jnp.int32))
        out.append((part._replace(kv=kv, attention=tuple(states[j] for j in range(method.times))),))  # type: ignore[union-attr]
    return x, tuple(out)
