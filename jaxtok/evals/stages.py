"""What the methods of sites vit, select and layers make of one picture, stage by stage: which patches stay, which join, which go.

A stage is one place where a method of the recipe acts. The model runs once, with methods that also tell what they plan; nothing else of
it changes.
"""

import dataclasses
import functools
import sys
import typing
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core import registry
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import assignment, gather, representative
from jaxtok.core.reducer import Reducer
from jaxtok.core.selector import pictured
from jaxtok.models import decoder, vit, vlm
from jaxtok.models.config import EncoderConfig
from jaxtok.models.vlm import VlmConfig

SITES = ("vit", "select", "layers")
USUAL = {"depth": 24, "patches": 576, "kept": 64}  # what numbers of layers and rows in papers' settings are about: CLIP-L/14 at 336 pixels
_ORDER = {"block": 0, "around": 1, "ahead": 1, "attn": 2}  # in which the methods of one tower layer act
_WHERE = {
    "block": "before tower layer {}",
    "attn": "in tower layer {}, behind its attention",
    "around": "around the attention of tower layer {}, undone after it",
    "ahead": "ahead of the attention of tower layer {}",
}


class Sizes(NamedTuple):
    """What the fields of a method are made from."""

    grid: tuple[int, int]  # rows, columns of patches
    special: int  # rows before them in the tower
    tower: int  # tower layers that run
    layers: int  # of the decoder; 0 = there is none

    @classmethod
    def of(cls, cfg: VlmConfig | EncoderConfig) -> "Sizes":
        if isinstance(cfg, EncoderConfig):
            return cls(cfg.grid, cfg.prefix, cfg.layers, 0)
        return cls(cfg.vision.grid, cfg.vision.prefix, cfg.until, cfg.text.layers)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


class Stage(NamedTuple):
    """The patches behind one place."""

    site: str
    place: int  # the layer; 0 for site select
    method: str
    where: str
    group: np.ndarray  # i32 [rows columns]: the row in which a patch is (of a mixture: mostly); -1 = dropped
    rows: int  # live image rows that go on
    untrained: bool  # the method has weights, and they are random here

    @property
    def merged(self) -> np.ndarray:
        """bool [rows columns]: patches that share their row."""
        return (self.group >= 0) & (np.sum(self.group[..., None, None] == self.group, (-1, -2)) > 1)

    @property
    def counts(self) -> dict[str, int]:
        """Patches kept alone, patches merged and the rows that they became, patches dropped, image rows that go on."""
        merged, gone = self.merged, self.group < 0
        groups = len(np.unique(self.group[merged]))
        kept = int((~merged & ~gone).sum())
        return {"kept": kept, "merged": int(merged.sum()), "groups": groups, "dropped": int(gone.sum()), "rows": self.rows}


# --- methods by name -----------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    spec: str
    cls: Any
    places: tuple[int, ...]
    keep: int | None


def rows_of(budget: float | int, patches: int) -> int:
    """A number of rows, or a share of the patches (half up, one at least); ValueError for more than there are."""
    if isinstance(budget, int) and budget > patches:
        raise ValueError(f"{budget} rows of a picture of {patches} patches; give at most that")
    return budget if isinstance(budget, int) else max(1, int(Fraction(str(budget)) * patches + Fraction(1, 2)))


def recipe_of(specs: Sequence[str], sizes: Sizes, keep: int) -> Recipe:
    """The recipe of methods by name that leaves about `keep` image rows.

    A spec is one of `registry.build`, and two options more: places=1+3 (layers) and keep=36 or keep=25% (rows left behind this method).
    Methods act in the order of the sites; the number of rows falls by the same factor at each place. Fields that a spec leaves open follow
    from their names (`fields`). Without `places`: a quarter, a half and three quarters into the depth for methods that are made to act
    several times (they remove a number of rows, carry a state, or come with a schedule), a quarter for the others. A method that needs
    the scores of an earlier site brings the method of its paper along that gives them (vflowopt.layers: vflowopt.select).

    ValueError: no such method, a site that has no picture, two methods at the output of the tower, a decoder's method without a decoder.
    """
    asked = _completed([_ask(spec, sizes) for spec in specs], sizes)
    if not asked:
        raise ValueError(f"no method; known: {', '.join(n for site in SITES for n in registry.names(site))}")
    if len([a for a in asked if a.cls.site == "select"]) > 1:
        raise ValueError(f"one method can act at the tower's output, got {', '.join(a.spec for a in asked if a.cls.site == 'select')}")
    sites: dict[str, list] = {site: [] for site in SITES}
    n, left = sizes.patches, sum(len(a.places) for a in asked)
    for a in asked:
        end = (
            min(n, keep if a.keep is None else a.keep)
            if a.keep is not None or left == len(a.places)
            else _between(n, keep, len(a.places), left)
        )
        left -= len(a.places)
        for i, place in enumerate(a.places):
            whole = _carries(a.cls)  # one method that all places share
            after = end if whole else _between(n, end, 1, len(a.places) - i)
            if not i or not whole:
                fill = functools.partial(
                    fields, before=n, after=after, places=a.places if whole else a.places[i:], sizes=sizes, whole=whole
                )
                method = registry.build(a.spec, after, fill)
            sites[a.cls.site].append((place, method))
            if method.at != "around" and method.restore is None:
                n = min(n, max(1, rows_left(method, place, n, sizes)))
    return Recipe(vit=tuple(sites["vit"]), select=next((m for _, m in sites["select"]), None), layers=tuple(sites["layers"]))


def rows_left(method: Reducer, place: int, n: int, sizes: Sizes) -> int:
    """Image rows that a method leaves of n at a place."""
    layers = sizes.layers if method.site == "layers" else sizes.tower  # type: ignore[attr-defined]
    return method.layer(place, layers).count(n + sizes.special, n) - sizes.special


def _between(n: int, end: int, step: int, steps: int) -> int:
    """Rows left after `step` of `steps` equal factors from n to end."""
    return max(1, round(n * (min(end, n) / n) ** (step / steps)))


def _ask(spec: str, sizes: Sizes) -> _Asked:
    name, _, rest = spec.partition(":")
    cls: Any = registry.get(name.strip())
    if cls.site not in SITES:
        raise ValueError(f"{name.strip()} acts at site {cls.site!r}; what can be drawn are methods of {', '.join(SITES)}")
    if cls.site == "layers" and not sizes.layers:
        raise ValueError(f"{name.strip()} acts between a decoder's layers, and the model is an encoder; give a vision-language model")
    known = {f.name for f in dataclasses.fields(cls)}
    own: dict[str, str | None] = {"places": None, "keep": None}
    options = []
    for item in filter(None, map(str.strip, rest.split(","))):
        key, _, value = item.partition("=")
        if key.strip() in own and key.strip() not in known:
            own[key.strip()] = value.strip()
        else:
            options.append(item)
    places = _places(cls, sizes)
    if (at := own["places"]) is not None:
        if cls.site == "select" or not all(p.strip().isdecimal() for p in at.split("+")):
            raise ValueError(f"{spec!r}: places are layers, as in places=1+3, of methods between layers")
        places = tuple(sorted({int(p) for p in at.split("+")}))
    keep = None if own["keep"] is None else rows_of(registry.parse_budget(own["keep"]), sizes.patches)
    return _Asked(":".join([name.strip(), ",".join(options)]).rstrip(":"), cls, places, keep)


def _completed(asked: list[_Asked], sizes: Sizes) -> list[_Asked]:
    """By site; with the methods that others cannot do without."""
    for a in [a for a in asked if a.cls.site == "layers"]:
        one, partner = _probe(a.cls, a.places, sizes), a.cls.name.partition(".")[0] + ".select"
        if one is not None and getattr(one.needs, "score", False) and not any(b.cls.site == "select" for b in asked):
            asked = [*asked, _ask(partner, sizes)]
    return sorted(asked, key=lambda a: SITES.index(a.cls.site))


def _probe(cls: Any, places: tuple[int, ...], sizes: Sizes) -> Any:
    """An instance for half of the patches; None where fields do not go together (or must be said)."""
    half = max(1, sizes.patches // 2)
    try:
        return cls(**fields(cls, before=sizes.patches, after=half, places=places, sizes=sizes, whole=_carries(cls)))
    except (ValueError, TypeError):
        return None


def _carries(cls: Any) -> bool:
    """Whether a method carries a state from place to place."""
    return cls.start is not Reducer.start and not any(f.name == "restore" for f in dataclasses.fields(cls))


def _places(cls: Any, sizes: Sizes) -> tuple[int, ...]:
    """The layers at which a method acts unless a spec says so."""
    if cls.site == "select":
        return (0,)
    names, module = {f.name for f in dataclasses.fields(cls)}, sys.modules[cls.__module__]
    several = "remove" in names or _carries(cls) or any(hasattr(module, name) for name in ("schedule", cls.name.partition(".")[0]))
    deep = sizes.tower if cls.site == "vit" else sizes.layers
    places = tuple(sorted({min(max(deep * i // 4, 1), max(deep - 1, 0)) for i in (1, 2, 3)}))
    if not several or "restore" in names:
        return places[:1]
    while "stages" in names and len(places) > 1 and _probe(cls, places, sizes) is None:  # it takes fewer
        places = places[:-1]
    return places


def fields(cls: Any, *, before: int, after: int, places: tuple[int, ...], sizes: Sizes, whole: bool = False) -> dict[str, Any]:
    """Field -> value, by the fields' names, for a method that has `before` image rows and leaves `after` of them.

    places: this one and those that follow; `whole`: the instance is for all of them.

    Counts of rows and grids are those of the model; numbers of layers and of rows that belong to a paper's model shrink in proportion.
    """
    (rows, cols), known = sizes.grid, {f.name: f for f in dataclasses.fields(cls)}
    high = max(1, min(rows, round((after * rows / cols) ** 0.5)))
    coarse = (high, max(1, min(cols, after // high)))
    defaults: dict[str, Any] = {name: f.default for name, f in known.items()}
    default = lambda name: defaults[name]
    # what a method needs to be told, or takes as optional
    told: dict[str, Any] = {
        "capacity": after, "remove": -(-(before - after) // (len(places) if whole else 1)), "images": before, "k": max(1, round(before / after)), "grid": sizes.grid, "out": coarse,
        "clusters": coarse, "restore": None, "last": places[-1], "by": places[-1], "contextual": after // 7,
    }  # fmt: skip
    if getattr(cls, "floor", False):  # no budget is kept
        del told["capacity"]
    out = {name: value for name, value in told.items() if name in known and default(name) is dataclasses.MISSING}
    out |= {name: told[name] for name in ("capacity", "remove", "last", "by") if name in known and name in told and default(name) is None}
    if "special" in known:
        out["special"] = sizes.special + bool("cross" in known and default("cross"))
    if "most" in known and "window" in known:
        out["most"] = (before - after) // (default("window") ** 2 - 1)
    if "shape" in known:
        out["shape"] = sizes.grid
    for name in ("width", "side"):
        if name in known and type(default(name)) is int:
            out[name] = cols
    for name, share in (("contextual", after / USUAL["kept"]), ("runs", before / USUAL["patches"])):
        if name in known and type(default(name)) is int:
            out[name] = max(1, min(default(name), int(default(name) * share)))
    if "made" in known and "recycle" in known:
        out["made"] = _made(before - after, after, default("recycle"))
    if "stages" in known and whole and len(places) > 1:
        left = [before, *(_between(before, after, i, len(places)) for i in range(1, len(places) + 1))]
        wide = len(
            typing.get_args(typing.get_args(typing.get_type_hints(cls)["stages"])[0])
        )  # (layer, rows left), or (layer, rows, rows left, made)
        short = lambda k, a, b: (k, b) if wide == 2 else (k, a, b, _made(a - b, b, default("recycle")))
        out["stages"] = tuple(short(*stage) for stage in zip(places, left, left[1:], strict=False))
    for name in ("threshold", "least"):
        if name in known and type(default(name)) is int:
            out[name] = min(default(name), after)
    if "layers" in known and isinstance(default("layers"), tuple) and sizes.tower < USUAL["depth"] - 1:
        scaled = [i if i < 0 else i * sizes.tower // USUAL["depth"] for i in default("layers")]
        out["layers"] = tuple(scaled if len(scaled) == 2 else dict.fromkeys(scaled))
    return out


def _made(dropped: int, after: int, recycle: float) -> int:
    """Rows that are made of a share of the dropped ones: one of ten."""
    return min(after, (int(recycle * dropped) + 1) // 10 + 1)


# --- one run of the model --------------------------------------------------------------------------------------------------


def _told(method: Reducer, seen: list, kinds: dict[type, type]) -> Reducer:
    """`method`, which appends (rows of the patches before, plan, image rows left) to `seen` whenever it plans."""
    base = type(method)

    def plan(self, params, state, tokens, evidence, keep=None):
        state, made = base.plan(self, params, state, tokens, evidence, keep)
        index = representative(made)
        live = (index >= 0) & gather(pictured(tokens), jnp.maximum(index, 0))
        seen.append((tokens.source, assignment(made), jnp.sum(live, -1)))
        return state, made

    kind = kinds.setdefault(base, type(base.__name__, (base,), {"plan": plan}))  # one a run: equal methods stay equal
    out = object.__new__(kind)
    out.__dict__.update(method.__dict__)
    return out


def learned(cfg: VlmConfig | EncoderConfig, recipe: Recipe) -> dict[str, Any]:
    """Random weights of the methods that have any, for params["methods"]."""
    key = jax.random.key(0)
    if isinstance(cfg, EncoderConfig):
        return recipe.init_params(key, cfg)
    tower, text = recipe.init_params(key, cfg.vision), recipe.init_params(key, cfg.text)
    return {site: (text if site == "layers" else tower)[site] for site in SITES if site in tower}


def stages(cfg: VlmConfig | EncoderConfig, params, image: np.ndarray, ids: Sequence[int] | None, recipe: Recipe) -> list[Stage]:
    """What `recipe` (sites vit, select, layers) makes of one picture, in the order in which it happens.

    image: f32 [y x ch] as the tower takes it. ids: a prompt with the placeholders of one picture; an encoder takes none.
    ValueError: what the model refuses; a method that looks at the text, on an encoder.
    """
    seen: list = []
    kinds: dict[type, type] = {}
    tell = functools.partial(_told, seen=seen, kinds=kinds)
    watched = recipe.replace(
        vit=tuple((k, tell(m)) for k, m in recipe.vit),
        select=None if recipe.select is None else tell(recipe.select),
        layers=tuple((k, tell(m)) for k, m in recipe.layers),
    )
    own = learned(cfg, recipe)
    params = params | {"methods": own} if jax.tree.leaves(own) else params
    sizes, key = Sizes.of(cfg), jax.random.key(0)
    if isinstance(cfg, VlmConfig):
        if ids is None or sum(i == cfg.image_token for i in ids) != cfg.patches:
            raise ValueError(f"the prompt needs the {cfg.patches} placeholders of one picture")
        first = [j for j, i in enumerate(ids) if i == cfg.image_token][cfg.patches - sizes.patches :]
    elif recipe.select is not None and recipe.select.needs.text:
        raise ValueError(f"{recipe.select.name} looks at the text beside the picture; an encoder has none: give a vision-language model")
    elif recipe.layers:
        raise ValueError("the model is an encoder; methods between a decoder's layers need a vision-language model")
    else:
        first = None

    def run(params, image):
        del seen[:]
        if isinstance(cfg, VlmConfig):
            tokens = vlm.embed(cfg, params, image[None, None], jnp.asarray(ids, jnp.int32)[None], None, watched, key=key, proportional=True)
            if watched.layers:
                decoder.prefill(cfg.text, params, tokens, watched, new=0, key=key)
        else:
            until = cfg.layers - 1 if watched.select is not None and watched.select.needs.own else cfg.layers
            found = vit.encode(cfg, params, vit.embed(cfg, params, image[None]), watched, until=until, key=key, proportional=True)
            vit.select(params, found, watched)
        return tuple(seen)

    told = jax.device_get(jax.jit(run)(params, jnp.asarray(image)))
    # entries in the order in which they act
    entries = [("vit", k, m) for k, m in sorted(recipe.vit, key=lambda entry: (entry[0], _ORDER[entry[1].at]))]
    entries += [] if recipe.select is None else [("select", 0, recipe.select)]
    entries += [("layers", k, m) for k, m in sorted(recipe.layers, key=lambda entry: entry[0])]
    weights = {site: own.get(site) for site in SITES}
    in_tower = sizes.special + np.arange(sizes.patches)
    out, open_ = [], []
    for (site, k, method), (source, plan, rows) in zip(entries, told, strict=True):
        open_ = [(end, where) for end, where in open_ if site == "vit" and k < end]
        start = open_[-1][1] if open_ else np.asarray(first) if site == "layers" else in_tower
        before = np.where(start < 0, -1, source[0][start])  # of each patch: its row as the method plans
        after = np.where(before < 0, -1, plan[0][before])
        if method.restore is not None:
            open_.append((method.restore, before))
        out.append(
            Stage(
                site=site, place=k, method=method.name, where=_where(site, k, method), group=after.reshape(sizes.grid).astype(np.int32),
                rows=int(rows[0]), untrained=bool(jax.tree.leaves(weights[site])) and bool(jax.tree.leaves(_weights(cfg, site, method))),
            )
        )  # fmt: skip
    return out


def _weights(cfg: VlmConfig | EncoderConfig, site: str, method: Reducer) -> Any:
    part = cfg if isinstance(cfg, EncoderConfig) else cfg.text if site == "layers" else cfg.vision
    return jax.eval_shape(lambda key: method.init_params(key, part), jax.random.key(0))


def _where(site: str, k: int, method: Reducer) -> str:
    if site == "select":
        return "at the tower's output"
    if site == "layers":
        return f"before decoder layer {k}"
    return _WHERE[method.at].format(k) + ("" if method.restore is None else f", undone before layer {method.restore}")
