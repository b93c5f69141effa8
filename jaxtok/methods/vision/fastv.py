"""FastV: after two layers of a decoder, half of the image rows go."""

import dataclasses

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner
from jaxtok.core.registry import register
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "fastv",
    site="layers",
    paper="arXiv:2403.06764",
    title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
    authors="Liang Chen and Haozhe Zhao and Tianyu Liu and Shuai Bai and Junyang Lin and Chang Zhou and Baobao Chang",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV(Pruner):
    """Keep the image rows that the layer before attends to most.

        score_j = mean over heads of A[last, j]            query="last", the official code
        score_j = mean over heads and queries i of A[i, j]  query="all", the paper's text

    A: softmax attention of layer K - 1 for a method that acts before 0-based layer K. The paper keeps half (capacity = images / 2) before
    K = 2: `Recipe(layers=((2, FastV(capacity=288, images=576)),))`. Rows keep their rotary ids. Decoding reads what the prefill kept.
    Ties: the older row.
    """

    query: str = "last"

    def __post_init__(self):
        super().__post_init__()
        check.one_of("query", self.query, ("last", "all"))

    @property
    def needs(self) -> Needs:
        return Needs(rows=1) if self.query == "last" else Needs(received=True)

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        if self.query == "last":
            return jnp.mean(check.given("rows", evidence.rows)[:, :, -1], 1)
        return jnp.mean(check.given("received", evidence.received), 1)
