"""Contextual memory reweaving. Source: arXiv:2502.02046 names no equation and no code: this is our reading, not a reproduction."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxtok.core import check
from jaxtok.core.mixer import Layer, Mixer
from jaxtok.core.registry import register

LOW = float(jnp.finfo(jnp.float32).min)


class Captured(NamedTuple):
    """Rows of one layer that are remembered."""

    rows: jax.Array  # [b m c]
    there: jax.Array  # bool [b m]


def capture(x: Float[Array, "b n c"], live: Bool[Array, "b n"], slots: int) -> Captured:
    """The `slots` live rows of largest scaled dot product with the mean live row; no gradient through the choice."""
    y = jnp.where(live[..., None], lax.stop_gradient(x).astype(jnp.float32), 0.0)
    mean = jnp.sum(y, 1) / jnp.maximum(jnp.sum(live, -1, keepdims=True), 1).astype(jnp.float32)
    score = jnp.where(live, jnp.einsum("bnc,bc->bn", y, mean) * max(x.shape[-1], 1) ** -0.5, LOW)
    index = lax.top_k(score, min(slots, x.shape[1]))[1]
    there = jnp.take_along_axis(live, index, 1)
    return Captured(jnp.where(there[..., None], jnp.take_along_axis(x, index[..., None], 1), jnp.zeros((), x.dtype)), there)


def reweave(x: Float[Array, "b n c"], memory: list[Captured], read: list[Float[Array, "c c"]]) -> Float[Array, "b n c"]:
    """f32: r_t = sum over layers l and slots j of softmax_{l,j}(x_t . H_lj / sqrt(c)) H_lj W_l; 0 where nothing is remembered."""
    rows = [m.rows.astype(jnp.float32) for m in memory]
    there = jnp.concatenate([m.there for m in memory], 1)[:, None]
    logit = jnp.einsum("bnc,bmc->bnm", x.astype(jnp.float32), jnp.concatenate(rows, 1)) * max(x.shape[-1], 1) ** -0.5
    share = jnp.where(there, jax.nn.softmax(jnp.where(there, logit, LOW), -1), 0.0)
    return share @ jnp.concatenate([h @ w.astype(jnp.float32) for h, w in zip(rows, read, strict=True)], 1)


@register(
    "memory_reweaving",
    site="attention",
    paper="arXiv:2502.02046",
    title="Contextual Memory Reweaving in Large Language Models Using Layered Latent State Reconstruction",
    authors="Frederick Dillon and Gregor Halvorsen and Simon Tattershall and Magnus Rowntree and Gareth Vanderpool",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReweaving(Mixer):
    """Our reading, not a reproduction: rows of earlier layers are remembered and woven back into later ones.

        at a layer l of `layers`: H_l = its `slots` live rows most like the mean row (scaled dot product), normed, as the block reads them
        at each layer behind the first of them: r_t = sum_{l,j} softmax_{l,j}(x_t . H_lj / sqrt(c)) H_lj W_l
        the attention block gives   own attention + tanh(gate) r_t

    `gate` starts at 0: the model is then what it was. W_l [c c] are learned, one for each pair of a reading and a remembered layer. A
    buffer has a fixed size (slots rows a layer, fewer if there are fewer) and no axis of rows: rows may be dropped or merged on the way.
    The paper gives no equation (its abstract: "integrates past contextual embeddings", "without external memory modules"); what is
    remembered, how it is chosen and where it enters are ours, and none of its figures can be verified or are claimed. The layer's own
    attention stays, so the cost stays quadratic; what is added is linear, 2 n slots c a remembered layer and product.

    slots=0, layers=() or gate=0: the base model. ValueError: layers not ascending, a layer or slots < 0.
    """

    layers: tuple[int, ...] = (0, 2, 4)
    slots: int = 32

    def __post_init__(self):
        check.kind("layers", self.layers, tuple)
        check.count("slots", self.slots, 0)
        for i in self.layers:
            check.count("layers", i, 0)
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={self.layers} must ascend")

    def weights(self, key: jax.Array, cfg, i: int) -> dict[str, Array]:
        behind = [l for l in self.layers if l < i] if self.slots else []
        c = cfg.width
        read = {f"read{l}": c**-0.5 * jax.random.normal(jax.random.fold_in(key, l), (c, c), jnp.float32) for l in behind}
        return read | ({"gate": jnp.zeros((), jnp.float32)} if behind else {})

    def mix(self, params: dict[str, Array], state: tuple[Captured, ...], i: int, layer: Layer) -> tuple[Array, tuple[Captured, ...]]:
        block, live = layer.out(layer.attend(layer.q, layer.k, layer.v)), layer.pos >= 0
        if not self.slots:
            return block, state
        behind = [l for l in self.layers if l < i]
        if behind:
            woven = jnp.tanh(params["gate"].astype(jnp.float32)) * reweave(layer.x, list(state), [params[f"read{l}"] for l in behind])
            block = block + jnp.where(live[..., None], woven, 0.0).astype(block.dtype)
        return block, (*state, capture(layer.x, live, self.slots)) if i in self.layers else state
