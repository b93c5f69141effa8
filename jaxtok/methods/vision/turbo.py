"""Turbo. Source: arXiv:2407.11717; anakin-skywalker-Joseph/Folder (BLIP_turbo/turbo/), no licence seen: written from the formulas."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.matching import cosine, even_odd, mean_keys, movable, packed_order, removal
from jaxtok.core.protocols import Held
from jaxtok.core.reducer import Reducer
from jaxtok.core.registry import register
from jaxtok.core.types import Evidence, Needs, Plan, Tokens


@register(
    "turbo",
    site="vit",
    paper="arXiv:2407.11717",
    title="Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models",
    authors="Chen Ju and Haicheng Wang and Haozhe Cheng and Xu Chen and Zhonghua Zhai and Weilin Huang and Jinsong Lan and Shuai Xiao and "
    "Bo Zheng",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Turbo(Reducer):
    """ToMe with informative rows held back, between attention and MLP.

        S_ij = cos(k_i, k_j) - beta^|gamma - t| * alpha * 30 * a_i,   i among the even rows, j among the odd rows
        a_i = attention of the class row to i after the softmax, averaged over heads;  t = how many of the recipe's entries came before
        the `remove` even rows of largest max_j S_ij join their best partner, weighted by size

    Even and odd, special rows, order and `keep` as in ToMe. Nothing goes from fewer than `threshold` rows (static number of rows at hand).
    alpha=0 is ToMe; remove=0 changes nothing. t counts entries of this very method in the forward pass (the official counter advances
    only where something is to go). Call the encoder with proportional=True.
    """

    at: ClassVar[str] = "attn"
    conserves: ClassVar[bool] = True

    remove: int
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.0
    threshold: int = 40
    special: int = 1

    def __post_init__(self):
        check.count("remove", self.remove, 0)
        check.count("threshold", self.threshold, 0)
        check.count("special", self.special, 0)
        for name in ("alpha", "beta", "gamma"):
            check.real(name, getattr(self, name))

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, cls=True)

    def start(self, params, tokens: Tokens) -> Held:
        return Held(rest=jnp.zeros((), jnp.float32))

    def count(self, n: int, n_kind: int) -> int:
        return n if n < self.threshold else n - min(self.remove, max(n - self.special, 0) // 2)

    def plan(self, params, state: Held, tokens: Tokens, evidence: Evidence, keep=None) -> tuple[Held, Plan]:
        _, n = tokens.pos.shape
        room, live = self.count(n, n), tokens.pos >= 0
        most = 0 if n < self.threshold else n // 2 if keep is not None else n - room
        order = packed_order(live)
        metric = mean_keys(evidence, order)
        seen = jnp.take_along_axis(jnp.mean(check.given("cls", evidence.cls).astype(jnp.float32), 1), order, 1)
        held = self.beta ** jnp.abs(self.gamma - state.rest) * self.alpha * 30.0 * seen
        score = cosine(metric[:, ::2], metric[:, 1::2]) - held[:, ::2, None]
        spare = jnp.minimum(jnp.sum(movable(tokens), -1, dtype=jnp.int32) // 2, most)
        remove = removal(live, keep, most, room, spare)
        return state._replace(rest=state.rest + float(self.remove > 0)), even_odd(tokens, score, remove, most, room, sort=not self.special)
