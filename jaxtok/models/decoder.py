"""The decoder with explicit caches: `prefill` runs whole rows and compresses layer by layer, `step` appends to the caches.

Pure functions of (cfg, params, inputs, state). `params["layers"]` is a tuple and is unrolled; the caches are a tuple of layers, each
a tuple of `Part` (one a head group), so that jit can donate and update them in place. Which method acts where is the recipe's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather
from jaxtok.core.segments import sentences
from jaxtok.core.select import pack
from jaxtok.core.types import KV, SPECIAL, TEXT, Evidence, Needs, Part, Tokens
from jaxtok.models import attended, blocks, cached, edits, steps
from jaxtok.models.config import Config
from jaxtok.models.prune import Pruning
from jaxtok.ops.attention import Impl, Shared

Layers = tuple[tuple[Part, ...], ...]
PLAIN = Recipe()


def embed(
    cfg: Config,
    params,
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    ends: tuple[int, ...] = (),
    special: int | None = None,
) -> Tokens:
    """Tokens of a batch of padded prompts; `live` marks the real ones (None = all). Positions count from 0.

    Padding may stand anywhere: rows are packed dead first, live last, and `source` says where each token went.
    `ends`: token ids that close a sentence; the segments then number the sentences (`recipe.reader.ends` of a reader that asks for them).
    `special`: id of the tokens of kind SPECIAL, those that a trained attention puts into the text (`recipe.attention.token`).
    """
    live = jnp.ones(ids.shape, bool) if live is None else live
    if live.shape != ids.shape:
        raise ValueError(f"live {live.shape} must have the shape of ids {ids.shape}")
    packed = pack(live)
    pos = blocks.positions(packed.index >= 0)
    number = sentences(gather(ids, packed.index), pos >= 0, ends) if ends else None
    none = jnp.full(ids.shape, -1, jnp.int32)
    return Tokens(
        x=blocks.embed(cfg, params, gather(ids, packed.index)),
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=(pos >= 0).astype(jnp.float32),
        kind=jnp.zeros(ids.shape, jnp.int8)
        if special is None
        else jnp.where((pos >= 0) & (gather(ids, packed.index) == special), SPECIAL, TEXT).astype(jnp.int8),
        segment=none if number is None else number,
        cell=jnp.repeat(none[..., None], 2, -1),
        source=packed.assign,
        seen=jnp.sum(live, -1, dtype=jnp.int32),
        delta=jnp.zeros(ids.shape[:1], jnp.int32),
        lost=jnp.zeros(ids.shape[:1], jnp.int32),
    )


def empty(cfg: Config, params, b: int, slots: int, recipe: Recipe = PLAIN) -> Layers:
    """Caches of `slots` dead slots for b sequences, in the parameters' dtype, by the recipe's head groups, with the step policy's state begun."""
    if recipe.attention is not None:
        return attended.empty(cfg, params, b, slots, recipe)
    dtype, group = params["embed"].dtype, cfg.heads // cfg.kv_heads
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    learned = params.get("methods", {})
    out = []
    for i in range(cfg.layers):
        parts = []
        for j, g in enumerate(cached.head_groups(cfg, recipe, i)):
            kv = KV(
                k=jnp.zeros((b, g, slots, cfg.head_dim), dtype),
                v=jnp.zeros((b, g, slots, cfg.head_dim), dtype),
                pos=zeros(b, g, slots) - 1,
                bias=jnp.zeros((b, g, slots), jnp.float32),
                seen=zeros(b),
                delta=zeros(b),
                cursor=zeros(),
                lost=zeros(b, g),
            )
            nothing = jnp.zeros((b, g * group, slots), jnp.float32)
            turned = jnp.zeros((b, g * group, recipe.policy.needs.turned if recipe.policy else 0, cfg.head_dim), dtype)
            rest = cached.at_hand(i, jnp.asarray(blocks.frequencies(cfg, i)), None)
            seen = Evidence(received=nothing, perturbed=nothing, rows=nothing[:, :, None], peak=nothing, turned=turned, **rest)
            policy = None if recipe.policy is None else recipe.policy.layer(i, cfg.layers).head_group(j)
            state = Held() if policy is None or not g else policy.start(learned.get("policy", {}), kv, seen)
            reading = recipe.reader.start(learned.get("reader", {}), i, kv, cfg.heads) if recipe.reader else ()
            parts.append(Part(kv, state, reading))
        out.append(tuple(parts))
    return tuple(out)


def logits(cfg: Config, params, x: Float[Array, "b n c"]) -> Float[Array, "b n vocab"]:
    """Float32 logits of the next token at each row; pass the last row only when generating."""
    return blocks.logits(cfg, params, x)


def prefill(
    cfg: Config,
    params,
    tokens: Tokens,
    recipe: Recipe = PLAIN,
    *,
    new: int,
    layers: Layers | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    proportional: bool = False,
    impl: Impl = "auto",
) -> tuple[Tokens, Layers]:
    """Run whole rows through all layers; caches come out compressed by the recipe, with room for `new` more tokens.

    `layers`: continue on these caches (the next chunk, the question after the context was compressed, the next turn): positions
    of `tokens` then count from 0 and are moved behind what the caches have seen; evidence covers this call's queries.
    `keep`: traced budgets by recipe field ("cache", "policy", or "layers": a sequence, one entry a pruner), i32 broadcastable
    to [l b]; absent = the capacity. With `recipe.edits` a call that continues takes all its rows for text.
    `recipe.sparsify` acts in a prefill of its own; on given caches, and in steps, rows attend to everything.
    `key`: PRNG for methods that draw. `proportional`: log(size) is added to the attention logits of merged tokens.

    Returns the tokens after the last layer (row -1 is the last token; feed it to `logits`) and the caches.
    """
    recipe.validate(cfg)
    if recipe.passes:
        raise ValueError(f"{recipe.passes[0]} needs more than one pass over the prompt; use {recipe.passes[1]}")
    _known(keep)
    if new < 0:
        raise ValueError(f"new must be >= 0, got {new}")
    stacked = isinstance(params["layers"], dict)
    if stacked or len(params["layers"]) != cfg.layers:
        raise ValueError("inference takes params['layers'] as a tuple of one dict a layer; use models.blocks.unstack(params)")
    if layers is not None and recipe.layers:
        raise ValueError("pruning between layers takes a prefill of its own; continue with a recipe without `layers`")
    if isinstance(impl, Shared) and (recipe.layers or recipe.edits or recipe.sparsify):
        raise ValueError("over several devices a recipe takes no `layers`, `edits` and `sparsify`; leave them out, or run on one")
    if recipe.attention is not None:
        return attended.prefill(cfg, params, tokens, recipe, new=new, layers=layers, proportional=proportional, impl=impl)
    if recipe.edits and layers is None:
        return edits.prefill(cfg, params, tokens, recipe, new=new, proportional=proportional, impl=impl)
    pruning, evidence, out = Pruning(cfg, params, recipe, keep, proportional, key, impl), Evidence(), []
    tokens, impl, back = _laid(tokens, impl) if layers is None else (tokens, impl, lambda x: x)
    for i, p in enumerate(params["layers"]):
        tokens = pruning.before(i, p, tokens, evidence)
        needs, past = recipe.prefill_needs | pruning.needs(i), None if layers is None else layers[i]
        tokens, found = cached.attend_rows(cfg, p, i, tokens, past, recipe, needs, proportional, key, impl, learned=params.get("methods"))
        out.append(cached.settle(cfg, params, i, found, past, recipe, new, keep, impl))
        evidence = found[0][1]  # pruners work on caches of one group
    tokens = back(tokens)
    return tokens, pruning.after(tuple(out), tokens, new)


def _laid(tokens: Tokens, impl: Impl) -> tuple[Tokens, Impl, Callable[[Tokens], Tokens]]:
    """(rows as the devices hold them, what attends to them, the way back); on one device nothing changes."""
    if not isinstance(impl, Shared):
        return tokens, impl, lambda x: x
    return _moved(impl, tokens, impl.place), impl.laid(), lambda x: _moved(impl, x, impl.restore)


def _moved(impl: Shared, tokens: Tokens, move: Callable[[Array], Array]) -> Tokens:
    """The rows in another order, cut over the sequence."""
    own = {name: getattr(tokens, name) for name in ("x", "pos", "rope", "size", "kind", "segment", "cell", "score")}
    put = lambda x: impl.hold(move(x), "data", "sequence", *(None,) * (x.ndim - 2))
    return tokens._replace(**{name: put(x) for name, x in own.items() if x is not None})


def survey(
    cfg: Config, params, tokens: Tokens, needs: Needs, recipe: Recipe = PLAIN, *, key: Array | None = None, impl: Impl = "auto"
) -> tuple[Tokens, Layers, tuple[tuple[Evidence, ...], ...]]:
    """A plain prefill that also returns its evidence, for each layer and head group, to be added to and given to `compress`."""
    layers, out = [], []
    tokens, impl, back = _laid(tokens, impl)
    for i, p in enumerate(params["layers"]):
        tokens, found = cached.attend_rows(cfg, p, i, tokens, None, recipe, needs, False, key, impl, learned=params.get("methods"))
        layers.append(tuple(Part(kv, Held()) for kv, _ in found))
        out.append(tuple(evidence for _, evidence in found))
    return back(tokens), tuple(layers), tuple(out)


def probe(
    cfg: Config,
    params,
    tokens: Tokens,
    layers: Layers,
    needs: Needs,
    recipe: Recipe = PLAIN,
    *,
    among: Bool[Array, "b s"] | None = None,
    key: Array | None = None,
    impl: Impl = "auto",
) -> tuple[tuple[Evidence, ...], ...]:
    """What further rows (a draft's look-ahead, the context once more, a question) make of caches that they do not join.

    The rows attend to the caches and to each other. Returns evidence of these rows' queries, for each layer and head group, over the
    slots of `layers`; give it to `compress`. `recipe` says how the caches are stored. `among`: attention evidence as if only these slots
    and the rows themselves were there (the rows still read everything).
    """
    out = []
    for i, p in enumerate(params["layers"]):
        tokens, found = cached.attend_rows(cfg, p, i, tokens, layers[i], recipe, needs, False, key, impl, among)
        out.append(tuple(_before(evidence, part.kv.k.shape[2]) for part, (_, evidence) in zip(layers[i], found, strict=True)))
    return tuple(out)


def last_rows(cfg: Config, params, tokens: Tokens, rows: int, *, layer: int = -1, impl: Impl = "auto") -> Float[Array, "b h w n"]:
    """Attention of the last `rows` tokens in one layer, float32; layers before it run whole, of this one nothing but queries and keys."""
    layer %= cfg.layers
    for i, p in enumerate(params["layers"][:layer]):
        tokens, _ = cached.attend_rows(cfg, p, i, tokens, None, PLAIN, Needs(), False, None, impl)
    return cached.look_back(cfg, params["layers"][layer], layer, tokens, rows, impl)


def _before(evidence: Evidence, slots: int) -> Evidence:
    cut = {name: getattr(evidence, name) for name in ("rows", "received", "peak", "perturbed", "cls")}
    return evidence._replace(**{name: None if x is None else x[..., :slots] for name, x in cut.items()})


def compress(
    cfg: Config,
    params,
    layers: Layers,
    evidence: tuple[tuple[Evidence, ...], ...],
    recipe: Recipe,
    *,
    new: int,
    keep: Mapping[str, Any] | None = None,
) -> Layers:
    """What `prefill` does to the caches after their layers, done later and on other evidence: compress, fit, leave room for `new`.

    `layers` come from `prefill(new=0)` with the plain recipe (or one that stores keys alike).
    """
    recipe.validate(cfg)
    if recipe.edits:
        raise ValueError(f"{recipe.edits[0].name} acts in the prefill itself; use decoder.prefill")
    _known(keep)
    found = [[(part.kv, seen) for part, seen in zip(*pair, strict=True)] for pair in zip(layers, evidence, strict=True)]
    return tuple(cached.settle(cfg, params, i, each, None, recipe, new, keep) for i, each in enumerate(found))


def _known(keep: Mapping[str, Any] | None) -> None:
    unknown = sorted(set(keep or ()) - {"cache", "policy", "layers"})
    if unknown:
        raise ValueError(f"keep has {', '.join(map(repr, unknown))}; budgets go by recipe field: cache, policy, layers")


def step(
    cfg: Config,
    params,
    x: Float[Array, "b t c"],
    live: Bool[Array, "b t"],
    layers: Layers,
    recipe: Recipe = PLAIN,
    *,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    evict: bool = True,
    ids: Int[Array, "b t"] | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Array, "b t c"], Layers]:
    """Append t rows to the caches: embed -> append -> read -> attend -> evict, in place when jit donates `layers`.

    `x` are embeddings (`blocks.embed`); rows that are not `live` (finished sequences) leave no trace. With a step policy t > 1 rows
    run one after another, unless `evict` is False: then rows are appended and observed, and nothing is vacated (chunked prefill).
    `ids`: the rows' token ids, for a reader that looks at them (sentence ends). A row that finds no slot is counted in `kv.lost`. A policy's `keep` must be that of the prefill: each step vacates one slot for the one
    it fills. Returns the rows after the last layer and the caches.
    """
    _known(keep)
    if recipe.attention is not None:
        return attended.step(cfg, params, x, live, layers, recipe, ids, impl)
    if recipe.policy is not None and evict and x.shape[1] > 1:

        def one(state, row):
            y, state = step(cfg, params, row[0][:, None], row[1][:, None], state, recipe, keep=keep, key=key, impl=impl)
            return state, y[:, 0]

        layers, rows_out = jax.lax.scan(one, layers, (jnp.swapaxes(x, 0, 1), live.T))
        return jnp.swapaxes(rows_out, 0, 1), layers
    out, carries = [], [None] * max(len(parts) for parts in layers)
    for i, (p, parts) in enumerate(zip(params["layers"], layers, strict=True)):
        q, k, v = blocks.qkv(cfg, p, x)
        values, kept, g = [], [], 0
        for j, part in enumerate(parts):
            heads, group = part.kv.k.shape[1], cfg.heads // cfg.kv_heads
            mine = q[:, g * group : (g + heads) * group], k[:, g : g + heads], v[:, g : g + heads]
            o, part, carries[j] = steps.step_part(cfg, params, i, j, part, mine, live, recipe, carries[j], keep, key, evict, impl, ids)
            values.append(o)
            kept.append(part)
            g += heads
        o = values[0] if len(values) == 1 else jnp.concatenate(values, 1)
        x = blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, o))
        out.append(tuple(kept))
    return x, steps.finish(params, out, carries[0], recipe)
