"""G-Search and P-Sigmoid: how many image rows go through each layer, found offline."""

import dataclasses
import math

import jax.numpy as jnp

from jaxtok.core import check
from jaxtok.core.protocols import Held
from jaxtok.core.pruner import Pruner
from jaxtok.core.recipe import Recipe
from jaxtok.core.registry import register
from jaxtok.core.types import Evidence, Needs, Tokens


@register(
    "gsearch",
    site="layers",
    paper="arXiv:2412.00556",
    title="Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
    authors="Shiyu Zhao and Zhenting Wang and Felix Juefei-Xu and Xide Xia and Miao Liu and Xiaofang Wang and Mingfu Liang and Ning Zhang and Dimitris N. Metaxas and Licheng Yu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GSearch(Pruner):
    """Keep the image rows that the prompt looks at most in the layer before; how many is a schedule over the layers.

        score_j = mean over heads of sum over prompt rows i of A[i, j],   A: softmax attention of layer l - 1 for a place before layer l

    Prompt rows: live text behind the last image row. schedule[l]: image rows that go through layer l, falling (the paper's finding: what
    is essential never grows with depth; ranks agree across layers but the first). `layer(l, layers)` is the instance of a place, with
    capacity schedule[l] and images schedule[l - 1]; without a schedule a place keeps `capacity` of `images`. `gsearch(counts)` and
    `p_sigmoid(...)` are the recipes of a schedule, `train.gsearch` finds schedules.

    No official code: the score's mean over heads and sum over queries, and that rows keep their rotary ids, are our reading. The same counts
    in all layers: no place, the plain model. One place: FastV with the prompt's queries. ValueError: a schedule that rises.
    """

    schedule: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.schedule, tuple):
            raise TypeError(f"schedule must be a tuple of counts, one a layer, got {self.schedule!r}")
        for count in self.schedule:
            check.count("schedule", count, 0)
        if any(a < b for a, b in zip(self.schedule, self.schedule[1:], strict=False)):
            raise ValueError(f"schedule {self.schedule} rises; image rows that are gone do not come back")

    @property
    def needs(self) -> Needs:
        return Needs(asked=True)

    def layer(self, i: int, layers: int) -> "GSearch":
        if not self.schedule:
            return self
        if len(self.schedule) != layers or not 1 <= i < layers:
            raise ValueError(f"a schedule of {len(self.schedule)} layers has no place before layer {i} of {layers}")
        return dataclasses.replace(self, capacity=self.schedule[i], images=max(self.schedule[i - 1], 1), schedule=())

    def score(self, params, state: Held, tokens: Tokens, evidence: Evidence):
        return jnp.mean(check.given("asked", evidence.asked), 1)


def gsearch(counts: tuple[int, ...], *, positions: str = "keep") -> Recipe:
    """The recipe in which counts[l] image rows go through layer l; counts[0] enter. A place stands where the count falls."""
    if not isinstance(counts, tuple) or not counts:
        raise TypeError(f"counts must be a tuple with one count a layer, got {counts!r}")
    method = GSearch(capacity=counts[-1], images=counts[0], schedule=counts, positions=positions)
    return Recipe(layers=tuple((i, method) for i in range(1, len(counts)) if counts[i] < counts[i - 1]))


def sigmoid_counts(images: int, layers: int, *, middle: float | int, steep: float | int) -> tuple[int, ...]:
    """Image rows by layer: images / (1 + exp(steep (l - middle))) through layer l, rounded half up; all of them through layer 0.

    The paper's parametrisation is not published: midpoint and steepness are our reading. ValueError: steep < 0.
    """
    check.count("images", images)
    check.count("layers", layers)
    check.between("steep", steep, 0, 1e6)
    check.between("middle", middle, -1e6, 1e6)
    rate = lambda i: 1 / (1 + math.exp(min(steep * (i - middle), 700.0)))
    return (images, *(math.floor(images * rate(i) + 0.5) for i in range(1, layers)))


def p_sigmoid(images: int, layers: int, *, middle: float | int, steep: float | int, positions: str = "keep") -> Recipe:
    """The recipe of `sigmoid_counts`: P-Sigmoid, whose parameters `train.gsearch.fit_sigmoid` finds under a budget."""
    return gsearch(sigmoid_counts(images, layers, middle=middle, steep=steep), positions=positions)
