"""CompressKV's two calibrations of a model: which heads retrieve, and how much each layer loses. Source: arXiv:2508.02401.

found = calibrate_heads(cfg, params, ids, live, needle, new=32)                 # add several batches up
params = params | {"methods": {"cache": {"heads": found.heads}}}
errors = calibrate_layers(cfg, params, ids, live, answers, CompressKV(capacity=256))       # average several batches
recipe = Recipe(cache=CompressKV(capacity=256, errors=tuple(errors.tolist())))
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.protocols import CacheCompressor
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.select import pack
from jaxtok.core.types import Needs
from jaxtok.decode.lookahead import look_ahead
from jaxtok.models import blocks, cached, decoder, steps
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN
from jaxtok.ops.attention import Impl


class Heads(NamedTuple):
    """Semantic retrieval scores of one batch; those of several batches add."""

    heads: Array  # f32 [l h] attention on the needle, summed over the steps that count: `params["heads"]` of CompressKV
    hits: Array  # i32 [b] how many steps of each row counted; where all are 0 the scores say nothing


def calibrate_heads(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None,
    needle: Bool[Array, "b n"],
    *,
    new: int,
    impl: Impl = "auto",
) -> Heads:
    """How much each query head looks at a needle in a haystack while the model repeats it.

        heads[i, h] = sum over the steps whose output token is in the needle of  sum over the needle's tokens j of A_ij

    Each prompt holds the tokens of a fact somewhere (`needle`) and asks for it at its end; the model continues it greedily by up to `new`
    tokens. A step: one token goes in (the first is the prompt's last), its attention A counts if the token that comes out is one of the
    needle's. The whole needle counts, not only the token that is repeated (which is what a retrieval head of Wu et al. is found by). Layers
    rank their own heads, so nothing is normalised. `live` as in decoder.embed. One compiled program under jit (`cfg`, `new` static).

    ValueError: shapes; `new` < 1; a prompt of one row.
    """
    check.count("new", new)
    live = jnp.ones(ids.shape, bool) if live is None else live
    if live.shape != ids.shape or needle.shape != ids.shape or ids.shape[1] < 2:
        raise ValueError(f"ids, live, needle are {[list(x.shape) for x in (ids, live, needle)]}; they must be alike, two tokens or more")
    packed = pack(live)
    ids, there, span = (gather(x, packed.index) for x in (ids, live, needle & live))
    out = look_ahead(cfg, params, ids, there, look=new, impl=impl)
    hit = jnp.any((out[:, :, None] == ids[:, None]) & span[:, None], -1) & (out >= 0)
    _, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids[:, :-1], there[:, :-1]), new=0, impl=impl)
    put, known = jnp.concatenate([ids[:, -1:], jnp.maximum(out[:, :-1], 0)], 1), jnp.concatenate([there[:, -1:], out[:, :-1] >= 0], 1)
    seen = decoder.probe(cfg, params, decoder.embed(cfg, params, put, known), layers, Needs(rows=new), impl=impl)
    counts = gather(hit, pack(known).index).astype(jnp.float32)  # the order in which `embed` puts the rows
    look = span[:, :-1].astype(jnp.float32)
    heads = [jnp.einsum("bhwn,bw,bn->h", check.given("rows", part.rows), counts, look) for (part,) in seen]
    return Heads(jnp.stack(heads), jnp.sum(hit, -1, dtype=jnp.int32))


def calibrate_layers(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None,
    answer: Int[Array, "b t"],
    method: CacheCompressor,
    *,
    answer_live: Bool[Array, "b t"] | None = None,
    key: Array | None = None,
    impl: Impl = "auto",
) -> Float[Array, " l"]:
    """How much the output of each layer's attention changes when `method` has compressed that layer's cache.

        e_i = mean over the batch of  |O' - O|_F / (|O|_F + 1e-5),   O [t c]: the attention block's output for the rows of the answer

    O reads the whole prompt, O' the cache that `method` leaves of it; both read the answer's earlier rows, and what goes into a layer is
    that of the uncompressed model. `method`: CompressKV(capacity=...) without errors is the paper's. `answer`: ids that follow the
    prompt (a data set's, or generated), teacher-forced; `answer_live` marks the real ones, the first ones. Learned weights of the method
    stand in params["methods"]["cache"]. One compiled program under jit (`cfg`, `method` static).

    Which rows O has is our reading: the paper says the attention block's output under the same compression.

    ValueError: shapes; a method with a prefill of its own.
    """
    recipe = Recipe(cache=method)
    recipe.validate(cfg)
    if recipe.passes:
        raise ValueError(f"{recipe.passes[0]} needs more than one pass over the prompt; calibrate_layers makes one")
    alive = jnp.ones(answer.shape, bool) if answer_live is None else answer_live
    if answer.ndim != 2 or answer.shape[0] != ids.shape[0] or not answer.shape[1] or alive.shape != answer.shape:
        raise ValueError(f"ids, answer, answer_live are {[list(x.shape) for x in (ids, answer, alive)]}; they must be [b n], [b t], [b t]")
    tokens, x, errors = decoder.embed(cfg, params, ids, live), blocks.embed(cfg, params, answer), []
    room, length = answer.shape[1], lambda y: jnp.sqrt(jnp.sum(jnp.where(alive[..., None], y.astype(jnp.float32), 0.0) ** 2, (1, 2)))
    for i, p in enumerate(params["layers"]):
        tokens, found = cached.attend_rows(cfg, p, i, tokens, None, recipe, recipe.prefill_needs, False, key, impl)
        outs: list[Any] = []
        for each in (PLAIN, recipe):
            (part,) = cached.settle(cfg, params, i, found, None, each, room, None)
            o, _, _ = steps.step_part(cfg, params, i, 0, part, blocks.qkv(cfg, p, x), alive, PLAIN, None, None, key, False, impl)
            outs.append(o)
        whole, less = (blocks.out_proj(cfg, p, jnp.zeros_like(x), o) for o in outs)
        errors.append(jnp.mean(length(less - whole) / (length(whole) + 1e-5)))
        x = blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, outs[0]))
    return jnp.stack(errors)
