"""Bidirectional encoders (ViT, DeiT, CLIP, SigLIP, DINOv2, audio) as pure functions, with the sites in and behind their layers.

`embed` makes rows of an image or of token ids, `encode` runs layers over them (and reduces them, as the recipe says), `head` reads the
result. Parameters are those of `encoder.init`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import assignment, gather, move, reduce, representative
from jaxtok.core.reducer import Reducer
from jaxtok.core.score import change
from jaxtok.core.select import from_index
from jaxtok.core.types import IMAGE, SPECIAL, TEXT, DensePlan, Evidence, Needs, Tokens
from jaxtok.models import blocks, encoder
from jaxtok.models.cached import whole
from jaxtok.models.config import EncoderConfig
from jaxtok.models.resample import resize_grid
from jaxtok.ops.attention import Impl, attention

PLAIN = Recipe()
OWN = ("keys", "values", "hidden", "own", "score", "text", "detail")  # of `Needs`: what an encoder knows without attending


class Encoded(NamedTuple):
    """What an encoder makes of a batch."""

    tokens: Tokens  # after the last layer that ran; before the final norm
    evidence: Evidence  # what recipe.select asks for, about these rows; several layers lead with an axis l


# --- rows --------------------------------------------------------------------------------------------------------------


def embed(cfg: EncoderConfig, params, images: Float[Array, "b y x ch"]) -> Tokens:
    """Rows of a batch of normalised images of one size: class, distillation and register tokens (kind SPECIAL), then the patches by rows.

    `cell` of a patch is its row and column; what is left over at the right and the bottom is not seen. Positions learned for another
    size are resampled (bicubic, half-pixel centres). ValueError for another number of channels and for images smaller than a patch.
    """
    b, y, x, ch = images.shape
    (py, px), dtype = cfg.patch, params["patch"].dtype
    if cfg.image is None or ch != cfg.channels or y < py or x < px:
        raise ValueError(
            f"images are {[b, y, x, ch]} for patches of {cfg.patch} and {cfg.channels} channels; give [batch height width channels]"
        )
    rows, cols = y // py, x // px
    cut = images[:, : rows * py, : cols * px].astype(dtype).reshape(b, rows, py, cols, px, ch)
    body = encoder.linear(params, "patch", cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * cols, py * px * ch))
    positioned = cfg.cls + cfg.distilled
    grid = resize_grid(params["pos"][positioned:], cfg.grid, (rows, cols), cfg.antialias)
    body = body + grid[None]
    if cfg.prefix:
        rows_of = {"cls": cfg.cls, "dist": cfg.distilled, "registers": cfg.registers}
        lead = jnp.concatenate([params[name].reshape(-1, cfg.width) for name, n in rows_of.items() if n])
        lead = lead.at[:positioned].add(params["pos"][:positioned])
        body = jnp.concatenate([jnp.broadcast_to(lead[None], (b, *lead.shape)), body], 1)
    cell = np.concatenate([np.full((cfg.prefix, 2), -1), np.indices((rows, cols)).reshape(2, -1).T]).astype(np.int32)
    kind = np.where(cell[:, 0] < 0, SPECIAL, IMAGE).astype(np.int8)
    return _stem(cfg, params, _tokens(body, None, kind, cell))


def embed_text(cfg: EncoderConfig, params, ids: Int[Array, "b n"], live: Bool[Array, "b n"] | None = None) -> Tokens:
    """Rows of a batch of token ids of a text tower; `live` marks the real ones, which stand left (None = all).

    A row of ids ends with its first cfg.eos, as a tokenizer that pads with it means it; what stands behind is dead. SigLIP pads too, but
    its padding counts: leave `live` out.
    """
    b, n = ids.shape
    if cfg.vocab is None or n > cfg.context:
        raise ValueError(f"{n} token ids for a text tower of {cfg.context} positions and a vocabulary of {cfg.vocab}; cut them")
    live = jnp.ones((b, n), bool) if live is None else live
    if cfg.eos is not None:
        ends = ids == (cfg.eos if cfg.eos >= 0 else jnp.max(ids, -1, keepdims=True))
        live = live & (jnp.cumsum(ends, -1) <= ends.astype(jnp.int32))
    x = params["embed"][ids] + params["pos"][None, :n]
    return _stem(cfg, params, _tokens(x, live, np.full((n,), TEXT, np.int8), np.full((n, 2), -1, np.int32)))


def _tokens(x: Array, live: Array | None, kind: np.ndarray, cell: np.ndarray) -> Tokens:
    b, n = x.shape[:2]
    wide = lambda a: jnp.broadcast_to(jnp.asarray(a)[None], (b, *a.shape))
    # constant where all rows live: XLA then folds the masks of every layer, which took a tenth of a ViT-S's time
    pos = wide(np.arange(n, dtype=np.int32)) if live is None else blocks.positions(live)
    live = jnp.ones((b, n), bool) if live is None else live
    return Tokens(
        x=x,
        pos=pos,
        rope=jnp.maximum(pos, 0)[..., None],
        size=live.astype(jnp.float32),
        kind=wide(kind),
        segment=jnp.full((b, n), -1, jnp.int32),
        cell=wide(cell),
        source=wide(np.arange(n, dtype=np.int32)),
        seen=jnp.sum(live, -1, dtype=jnp.int32),
        delta=jnp.zeros((b,), jnp.int32),
        lost=jnp.zeros((b,), jnp.int32),
    )


def _stem(cfg: EncoderConfig, params, tokens: Tokens) -> Tokens:
    return tokens._replace(x=encoder.norm(cfg, params, "stem_norm", tokens.x)) if cfg.stem_norm else tokens


# --- the forward pass with its sites -------------------------------------------------------------------------------------


class _Run:
    """One forward pass while it is traced: the rows, the states of the methods, evidence that is kept, what is to be undone."""

    def __init__(self, cfg, params, tokens, recipe, keep, key, proportional, impl):
        self.cfg, self.params, self.tokens, self.recipe, self.key, self.impl = cfg, params, tokens, recipe, key, impl
        self.proportional, self.keep = proportional, keep
        self.evidence = Evidence()  # of the layer that ran last
        self.kept: dict[int, Evidence] = {}  # of the layers that recipe.select asks for
        self.states: dict[Any, Held] = {}
        self.mixed: Any = ()  # the state of recipe.attention
        self.open: list[tuple[int, int, Reducer, Any, Tokens]] = []  # (before which layer, place, method, its parameters, rows before)

    def act(self, index: int, i: int, evidence: Evidence, move_rows: bool = True):
        """The plan of entry `index` before or in layer i; rows, states and evidence that is kept move."""
        named, tokens = self.recipe.vit[index][1], self.tokens
        own, method = self._learned(index), named.layer(i, self.cfg.layers)
        state = self.states[named] if named in self.states else method.start(own, tokens)
        state, plan = method.plan(own, state, tokens, evidence, self._budget(index))
        score = method.mark(own, state, tokens, evidence)
        self.tokens = tokens = tokens if score is None else tokens._replace(score=score)
        self.states[named] = state
        if not move_rows:
            return plan
        if self.cfg.merge > 1 and (isinstance(plan, DensePlan) or plan.weight is not None):
            raise ValueError(
                f"{method.name} merges rows; this tower joins {self.cfg.merge} x {self.cfg.merge} patches itself: only drop some, or merge at site select"
            )
        if method.restore is not None:
            self.open.append((min(method.restore, self.cfg.layers), index, method, own, tokens))
            n = tokens.pos.shape[1]
            self.tokens = tokens._replace(source=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (tokens.pos.shape[0], n)))
        self.tokens = reduce(plan, self.tokens, method.positions)
        self._carry(plan)
        return plan

    def _learned(self, index: int):
        learned = self.params.get("methods", {}).get("vit", {})
        return learned[index] if learned else {}

    def cross(self, index: int) -> None:
        """The row that a method brings along, before the layer of entry `index`."""
        method, own = self.recipe.vit[index][1], self._learned(index)
        if method not in self.states:
            self.tokens = method.begin(own, self.tokens)
            self.states[method] = method.start(own, self.tokens)
        self.tokens = method.enter(own, self.tokens)

    def part(self) -> None:
        """The rows that methods brought along go, at the end."""
        for _ in [m for m in self.states if m.cross and not getattr(m, "stays", False)]:
            n = self.tokens.pos.shape[1]
            plan = from_index(jnp.broadcast_to(jnp.arange(n - 1, dtype=jnp.int32), (self.tokens.pos.shape[0], n - 1)), n)
            self.tokens = reduce(plan, self.tokens)
            self._carry(plan)

    def _lift(self, index) -> None:
        """States of the rows `index`; 0 for -1."""
        self.states = {m: Held(jax.tree.map(lambda x: gather(x, index), s.slots), s.rest) for m, s in self.states.items()}

    def _carry(self, plan) -> None:
        self._lift(representative(plan))
        self.kept = {i: move(plan, e) for i, e in self.kept.items()}
        self.evidence = move(plan, self.evidence)

    def _budget(self, index: int):
        table = None if self.keep is None else self.keep.get("vit")
        if table is None or table[index] is None:
            return None
        return jnp.broadcast_to(whole("vit", table[index]), self.tokens.seen.shape)

    def undo(self, i: int) -> None:
        """What ends before layer i, the last begun first."""
        while self.open and self.open[-1][0] <= i:
            _, index, method, own, before = self.open.pop()
            state = self.states[self.recipe.vit[index][1]]
            now = before._replace(source=self.tokens.source)  # row of `before` -> row now
            self.tokens = before._replace(x=method.undo(own, state, self.tokens, now), lost=self.tokens.lost)
            self._lift(now.source)

    def layer(self, i: int, p, places: dict[str, list[int]], after: Needs) -> None:
        cfg, opts = self.cfg, (self.proportional, self.key, self.impl)
        entries = self.recipe.vit
        for j in [j for j, (k, m) in enumerate(entries) if k == i and m.cross]:
            self.cross(j)
        needs = functools.reduce(lambda a, j: a | entries[j][1].layer(i, cfg.layers).needs, places["attn"], after)
        for j in places["block"]:
            method = entries[j][1].layer(i, cfg.layers)
            evidence = encoder.attend(cfg, p, i, self.tokens, method.needs, *opts)[1] if method.needs.own else self.evidence
            self.act(j, i, evidence)
        probs = normed = back = None
        inner = self.tokens
        for j in places["ahead"] + places["around"]:  # one at most
            method = entries[j][1].layer(i, cfg.layers)
            seen = encoder.attend(cfg, p, i, self.tokens, method.needs | Needs(probs=method.at == "ahead"), *opts)[1]
            plan = self.act(j, i, seen, move_rows=method.at == "ahead")
            if method.at == "ahead":
                inner, probs = self.tokens, move(plan, seen).probs
            else:
                inner = reduce(plan, inner._replace(x=encoder.before(cfg, p, inner.x)), "keep")
                normed, back = inner.x, assignment(plan)
        block, evidence = encoder.attend(cfg, p, i, inner, needs, *opts, probs, normed)
        if self.recipe.attention is not None:
            if places["ahead"] or needs._replace(**dict.fromkeys(OWN, False), weights=()) != Needs():
                raise ValueError(
                    f"{self.recipe.attention.name} attends here: there is no attention matrix to reduce or to take {needs} from"
                )
            learned = self.params.get("methods", {}).get("attention", ())
            mixed = encoder.mixed(cfg, p, i, inner, self.recipe, learned, self.mixed, self.proportional, self.impl, normed)
            block, self.mixed = (block, self.mixed) if mixed is None else mixed
        block = block if back is None else gather(block, back)
        self.evidence = evidence
        self.tokens = self.tokens._replace(x=encoder.join(cfg, p, self.tokens.x, block, 1))
        for j in places["attn"]:
            self.act(j, i, self.evidence)
        x = self.tokens.x
        y = x if cfg.post else encoder.norm(cfg, p, "norm2", x)
        block = encoder.mlp(cfg, p, y)
        if needs.change:
            attended: Any = self.evidence.change
            self.evidence = self.evidence._replace(change=jnp.concatenate([attended, change(y, block)[:, :, None]], 2))
        self.tokens = self.tokens._replace(x=encoder.join(cfg, p, x, block, 2))


def encode(
    cfg: EncoderConfig,
    params,
    tokens: Tokens,
    recipe: Recipe = PLAIN,
    *,
    until: int | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    proportional: bool = False,
    impl: Impl = "auto",
) -> Encoded:
    """Run the first `until` layers (None = all) over the rows of `embed`, reduced on the way by `recipe.vit`.

    `keep`: {"vit": a sequence, one traced budget an entry of recipe.vit (i32 [b] or scalar, None = its capacity)}. `proportional`: log of
    the size is added to the attention logits of merged rows. `key`: PRNG for methods that draw. Evidence for `recipe.select` (layers
    counted from the last that ran where negative) comes back beside the tokens; nothing is selected here.
    """
    until = cfg.layers if until is None else until
    if not 1 <= until <= cfg.layers or not isinstance(params["layers"], tuple) or len(params["layers"]) != cfg.layers:
        raise ValueError(f"until={until} of {cfg.layers} layers; params['layers'] must be a tuple of one dict a layer")
    recipe.validate_encoder(cfg, until)
    asked = Needs() if recipe.select is None else recipe.select.needs
    wanted = [i % until for i in asked.layers] or [until - 1]
    run = _Run(cfg, params, tokens, recipe, keep, key, proportional, impl)
    for i in range(until):
        where = {at: [j for j, (k, m) in enumerate(recipe.vit) if k == i and m.at == at] for at in ("block", "attn", "around", "ahead")}
        followers = [m.layer(i + 1, cfg.layers).needs for k, m in recipe.vit if k == i + 1 and m.at == "block"]
        after = functools.reduce(lambda a, n: a | n, [n for n in followers if not n.own], Needs())
        after = after | asked._replace(layers=(), own=False) if i in wanted and not asked.own else after
        run.undo(i)
        run.layer(i, params["layers"][i], where, after)
        if i in wanted:
            run.kept[i] = run.evidence
    for j in [j for j, (k, _) in enumerate(recipe.vit) if k == until]:
        run.act(j, until, run.evidence)
    run.undo(cfg.layers)
    run.part()
    if asked.own:
        if until == cfg.layers:
            raise ValueError(f"{recipe.select.name} asks for evidence of the layer behind the last; run fewer layers: until={until - 1}")  # type: ignore[union-attr]
        seen = encoder.attend(cfg, params["layers"][until], until, run.tokens, asked, proportional, key, impl)[1]
    elif asked.layers:
        seen = jax.tree.map(lambda *a: jnp.stack(a), *(run.kept[i] for i in wanted))
    else:
        seen = run.kept[wanted[0]]
    return Encoded(run.tokens, seen)


def select(
    params,
    encoded: Encoded,
    recipe: Recipe,
    *,
    keep: Int[Array, " b"] | None = None,
    text: Array | None = None,
    detail: Array | None = None,
    grid: Int[Array, "b 2"] | None = None,
) -> Tokens:
    """What recipe.select leaves of the rows of an encoder (or of rows made of them, one for one); `keep`: traced budget of live rows.

    text [b c], detail [b n]: what the caller tells a method that asks for it (see `Evidence`). ValueError where it is missing. grid: of
    each image's crops, for methods that would else take their own `grid`.
    """
    method, tokens = recipe.select, encoded.tokens
    if method is None:
        return tokens
    own = params.get("methods", {}).get("select", {})
    budget = None if keep is None else jnp.broadcast_to(whole("select", keep), tokens.seen.shape)
    for name, given, shape in (("text", text, (tokens.x.shape[0], tokens.x.shape[2])), ("detail", detail, tokens.pos.shape)):
        if getattr(method.needs, name) and (given is None or given.shape != shape):
            raise ValueError(f"{method.name} needs {name}= of shape {shape}, got {None if given is None else given.shape}")
    told = encoded.evidence._replace(text=text, detail=detail, grid=grid)
    state, plan = method.plan(own, method.start(own, tokens), tokens, told, budget)
    score = method.mark(own, state, tokens, told)
    return reduce(plan, tokens if score is None else tokens._replace(score=score), method.positions)


# --- what is read at the end -----------------------------------------------------------------------------------------------


def head(cfg: EncoderConfig, params, tokens: Tokens) -> Float[Array, "b out"]:
    """Float32 logits or projection (the pooled rows where there is no head) of what `encode` returns."""
    live = tokens.pos >= 0
    first = jnp.argmax(live, -1)[:, None]
    take = lambda x, i: jnp.take_along_axis(x, i[..., None], 1)[:, 0]
    x = tokens.x if cfg.norm_mean or not cfg.final_norm else encoder.norm(cfg, params, "norm", tokens.x)
    weight = jnp.where(live & (tokens.kind != SPECIAL), tokens.size, 0.0)
    mean = jnp.einsum("bnc,bn->bc", x.astype(jnp.float32), weight / jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1.0))
    if cfg.pool == "cls_dist":
        logits = encoder.linear(params, "head", take(x, first)) + encoder.linear(params, "head_dist", take(x, first + 1))
        return logits.astype(jnp.float32) / 2
    if cfg.pool == "map":
        pooled = _probe(cfg, params["map"], x, tokens)
    elif cfg.pool == "mean":
        pooled = mean.astype(x.dtype)
    elif cfg.pool == "cls_mean":
        pooled = jnp.concatenate([take(x, first), mean.astype(x.dtype)], -1)
    elif cfg.pool == "eos":
        pooled = take(x, jnp.argmax(tokens.pos, -1)[:, None])
    else:
        pooled = take(x, first)
    pooled = encoder.norm(cfg, params, "norm", pooled) if cfg.norm_mean and cfg.final_norm else pooled
    return (pooled if cfg.out is None else encoder.linear(params, "head", pooled)).astype(jnp.float32)


def _probe(cfg: EncoderConfig, p, x: Array, tokens: Tokens) -> Array:
    """SigLIP's attention pooling: one learned query over all rows, then an MLP with a residual sum."""
    b = x.shape[0]
    q = encoder.heads(cfg, encoder.linear(p, "q", jnp.broadcast_to(p["probe"][None, None], (b, 1, p["probe"].shape[0]))))
    k, v = (encoder.heads(cfg, encoder.linear(p, name, x)) for name in "kv")
    out, _ = attention(q, k, v, q_pos=jnp.zeros((b, 1), jnp.int32), k_pos=tokens.pos, causal=False)
    y = encoder.linear(p, "o", out.transpose(0, 2, 1, 3).reshape(b, 1, -1))
    return (y + encoder.mlp(cfg, p, encoder.norm(cfg, p, "norm", y)))[:, 0]


def forward(cfg: EncoderConfig, params, images: Float[Array, "b y x ch"], recipe: Recipe = PLAIN, **options: Any) -> Float[Array, "b out"]:
    """`head` of `encode` of `embed`; options as `encode`."""
    return head(cfg, params, encode(cfg, params, embed(cfg, params, images), recipe, **options).tokens)


def similarity(
    image: Float[Array, "i c"], text: Float[Array, "t c"], scale: Float[Array, ""], bias: Float[Array, ""]
) -> Float[Array, "i t"]:
    """exp(scale) cos(image, text) + bias: CLIP's and SigLIP's logits of images for texts, from what `head` makes of both."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.exp(scale) * unit(image) @ unit(text).T + bias
