"""Next-token training of a decoder, plain or with a trained attention, and the tokens that such attentions want in the text."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxtok.core import check
from jaxtok.core.attention import Attention
from jaxtok.models import blocks
from jaxtok.models.config import Config

Batch = dict[str, Array]


def make_loss(cfg: Config, method: Attention | None = None, *, remat: bool = True, impl: Any = "auto") -> Callable:
    """loss(params, batch, key) -> (NLL a target, {"accuracy"}), for `train.fit`.

    batch: "ids" i32 [b n], "target" i32 [b n] (-1 = the row predicts nothing) and, where rows are padded, "live" bool [b n].
    The weights of `method` stand in params["methods"]["attention"] (`Recipe(attention=method).init_params`).
    """

    def loss(params, batch: Batch, key):
        del key
        z = blocks.forward(cfg, params, batch["ids"], batch.get("live"), method=method, remat=remat, impl=impl)
        target = batch["target"]
        asked = (target >= 0).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(asked), 1.0)
        nll = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(target, 0))
        right = (jnp.argmax(z, -1).astype(jnp.int32) == target).astype(jnp.float32)
        return jnp.sum(nll * asked) / count, {"accuracy": jnp.sum(right * asked) / count}

    return loss


def text(ids: Int[Array, "b n"]) -> Batch:
    """A batch in which every row predicts the next id."""
    return {"ids": ids, "target": jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)}


def insert_landmarks(batch: Batch, token: int, block: int, *, predict: bool = True) -> Batch:
    """The batch with a landmark after every block - 1 tokens, [b n + n // (block - 1)].

    A token before a landmark predicts the landmark (predict=False: nothing, as the official LLaMA configuration's
    include_landmark_in_loss = False), and the landmark predicts what that token did.
    """
    check.count("block", block, 2)
    ids, size = batch["ids"], block - 1
    b, n = ids.shape
    whole = n // size

    def put(x, fill):
        head = x[:, : whole * size].reshape(b, whole, size)
        head = jnp.concatenate([head, jnp.broadcast_to(jnp.asarray(fill, x.dtype), (b, whole, 1))], -1)
        return jnp.concatenate([head.reshape(b, whole * block), x[:, whole * size :]], 1)

    out = {"ids": put(ids, token), "target": put(batch["target"], -1)}
    mark = jnp.asarray([i % block == block - 1 and i < whole * block for i in range(n + whole)])[None]
    before = jnp.roll(mark, -1, 1).at[:, -1].set(False)
    moved = jnp.where(mark, jnp.roll(out["target"], 1, 1), out["target"])
    return out | {"target": jnp.where(before, token if predict else -1, moved)} | _live(batch, put)


def insert_meta(batch: Batch, token: int, key: jax.Array, *, ratio: float = 0.1) -> Batch:
    """The batch with round(ratio n) meta-tokens at places drawn uniformly for each sequence, [b n + round(ratio n)].

    They predict nothing, and a token predicts the next token of the text even where a meta-token stands between (our reading of "meta-tokens
    are no targets"): a text of n tokens has n - 1 targets.
    """
    check.share("ratio", ratio)
    ids = batch["ids"]
    b, n = ids.shape
    more = int(ratio * n + 0.5)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, (b, n + more)), 1), 1)
    meta = rank < more
    at = jnp.maximum(jnp.cumsum(~meta, 1, dtype=jnp.int32) - 1, 0)
    put = lambda x, fill: jnp.where(meta, jnp.asarray(fill, x.dtype), jnp.take_along_axis(x, at, 1))
    return {"ids": put(ids, token), "target": put(batch["target"], -1)} | _live(batch, put)


def _live(batch: Batch, put: Callable) -> Batch:
    return {"live": put(batch["live"], True)} if "live" in batch else {}


def look_back(cfg: Config, params: Any, strength: float = 3.0) -> Any:
    """The stacked parameters with biases by which the first layer's first head begins by looking at the row before.

        q_bias, k_bias: the logit of a key t rows back is proportional to strength^2 sum_i w_i cos(f_i (t - 1)), f_i the fastest frequencies

    A start, not a constraint: they are trained like all others. Recall needs such a head (a value must know its key), and finding one
    takes most of a short training. strength: of the biases, against queries and keys of about 1 a channel. Needs cfg.qkv_bias.
    """
    if not cfg.qkv_bias or not isinstance(params["layers"], dict):
        raise ValueError(f"look_back needs qkv_bias=True and stacked layers (`blocks.stack`), got qkv_bias={cfg.qkv_bias}")
    freq = blocks.frequencies(cfg, 0)
    n, d = min(5, len(freq)), cfg.head_dim
    size = strength * np.sqrt(d * np.array([0.3, 0.25, 0.2, 0.15, 0.1])[:n])
    q, k = np.zeros(d, np.float32), np.zeros(d, np.float32)
    k[:n], q[:n], q[len(freq) : len(freq) + n] = size, size * np.cos(freq[:n]), -size * np.sin(freq[:n])
    layers = params["layers"]
    put = lambda name, x: layers[name].at[0, :d].set(x.astype(layers[name].dtype))
    return params | {"layers": layers | {"q_bias": put("q_bias", q), "k_bias": put("k_bias", k)}}


def recall(key: jax.Array, b: int, n: int, *, pairs: int = 16, asked: int = 4, keys: int = 64, values: int = 64) -> Batch:
    """Associative recall: `pairs` of key and value at random places of n rows of filler, then `asked` of the keys, whose values are the targets.

    Ids: keys 0 to keys - 1 (those of a sequence differ), values after them, filler keys + values. The last 2 asked rows hold the questions,
    each followed by its answer; only a question's row has a target. No key is asked again before all are (asked > pairs: in a new order).
    """
    for name, value in (("b", b), ("pairs", pairs), ("asked", asked), ("values", values)):
        check.count(name, value)
    check.count("keys", keys, pairs)
    check.count("n", n, 2 * pairs + 2 * asked)
    room = (n - 2 * asked) // 2

    def one(key):
        a, c, d, e = jax.random.split(key, 4)
        names = jax.random.permutation(a, keys)[:pairs].astype(jnp.int32)
        held = keys + jax.random.randint(c, (pairs,), 0, values, jnp.int32)
        place = 2 * jax.random.permutation(d, room)[:pairs]
        who = jnp.concatenate([jax.random.permutation(key, pairs) for key in jax.random.split(e, -(-asked // pairs))])[:asked]
        ids = jnp.full((n,), keys + values, jnp.int32).at[place].set(names).at[place + 1].set(held)
        questions = n - 2 * asked + 2 * jnp.arange(asked)
        ids = ids.at[questions].set(names[who]).at[questions + 1].set(held[who])
        return ids, jnp.full((n,), -1, jnp.int32).at[questions].set(held[who])

    ids, target = jax.vmap(one)(jax.random.split(key, b))
    return {"ids": ids, "target": target}
