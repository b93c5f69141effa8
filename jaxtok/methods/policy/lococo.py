"""LoCoCo. Source: arXiv:2406.05317; VITA-Group/LoCoCo (llama/memory_compressor.py, llama/modeling_llama.py, train.py)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.core import budget, check, score, select
from jaxtok.core.protocols import CachePolicy, Held
from jaxtok.core.reduce import gather, reduce_kv
from jaxtok.core.registry import register
from jaxtok.core.types import KV, DensePlan, Evidence, Needs, Plan


@register(
    "lococo",
    site="policy",
    paper="arXiv:2406.05317",
    title="LoCoCo: Dropping In Convolutions for Long Context Compression",
    authors="Ruisi Cai and Yuandong Tian and Zhangyang Wang and Beidi Chen",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoCoCo(CachePolicy):
    """A memory of fixed size for text that comes in blocks: heavy hitters stay, a trained convolution folds the rest into the other slots.

    With M = the budget in force, after each block (a chunk of a prefill; in decoding, each time `slack` + 1 tokens have come) all slots
    become M:
        H = heavy * M slots, unchanged: the newest `local` tokens and those of largest A = attention received from the block's queries
        M - H slots k'_i = sum_s W_is k_s, v' alike, over the other S tokens:   W = (1 - a) E + a softmax_s(act(conv([k; v])))
            E: the next M - H best by A in order, one a row;  a: learned, 0.5 at first;  conv: 2 d -> M - H channels, `kernel` wide, zeros
            past both ends, the same for all heads, one a layer
    Rows of W sum to 1. a = 0 drops all but the M best; conv = 0 averages (ReLU(0) = 0); a budget over the text is the full model.
    Keys are merged as they are stored, after the rotary embedding. A merged slot stands where its row of E does, so that positions stay
    unique, and counts as one token: no log-size bias, as in the official code.

    A prefill's chunks go through `decode.prefill_chunked`, whose cache has M + slack + 1 + chunk slots however long the prompt (the
    paper's block: 512 tokens); a prefill at once is one block. Weights: {"conv" [l c 2d kernel], "bias" [l c], "alpha" [l]}, c = M - H of
    the capacity; training: jaxtok.train.lococo (learning rate x 1000 for the convolution, x 5 for alpha, the model frozen).

    Departures: slots lie in the order of their positions (variant="official": heavy hitters first, then merged ones), which is what the
    next convolution goes along; with h > g, A is averaged over a KV head's queries (the official code needs h = g); a block of M + 1 to
    M + slack tokens is compressed (officially: left until there are more); A is that of all queries since the last compression, where the
    official code decodes with that of the last query. With a traced budget under the capacity the last M - H channels serve.
    """

    recurrent: ClassVar[bool] = True

    capacity: int
    heavy: float = 0.5
    local: int = 0
    kernel: int = 21
    act: str | None = "relu"
    slack: int = 16
    variant: str = "paper"

    def __post_init__(self):
        check.between("heavy", self.heavy, 0.0, 1.0)
        check.count("local", self.local, 0)
        check.count("kernel", self.kernel)
        check.count("slack", self.slack)
        check.one_of("act", self.act, ("relu", None))
        check.one_of("variant", self.variant, ("paper", "official"))
        check.budget("capacity", self.capacity)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}: as many neighbours on both sides")
        if self.channels < 1:
            raise ValueError(f"heavy={self.heavy} of {self.capacity} slots leaves none to merge into; lower it, or use h2o")
        if self.local > self.capacity - self.channels:
            raise ValueError(f"local={self.local} must fit into the {self.capacity - self.channels} slots of heavy={self.heavy}")

    @property
    def every(self) -> int:  # type: ignore[override]
        return self.slack + 1

    @property
    def channels(self) -> int:
        """How many slots hold merged tokens at the full budget."""
        return self.capacity - (budget.capacity(self.heavy, self.capacity) if self.heavy else 0)

    @property
    def needs(self) -> Needs:
        return Needs(received=True)

    @property
    def step_needs(self) -> Needs:
        return Needs(received=True)

    def init_params(self, key: jax.Array, cfg) -> dict[str, Array]:
        """As torch begins a Conv1d: uniform within 1 / sqrt(2 d kernel)."""
        inputs = 2 * cfg.head_dim * self.kernel
        draw = lambda i, *shape: jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -(inputs**-0.5), inputs**-0.5)
        conv = draw(0, cfg.layers, self.channels, 2 * cfg.head_dim, self.kernel)
        return {"conv": conv, "bias": draw(1, cfg.layers, self.channels), "alpha": jnp.full((cfg.layers,), 0.5, jnp.float32)}

    def start(self, params, kv: KV, evidence: Evidence) -> Held:
        return Held(score.to_kv_heads(check.given("received", evidence.received), kv.k.shape[1]))

    def observe(self, params, state: Held, kv: KV, evidence: Evidence) -> Held:
        return Held(state.slots + self.start(params, kv, evidence).slots)

    def refit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> tuple[KV, Held]:
        kv = reduce_kv(self.fit(params, state, kv, evidence, keep), kv, count=False)
        return kv, Held(jnp.zeros(kv.pos.shape, jnp.float32))  # a block's scores are not accumulated over blocks

    def fit(self, params, state: Held, kv: KV, evidence: Evidence, keep=None) -> Plan | DensePlan:
        check.cache(kv)
        n = kv.pos.shape[-1]
        if keep is None and self.capacity >= n:
            return select.identity(kv.pos.shape)
        keep, live = budget.per_head(keep, kv.pos.shape[:2], self.capacity), kv.pos >= 0
        fits = (jnp.sum(live, -1, dtype=jnp.int32) <= keep)[..., None]
        heavy, following = self._split(state.slots, kv, live, keep)
        index = jnp.concatenate([_rows(heavy, self.capacity - self.channels), _rows(following, self.channels)], -1)
        w = jax.nn.one_hot(index, n, dtype=jnp.float32)  # -1 gives a row of zeros
        layer = 0 if evidence.layer is None else evidence.layer
        own = {name: jnp.take(x, layer, 0, mode="clip").astype(jnp.float32) for name, x in params.items()}
        mix = jnp.where(index[..., -self.channels :, None] >= 0, self._mix(own, kv, live & ~heavy), 0.0)
        mixed = (1 - own["alpha"]) * w[:, :, -self.channels :] + own["alpha"] * mix
        w = jnp.concatenate([w[:, :, : -self.channels], mixed], 2)
        if self.variant == "paper":
            order = jnp.argsort(index, -1)
            index, w = jnp.take_along_axis(index, order, -1), jnp.take_along_axis(w, order[..., None], 2)
        whole = _rows(live, self.capacity)
        return DensePlan(jnp.where(fits[..., None], jax.nn.one_hot(whole, n, dtype=jnp.float32), w), jnp.where(fits, whole, index))

    def _split(self, received, kv: KV, live, keep: Int[Array, "b g"]) -> tuple[Bool[Array, "b g s"], Bool[Array, "b g s"]]:
        """The heavy hitters, and the next best."""
        heavy = budget.keep(self.heavy, keep) if self.heavy else jnp.zeros_like(keep)
        newest = live & (kv.pos >= kv.seen[:, None, None] - jnp.minimum(self.local, heavy)[..., None])
        room = heavy - jnp.sum(newest, -1, dtype=jnp.int32)
        best = select.choose(received, live, jnp.maximum(room, 0), newest, most=self.capacity)
        return best, select.choose(received, live & ~best, keep - heavy, most=self.capacity)

    def _mix(self, own, kv: KV, rest: Bool[Array, "b g s"]) -> Float[Array, "b g c s"]:
        """softmax_s(act(conv([k; v]))) over the slots `rest`, as if they lay side by side."""
        (b, g, n), where = rest.shape, select.pack(rest)
        x = jnp.concatenate([kv.k.astype(jnp.float32), kv.v.astype(jnp.float32)], -1)
        x = jnp.swapaxes(gather(x, where.index), 2, 3).reshape(b * g, x.shape[-1], n)
        if x.shape[1] != own["conv"].shape[1]:
            raise ValueError(f"keys and values have {x.shape[1]} channels, the convolution takes {own['conv'].shape[1]}; init_params anew")
        half = self.kernel // 2
        y = jax.lax.conv_general_dilated(x, own["conv"], (1,), [(half, half)], dimension_numbers=("NCH", "OIH", "NCH"))
        y = (y + own["bias"][None, :, None]).reshape(b, g, -1, n)
        y = jnp.clip(jax.nn.relu(y) if self.act == "relu" else y, select.NEG, -select.NEG)
        there = (where.index >= 0)[:, :, None]
        top = jax.lax.stop_gradient(jnp.max(jnp.where(there, y, select.NEG), -1, keepdims=True))
        e = jnp.where(there, jnp.exp(jnp.where(there, y - top, 0.0)), 0.0)
        total = jnp.sum(e, -1, keepdims=True)
        p = e / jnp.where(total > 0, total, 1.0)
        back = jnp.broadcast_to(jnp.maximum(where.assign, 0)[:, :, None], p.shape)
        return jnp.where(rest[:, :, None], jnp.take_along_axis(p, back, -1), 0.0)


def _rows(mask: Bool[Array, "b g s"], m: int) -> Int[Array, "b g m"]:
    """The slots of a mask in order, behind as many -1 as make m."""
    index = select.pack(mask, m).index
    return jnp.pad(index, ((0, 0), (0, 0), (m - index.shape[-1], 0)), constant_values=-1)
