"""PiToMe, merging by energy. Source: arXiv:2405.16148; hchautran/PiToMe (algo/pitome/merge.py, patch/), CC BY-NC: written from the formulas."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import by_falling, cosine, join, mean_keys, movable, removal
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.score import energy
from jaxtok.core.select import identity
from jaxtok.core.types import Evidence, Needs, Plan, Tokens

SPLITS = ("alternate", "halves", "bsm")


@register(
    "pitome",
    site="vit",
    paper="arXiv:2405.16148",
    title="Accelerating Transformers with Spectrum-Preserving Token Merging",
    authors="Hoai-Chau Tran and Duy M. H. Nguyen and Duy M. Nguyen and Trung-Tin Nguyen and Ngan Le and Pengtao Xie and Daniel Sonntag "
    "and James Y. Zou and Binh T. Nguyen and Mathias Niepert",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PiToMe(Reducer):
    """Merge r rows that have many close neighbours, and protect the isolated ones, between attention and MLP.

        c_ij = cos(v_i, v_j);   energy E_i = mean_j f(c_ij - m),   f(z) = z for z > 0, alpha (exp(z) - 1) below   (image)
                                       E_i = mean_j exp(-((1 - c_ij) / s)^2 / 2) / (s sqrt(2 pi)),  s = 1 - m     (kernel="gauss", text)
        rows by falling E: the first 2r may merge, the rest are protected
        split "alternate" (image): ranks 0, 2, ... are sources, 1, 3, ... destinations; "halves" (text): the first r, the next r
        each source joins its most similar destination;  x' = sum of size * x / sum of size

    v: keys averaged over heads (`metric="keys"`), or the rows themselves ("hidden": CLIP, BLIP). Split "bsm" (half of the layers of DeiT
    and MAE): all rows alternate by rank, and ToMe's rule takes the r sources of best partner. r = floor(T - T ratio), T without rows of
    kind SPECIAL (`special` of them, static), at most T // 2; or `remove`. The margin m falls over the layers: m = margin - fall * l / L (0-based l;
    fall=None: margin, so that it ends at 0). Output: SPECIAL rows, protected rows by energy ("bsm": sources that stay, best partner first),
    destinations by energy. `variant="paper"` (not confirmed): f(c) = c above the margin, summed over the neighbours without i.

    Means run over live rows. ratio=1 changes nothing. `keep` [b]: live rows to leave at most. The official code leaves proportional
    attention off. `schedule` makes the recipe's entries.
    """

    at: ClassVar[str] = "attn"
    conserves: ClassVar[bool] = True

    ratio: float = 0.9
    remove: int | None = None
    margin: float = 0.75
    fall: float | None = None
    alpha: float = 1.0
    kernel: str = "elu"
    split: str = "alternate"
    metric: str = "keys"
    variant: str = "official"
    special: int = 1

    def __post_init__(self):
        check.one_of("kernel", self.kernel, ("elu", "gauss"))
        check.one_of("split", self.split, SPLITS)
        check.one_of("metric", self.metric, ("keys", "hidden"))
        check.one_of("variant", self.variant, ("official", "paper"))
        check.count("special", self.special, 0)
        if self.remove is not None:
            check.count("remove", self.remove, 0)
        else:
            check.share("ratio", self.ratio)
        for name in ("margin", "alpha") + (() if self.fall is None else ("fall",)):
            check.real(name, getattr(self, name))
        if self.kernel == "gauss" and not self.margin < 1:
            raise ValueError(f"the Gaussian energy has deviation 1 - margin; margin must be below 1, got {self.margin}")

    @property
    def needs(self) -> Needs:
        return Needs(keys=self.metric == "keys")

    def layer(self, i: int, layers: int) -> "PiToMe":
        fall = self.margin if self.fall is None else self.fall
        return dataclasses.replace(self, margin=self.margin - fall * i / layers, fall=0.0)

    def count(self, n: int, n_kind: int) -> int:
        rows = max(n - self.special, 0)
        remove = math.floor(rows - rows * self.ratio) if self.remove is None else self.remove
        return n - min(remove, rows // 2)

    def plan(self, params, state, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        room, free, live = self.count(n, n), movable(tokens), tokens.pos >= 0
        if room == n and keep is None:
            return state, identity(tokens.pos.shape)
        v = mean_keys(evidence) if self.metric == "keys" else tokens.x
        like, paper = cosine(v, v), self.variant == "paper"
        kind = "gauss" if self.kernel == "gauss" else "cut" if paper else "elu"
        rank = by_falling(energy(like, free, self.margin, kind=kind, alpha=self.alpha, itself=not paper), free)
        remove = removal(live, keep, n - room, room, jnp.sum(free, -1, dtype=jnp.int32) // 2)
        r, even = remove[:, None], rank % 2 == 0
        source = {"alternate": (rank < 2 * r) & even, "halves": rank < r, "bsm": even}[self.split] & free
        target = {"alternate": (rank < 2 * r) & ~even, "halves": (rank >= r) & (rank < 2 * r), "bsm": ~even}[self.split] & free
        first = rank
        if self.split == "bsm":
            best = jnp.max(jnp.where(target[:, None], like, -jnp.inf), -1)
            first = by_falling(best, source)
        row = jnp.arange(n, dtype=jnp.int32)[None]
        place = jnp.where(target, 2 * n + rank, jnp.where(free, n + first, row))
        return state, join(tokens, like, source, target, remove, n, room, weight=tokens.size, place=place)


def schedule(ratio: float, layers: int, model: str = "deit", special: int = 1) -> tuple[tuple[int, PiToMe], ...]:
    """The entries of Recipe.vit at one ratio a layer, with the official margins and splits of `model`.

    "deit", "mae": margin 0.75, split "bsm" in the first ceil(L/2) layers, or in the last floor(L/2); "augreg", "clip_hf", "blip": 0.9
    (the last two on hidden rows; BLIP leaves its last layer alone), "clip": 0.95 on hidden rows; "bert": text, margin 0.9 - 0.25 l / L, in the first three layers only.
    """
    hidden = PiToMe(ratio=ratio, special=special, margin=0.95 if model == "clip" else 0.9, metric="hidden")
    if model in ("deit", "mae"):
        one = PiToMe(ratio=ratio, special=special)
        half = math.ceil(layers / 2)
        bsm = dataclasses.replace(one, split="bsm")
        return tuple((i, bsm if (i < half) == (model == "deit") else one) for i in range(layers))
    if model == "augreg":
        return tuple((i, PiToMe(ratio=ratio, special=special, margin=0.9)) for i in range(layers))
    if model == "bert":
        text = PiToMe(ratio=ratio, special=special, margin=0.9, fall=0.25, kernel="gauss", split="halves")
        return tuple((i, text) for i in range(min(3, layers)))
    check.one_of("model", model, ("deit", "mae", "augreg", "clip", "clip_hf", "blip", "bert"))
    return tuple((i, hidden) for i in range(layers - (model == "blip")))
