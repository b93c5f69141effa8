"""DyVTE. Source: arXiv:2411.19628; DoubtedSteam/DyVTE (modeling_llama.py), no licence: written from the formulas."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import POSITIONS
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.select import pack
from jaxtok.core.selector import asking, pictured
from jaxtok.core.types import Evidence, Plan, Tokens


def look(tokens: Tokens) -> Float[Array, "b wide"]:
    """What the gate reads, f32: the mean of the text rows behind the image but the last, and the last row."""
    x, asks = tokens.x.astype(jnp.float32), asking(tokens)
    last = asks & (tokens.pos == jnp.max(tokens.pos, -1, keepdims=True))
    mean = lambda among: (
        jnp.einsum("bn,bnc->bc", among.astype(jnp.float32), jnp.where(among[..., None], x, 0.0))
        / jnp.maximum(jnp.sum(among, -1, keepdims=True), 1).astype(jnp.float32)
    )
    return jnp.concatenate([mean(asks & ~last), mean(last)], -1)


def gate(params, x: Float[Array, "b wide"]) -> Float[Array, "b 2"]:
    """Logits of (stay, exit), f32: Linear without bias, GELU, Linear."""
    wide = jax.nn.gelu(x @ params["up"].astype(jnp.float32), approximate=False)
    return wide @ params["down"].astype(jnp.float32) + params["bias"].astype(jnp.float32)[None]


@register(
    "dyvte",
    site="layers",
    paper="arXiv:2411.19628",
    title="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
    authors="Qiong Wu and Wenhao Lin and Yiyi Zhou and Weihao Ye and Zhanpeng Zen and Xiaoshuai Sun and Rongrong Ji",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DyVTE(Reducer):
    """All image rows of a sequence go at once, behind the first layer at which a learned gate says that the text has read them.

        x = [mean of the text rows behind the image, without the last | last row]   (rows as they enter the layer, [2c])
        (stay, exit) = W_2 GELU(W_1 x) + b,   W_1 [2c hidden] without bias;    image rows go where exit - stay > margin (0)

    Name the same method at the places 1 to L - 1 (`dyvte`): each place has weights of its own, trained by jaxtok.train.dyvte. Decided
    once, while the prompt is prefilled, for each sequence (the official code takes one at a time). Rows keep their rotary ids.

    When the gate fires is data, so it cannot change shapes: rows die in their places (the outputs are those of the short sequence, steps do
    not read the dead rows, but no work is saved in a batch of static size). by: the layer before which the image rows of all sequences go
    at the latest, whatever the gate says: from there on the sequence is `images` rows shorter, which saves real work (forced: the instance
    there). A gate that never fires and by=None: the plain model. A traced `keep` without room for all rows of a sequence lets its image
    rows go.
    """

    floor: ClassVar[bool] = True

    images: int
    by: int | None = None
    hidden: int = 2048
    margin: float = 0.0
    positions: str = "keep"
    forced: bool = False

    def __post_init__(self):
        check.count("images", self.images)
        check.count("hidden", self.hidden)
        check.between("margin", self.margin, -1e30, 1e30)
        check.one_of("positions", self.positions, POSITIONS)
        check.kind("forced", self.forced, bool)
        if self.by is not None:
            check.count("by", self.by, 0)

    def init_params(self, key, cfg):
        a, b = jax.random.split(key)
        up = (2 * cfg.width) ** -0.5 * jax.random.normal(a, (2 * cfg.width, self.hidden), jnp.float32)
        down = self.hidden**-0.5 * jax.random.normal(b, (self.hidden, 2), jnp.float32)
        return {"up": up, "down": down, "bias": jnp.zeros((2,), jnp.float32)}

    def layer(self, i: int, layers: int) -> "DyVTE":
        return dataclasses.replace(self, forced=True) if self.by is not None and i >= self.by else self

    def start(self, params, tokens: Tokens) -> Held:
        return Held(rest=jnp.zeros(tokens.seen.shape, bool))

    def count(self, n: int, n_kind: int) -> int:
        if n < self.images:
            raise ValueError(f"{self.name} is told of images={self.images} rows, but {n} rows come to it; give what enters its layer")
        return n - self.images if self.forced else n

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        live, free = tokens.pos >= 0, pictured(tokens)
        if self.forced:
            gone = jnp.ones(tokens.seen.shape, bool)
        else:
            stay, leave = jnp.moveaxis(jax.lax.stop_gradient(gate(params, look(tokens))), -1, 0)
            gone = state.rest | (leave - stay > self.margin)
        if keep is not None:
            gone = gone | (keep < jnp.sum(live, -1, dtype=jnp.int32))
        mask = live & ~(free & gone[:, None])
        return Held(rest=gone), pack(mask, self.count(live.shape[1], self.images), jnp.where(free, 0.0, jnp.inf))


def dyvte(images: int = 576, *, layers: int = 32, by: int | None = None, hidden: int = 2048, positions: str = "keep") -> Recipe:
    """The paper's recipe for a decoder of `layers` layers: a gate behind each of them but the last, or behind those before `by`, where all
    image rows go."""
    check.count("layers", layers, 2)
    if by is not None:
        check.count("by", by, 1, layers - 1)
    method = DyVTE(images=images, by=by, hidden=hidden, positions=positions)
    return Recipe(layers=tuple((k, method) for k in range(1, layers if by is None else by + 1)))
