"""How many image rows each layer of a decoder needs, searched on calibration prompts: G-Search, P-Sigmoid. Source: arXiv:2412.00556
(abstract; no official code: both searches are our reading and say what they do).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.core.selector import pictured
from jaxtok.core.types import Tokens
from jaxtok.methods.vision.gsearch import GSearch, sigmoid_counts
from jaxtok.models import decoder
from jaxtok.models.config import Config

Counts = tuple[int, ...]


class Fitted(NamedTuple):
    """What P-Sigmoid's search found."""

    counts: Counts
    middle: float
    steep: float
    score: float


def evaluator(
    cfg: Config, params, data: Sequence[tuple[Tokens, Any]], measure: Callable[[jax.Array, Any], jax.Array], *, images: int
) -> Callable[[Counts], float]:
    """score(counts): the mean over `data` of measure(logits of the last row [b vocab], target) when counts[l] image rows go through layer l.

    data: pairs (tokens, target), all of one shape; images: image rows of a prompt, at most. In mask form: dropped rows stay, dead, and the
    counts are traced, so any number of schedules costs one compile (`score.run` is that program). Scores equal those of `gsearch(counts)`.
    """
    data = list(data)
    if not data:
        raise ValueError("data holds no batch")
    place = GSearch(capacity=images, images=images)
    recipe = Recipe(layers=tuple((i, place) for i in range(1, cfg.layers)))

    @jax.jit
    def run(params, tokens: Tokens, target, counts):
        text = jnp.sum((tokens.pos >= 0) & ~pictured(tokens), -1, dtype=jnp.int32)
        keep = tuple(text + counts[i] for i in range(1, cfg.layers))
        end, _ = decoder.prefill(cfg, params, tokens, recipe, new=0, keep={"layers": keep})
        return measure(decoder.logits(cfg, params, end.x[:, -1:])[:, 0], target)

    def score(counts: Counts) -> float:
        if len(counts) != cfg.layers:
            raise ValueError(f"{len(counts)} counts for {cfg.layers} layers")
        given = jnp.asarray(counts, jnp.int32)
        return float(np.mean([float(run(params, tokens, target, given)) for tokens, target in data]))

    score.run = run  # type: ignore[attr-defined]
    return score


def greedy(
    score: Callable[[Counts], float],
    images: int,
    layers: int,
    *,
    tolerance: float | int = 0.0,
    candidates: Sequence[int] | None = None,
    bisect: bool = False,
) -> Counts:
    """G-Search: for layer 1, 2, ... the smallest count, not above the layer's before it, with which the score does not fall.

        score(c_0 .. c_{l-1}, c, c, ..., c) >= score(all images in all layers) - tolerance

    The layers behind the one at hand have its count too: they can have no more. `candidates`: counts to try (default: the sixteenths of
    `images`, and 0), scanned from the smallest; what the layer before has is always allowed. bisect: by halves, right where fewer rows are
    never better. The outcome never rises with depth; all images go through layer 0, which has no evidence before it.
    """
    check.count("images", images)
    check.count("layers", layers)
    check.at_least("tolerance", tolerance, 0)
    tried = sorted({(images * k + 8) // 16 for k in range(17)} if candidates is None else set(candidates))
    for c in tried:
        check.count("candidates", c, 0)
    base, out = score((images,) * layers) - tolerance, [images] * layers
    for i in range(1, layers):
        fewer = [c for c in tried if c < out[i - 1]]
        good = lambda c, i=i: score((*out[:i], *[c] * (layers - i))) >= base
        if bisect:
            low, high = 0, len(fewer)  # fewer[high:] do not fall
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if good(fewer[middle]) else (middle + 1, high)
            found = fewer[low] if low < len(fewer) else out[i - 1]
        else:
            found = next((c for c in fewer if good(c)), out[i - 1])
        out[i:] = [found] * (layers - i)
    return tuple(out)


def flops(cfg: Config, counts: Counts, text: int) -> float:
    """Multiplications and additions (two each) of a prefill of counts[l] image rows and `text` others through each layer l.

    2 n (2 c h d + 2 c g d + 3 c f) for the matrices and 4 n^2 h d for all pairs of rows, n = counts[l] + text.
    """
    check.count("text", text, 0)
    matrices = 2 * cfg.width * (2 * cfg.heads * cfg.head_dim + 2 * cfg.kv_heads * cfg.head_dim + 3 * cfg.hidden)
    return float(sum(matrices * (c + text) + 4 * (c + text) ** 2 * cfg.heads * cfg.head_dim for c in counts))


def nearest_sigmoid(counts: Counts) -> tuple[float, float]:
    """(middle, steep) of the sigmoid nearest to a schedule, by least squares over a grid of both."""
    if len(counts) < 2 or counts[0] < 1:
        raise ValueError(f"a schedule of {counts} has no shape; give two layers and an image row at least")
    layers, want = len(counts), np.asarray(counts, np.float64)[1:] / counts[0]
    depth = np.arange(1, layers)
    middles = np.linspace(-layers, 2 * layers, 24 * layers + 1)[:, None, None]
    steeps = np.geomspace(0.02, 20, 61)[None, :, None]
    rate = 1 / (1 + np.exp(np.clip(steeps * (depth - middles), -500, 500)))
    i, j = np.unravel_index(np.argmin(((rate - want) ** 2).sum(-1)), rate.shape[:2])
    return float(middles[i, 0, 0]), float(steeps[0, j, 0])


def fit_sigmoid(
    score: Callable[[Counts], float],
    start: Counts,
    budget: float | int,
    *,
    cost: Callable[[Counts], float] | None = None,
    rounds: int = 6,
) -> Fitted:
    """P-Sigmoid: the sigmoid schedule of the best score whose cost is at most `budget`, sought from G-Search's result `start`.

    For a steepness the midpoint is the largest within the budget (by bisection: the cost rises with it), so one number is searched: from
    the steepness of the sigmoid nearest to `start`, twice and half of it are tried; the best is the next centre, and where that is the
    centre itself the step falls to its square root. `rounds` such steps. (The paper searches by Bayesian optimisation.)

    cost: by default the mean over the layers ("equivalent" rows, `core.planner`); `flops` gives FLOPs. ValueError: a budget under the cost of
    no image rows behind layer 0.
    """
    check.count("rounds", rounds, 0)
    check.at_least("budget", budget, 0)
    images, layers = start[0], len(start)
    price = cost or (lambda counts: sum(counts) / len(counts))
    least = price((images, *[0] * (layers - 1)))
    if least > budget:
        raise ValueError(f"a budget of {budget} is out of reach: {images} image rows through the first of {layers} layers cost {least:g}")
    known: dict[Counts, float] = {}

    def at(steep: float) -> Fitted:
        low, high = -1e5 / steep, layers + 1e3 / steep
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if price(sigmoid_counts(images, layers, middle=middle, steep=steep)) <= budget else (low, middle)
        counts = sigmoid_counts(images, layers, middle=low, steep=steep)
        if counts not in known:
            known[counts] = score(counts)
        return Fitted(counts, low, steep, known[counts])

    best, step = at(nearest_sigmoid(start)[1]), 2.0
    for _ in range(rounds):
        found = max((at(min(max(best.steep * by, 1e-2), 1e2)) for by in (1 / step, step)), key=lambda f: f.score)
        best, step = (found, step) if found.score > best.score else (best, step**0.5)
    return best
