"""Which method acts at which site."""

import dataclasses
from typing import Any, get_args

import jax

from jaxtok.core import protocols
from jaxtok.core.attention import Attention
from jaxtok.core.edit import LayerEdit
from jaxtok.core.mixer import Mixer
from jaxtok.core.reader import Reader
from jaxtok.core.reducer import Reducer
from jaxtok.core.sparsifier import Sparsifier
from jaxtok.core.types import Needs

_KIND = {
    "prompt": protocols.PromptMethod,
    "vit": Reducer,
    "select": Reducer,
    "layers": Reducer,
    "sparsify": Sparsifier,
    "attention": Attention | Mixer,
    "cache": protocols.CacheCompressor,
    "policy": protocols.CachePolicy,
    "reader": Reader,
    "edits": LayerEdit,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method for each site; hashable, so a static argument of jit. The empty recipe is the plain model.

    `vit` and `layers` are tuples of (K, method): the method acts before 0-based layer K on the evidence of layer K-1 (`own`
    evidence: of layer K).
    `heads`: how many KV heads each head group of each layer has, in the order of the weights (`models.blocks.reorder_heads` makes a
    group contiguous); each group then has caches of its own size. A group may be empty.
    `edits`: what a decoder spares image rows that stay, one edit at most.
    """

    prompt: protocols.PromptMethod | None = None
    vit: tuple[tuple[int, Reducer], ...] = ()
    select: Reducer | None = None
    layers: tuple[tuple[int, Reducer], ...] = ()
    sparsify: Sparsifier | None = None
    attention: Attention | Mixer | None = None
    cache: protocols.CacheCompressor | None = None
    policy: protocols.CachePolicy | None = None
    reader: Reader | None = None
    heads: tuple[tuple[int, ...], ...] = ()
    edits: tuple[LayerEdit, ...] = ()

    def __post_init__(self):
        for field, kind in _KIND.items():
            value = getattr(self, field)
            if field in ("vit", "layers", "edits") and not isinstance(value, tuple):
                raise TypeError(f"{field} takes a tuple, got {value!r}")
            if field in ("vit", "layers") and not all(isinstance(entry, tuple) and len(entry) == 2 for entry in value):
                raise TypeError(f"{field} takes pairs (K, method), got {value!r}")
            entries = tuple(m for _, m in value) if field in ("vit", "layers") else value if field == "edits" else (value,)
            for method in entries:
                if method is not None and not isinstance(method, kind):
                    raise TypeError(f"{field} takes a {' or '.join(k.__name__ for k in get_args(kind) or (kind,))}, got {method!r}")

    def init_params(self, key: jax.Array, cfg) -> dict[str, Any]:
        """Learned weights of every method, for `params["methods"]`: one entry a site, a tuple where a site has several."""
        out = {}
        for i, field in enumerate(_KIND):
            value, sub = getattr(self, field), jax.random.fold_in(key, i)
            if isinstance(value, tuple):
                methods = [m[1] if isinstance(m, tuple) else m for m in value]
                out[field] = tuple(m.init_params(jax.random.fold_in(sub, j), cfg) for j, m in enumerate(methods))
            elif value is not None:
                out[field] = value.init_params(sub, cfg)
        return out

    def replace(self, **changes) -> "Recipe":
        """A copy with some sites changed."""
        return dataclasses.replace(self, **changes)

    @property
    def prefill_needs(self) -> Needs:
        """Evidence that the cache sites read in every layer of a prefill."""
        needs = Needs()
        for method in (self.cache, self.policy):
            needs = needs | method.needs if method is not None else needs
        return needs

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that close a sentence, for `decoder.embed`: those of a reader that asks for them."""
        return () if self.reader is None else self.reader.ends

    @property
    def passes(self) -> tuple[str, str] | None:
        """(method, function) where the prompt's method, the cache's or one that it holds takes a prefill of its own."""
        return next(((m.name, m.passes) for m in _early(self) if m.passes), None)

    @property
    def look(self) -> int | None:
        """Tokens that a draft model continues the prompt by, for the methods that look at them; None = no draft is needed."""
        return max((getattr(m, "look") for m in _early(self) if m.drafts), default=None)  # noqa: B009  (a field of these methods alone)

    @property
    def drafts(self) -> str | None:
        """The first method that needs a draft model."""
        return next((m.name for m in _early(self) if m.drafts), None)

    def validate(self, cfg) -> None:
        """ValueError where a combination cannot work on a model of configuration `cfg`."""
        count = cfg.layers
        for k, method in self.layers:
            needs = method.layer(k, count).needs
            bare = needs._replace(score=False) == Needs()
            first = 0 if bare or (needs.own and not needs.change) else 1
            if not first <= k < count:
                raise ValueError(f"{method.name} acts before layer {k}; a decoder of {count} layers has places {first} to {count - 1}")
        for method in (self.cache, self.policy, *(m for _, m in self.layers)):
            if method is not None and method.needs.layers:
                raise ValueError(
                    f"{method.name} needs evidence of layers {method.needs.layers}; the decoder gives that of the layer at hand"
                )
        where = [k for k, _ in self.layers]
        if len(set(where)) < len(where):
            raise ValueError(f"two methods act before the same layer: {where}; chain them or move one")
        for _, method in self.layers:
            if method.at != "block":
                raise ValueError(f"{method.name} acts at {method.at!r}; a decoder takes methods that act at 'block'")
            if method.trim is not None and (self.cache or self.policy or self.reader or self.heads):
                raise ValueError(f"{method.name} trims the caches after the prefill itself; use it without cache, policy, reader and heads")
        self._validate_heads(cfg)
        for method in (*self.edits, *(m for m in (self.sparsify, self.attention) if m is not None)):
            method.validate(self, cfg)
        raw = (self.policy is not None and self.policy.raw) or (self.reader is not None and self.reader.raw)
        if raw and self.cache is not None and (self.cache.rotates or self.cache.reads_rotated):
            raise ValueError(f"{self.cache.name} works on rotated keys, but they are stored unrotated here; use one or the other")
        if raw and self.policy is not None and self.policy.reads_rotated:
            raise ValueError(f"{self.policy.name} works on rotated keys, but they are stored unrotated here; use one or the other")
        if raw and any(m.positions == "repack" for _, m in self.layers):
            raise ValueError("keys stored unrotated are placed by order; a pruner that repacks positions would be undone")
        if raw and self.reader is not None and not self.reader.raw:
            raise ValueError(f"{self.reader.name} reads rotated keys, but {self.policy.name} stores them unrotated")  # type: ignore[union-attr]
        if (raw or (self.cache is not None and self.cache.rotates)) and cfg.mrope:
            raise ValueError(
                "keys are placed anew by one rotary id, but a picture's rows have three here (mrope); use methods that leave them in place"
            )
        if raw and cfg.window is not None:
            raise ValueError("compact positions and a sliding window contradict each other: distances inside the cache are not the text's")
        if self.policy is not None and self.cache is not None and self.cache.rotates:
            raise ValueError(f"{self.cache.name} turns keys and {self.policy.name} takes a plan, which cannot say so; use one or the other")
        if self.policy is not None and self.cache is not None and self.cache.edits:
            raise ValueError(
                f"{self.cache.name} changes what stays and {self.policy.name} takes a plan, which cannot say so; use one or the other"
            )
        if self.policy is not None and self.cache is not None and self.policy.aligned and not self.cache.aligned:
            raise ValueError(
                f"{self.policy.name} keeps one set for all heads, but {self.cache.name} leaves each head its own; use one or the other"
            )
        if self.policy is not None and self.cache is not None and self.policy.slots < self.cache.slots:
            raise ValueError(
                f"the cache is compressed to {self.cache.slots} slots and then cut to the policy's {self.policy.slots}; "
                f"give {self.policy.name} at least {self.cache.slots}"
            )

    def validate_encoder(self, cfg, until: int) -> None:
        """ValueError where the methods of site vit cannot work on the first `until` layers of an encoder of configuration `cfg`."""
        for k, method in self.vit:
            needs = method.layer(k, cfg.layers).needs
            first = 1 if method.at == "block" and needs != Needs() and not needs.own else 0
            last = until if method.at == "block" and not needs.own and method.restore is None else until - 1  # until: behind the last layer
            if not first <= k <= last:
                raise ValueError(f"{method.name} acts at layer {k}; of {until} layers that run it has places {first} to {last}")
            if needs.layers:
                raise ValueError(
                    f"{method.name} needs evidence of layers {needs.layers}; inside an encoder there is that of the layer at hand"
                )
            if method.restore is not None and (method.at != "block" or method.restore <= k):
                raise ValueError(f"{method.name} is undone before layer {method.restore}; it acts at {method.at!r} of layer {k}")
        at = [(k, m.at) for k, m in self.vit if m.at in ("around", "ahead")]
        if len(set(k for k, _ in at)) < len(at):
            raise ValueError(f"two methods act around or ahead of the attention of one layer: {at}")
        self._validate_rows(cfg, until)
        for i in () if self.select is None else self.select.needs.layers:
            if not -until <= i < until:
                raise ValueError(f"{self.select.name} needs evidence of layer {i}; {until} layers run")  # type: ignore[union-attr]

    def _validate_rows(self, cfg, until: int) -> None:
        """Evidence is about the rows that it is used on: not about those inside a reduction that is undone before."""
        undone = sorted(((k, min(m.restore, until), m) for k, m in self.vit if m.restore is not None), key=lambda entry: entry[0])
        for i, (_, end, outer) in enumerate(undone):
            for k, later, inner in undone[i + 1 :]:
                if k < end < later:
                    raise ValueError(
                        f"{inner.name} begins at layer {k}, inside {outer.name}, and must be undone before layer {end} too, not {later}"
                    )
        around = {k: m.name for k, m in self.vit if m.at == "around"}
        asked = []
        for k, method in self.vit:
            needs = method.layer(k, cfg.layers).needs
            if method.at in ("block", "attn") and needs != Needs() and not needs.own:
                asked.append((method.name, k - (method.at == "block"), k))
        if self.select is not None and self.select.needs != Needs() and not self.select.needs.own:
            asked += [(self.select.name, i % until, until) for i in self.select.needs.layers or (-1,)]
        for name, layer, place in asked:
            inside = [m.name for _, end, m in undone if layer < end <= place] + [n for k, n in around.items() if k == layer]
            if inside:
                raise ValueError(
                    f"{name} needs evidence of layer {layer} about all rows; there it is about those inside {inside[0]}, which is undone"
                )

    def _validate_heads(self, cfg) -> None:
        for i, sizes in enumerate(self.heads):
            if sum(sizes) != cfg.kv_heads or min(sizes, default=-1) < 0 or len(sizes) != len(self.heads[0]):
                raise ValueError(f"heads[{i}] = {sizes}: the groups of each layer, equally many, must share out {cfg.kv_heads} KV heads")
        if self.heads and len(self.heads) != cfg.layers:
            raise ValueError(f"heads has groups for {len(self.heads)} layers; the model has {cfg.layers}")
        groups = len(self.heads[0]) if self.heads else 1
        for method in (self.cache, self.policy):
            if method is not None and method.groups not in (1, groups):
                raise ValueError(
                    f"{method.name} tells {method.groups} head groups apart; Recipe.heads says {groups} a layer (jaxtok.core.heads.split)"
                )
        if self.reader is not None and self.reader.attends and self.policy is not None:
            raise ValueError(f"{self.reader.name} attends by itself and knows slots by where they were written; use no policy beside it")
        if self.reader is not None and self.reader.offload and self.policy is not None:
            raise ValueError(
                f"{self.policy.name} writes to any slot, but {self.reader.name} keeps the prompt's in host memory; set offload=False"
            )
        if self.reader is not None and groups > 1:
            raise ValueError(f"{self.reader.name} reads caches of one head group; Recipe.heads splits them into {groups}")


def _early(recipe: Recipe):
    """What acts on a prompt as a whole: the prompt's method, the compressor and those that it holds."""
    if recipe.prompt is not None:
        yield recipe.prompt
    yield from _held(recipe.cache)
    yield from _held(recipe.policy)


def _held(method):
    """A compressor and those that it, or a step policy, holds."""
    if isinstance(method, protocols.CacheCompressor):
        yield method
    if isinstance(method, protocols.CacheCompressor | protocols.CachePolicy):
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            value = getattr(method, field.name)
            for inner in value if isinstance(value, tuple) else (value,):
                yield from _held(inner)
