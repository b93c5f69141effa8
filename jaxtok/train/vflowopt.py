"""VFlowOpt's optimisation: the numbers of its recipe, searched so that a pruned model ends where the full one does. Source: arXiv:2508.05211.

    found, recipe = tune(lambda recipe: float(agreement(full, last_state(recipe))), rows=729, calls=100)

The objective is the caller's: usually the mean over calibration prompts of `agreement` of the last row's state behind the last layer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.core import check
from jaxtok.core.recipe import Recipe
from jaxtok.methods.vision.vflowopt import vflowopt

BOUNDS = ((0.05, 1.0), (0.05, 1.0), (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0))  # vit_ratio, the first of `ratios`, t, m, alpha_v


class Found(NamedTuple):
    """What a search has asked and got; `points` and `values` in the order of the calls."""

    point: np.ndarray  # [d] the best
    value: float
    points: np.ndarray  # [calls d]
    values: np.ndarray  # [calls]


def agreement(full: Float[Array, "b c"], pruned: Float[Array, "b c"]) -> Float[Array, ""]:
    """Mean over the batch of cos(full, pruned), float32; 0 where it is not a number."""
    a, b = full.astype(jnp.float32), pruned.astype(jnp.float32)
    cos = jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
    return jnp.mean(jnp.where(jnp.isfinite(cos), cos, 0.0))


def last_ratio(vit_ratio: float, ratio: float, *, budget: float = 0.25, layers: int = 28, places: tuple[int, int] = (9, 18)) -> float:
    """The second ratio at which `budget` of the picture's rows go through a layer on average; outside (0, 1] where there is none.

    budget * layers = vit_ratio (p1 + ratio (p2 - p1) + ratio * r (layers - p2))
    """
    check.share("budget", budget)
    for name, value in (("vit_ratio", vit_ratio), ("ratio", ratio)):
        check.at_least(name, value, 1e-9)
    p1, p2 = places
    check.count("places", p1, 1)
    check.count("places", p2, p1 + 1, layers - 1)
    return (budget * layers / vit_ratio - p1 - ratio * (p2 - p1)) / (ratio * (layers - p2))


def search(
    objective: Callable[[np.ndarray], float],
    bounds: tuple[tuple[float, float], ...],
    *,
    calls: int = 100,
    initial: int = 27,
    seed: int = 0,
    allowed: Callable[[np.ndarray], bool] | None = None,
    tries: int = 512,
) -> Found:
    """The highest `objective` found in a box: `initial` random points, then those of largest expected improvement under a Gaussian process.

    A small Bayesian optimiser of our own (the official code takes a library's): Matern-5/2 covariance of the box scaled to a cube, one
    length scale for all axes, of a few the likeliest at each call; values standardised; the next point is the best of `tries` random ones and half
    as many near the best so far. `allowed` refuses points before they are asked. NaN counts as 0, as in the paper. Everything random comes
    from `seed`. ValueError: empty bounds, or no allowed point in 100 * tries draws.
    """
    check.count("calls", calls)
    check.count("initial", initial)
    check.count("tries", tries)
    if not bounds or not all(low < high for low, high in bounds):
        raise ValueError(f"bounds={bounds} must be pairs (low, high), low < high")
    rng = np.random.default_rng(seed)
    low, high = np.array(bounds, np.float64).T
    ok = lambda u: allowed is None or allowed(low + u * (high - low))
    draw = lambda: _drawn(rng, len(low), ok, tries)
    asked, got = np.zeros((0, len(low))), np.zeros(0)
    for n in range(calls):
        if n < initial:
            u = draw()
        else:
            near = asked[np.argmax(got)] + 0.05 * rng.normal(size=(tries // 2, len(low)))
            pool = [p for p in (*rng.random((tries, len(low))), *np.clip(near, 0, 1)) if ok(p)] or [draw()]
            u = pool[int(np.argmax(_improvement(asked, got, np.array(pool))))]
        value = float(objective(low + u * (high - low)))
        asked, got = np.vstack([asked, u]), np.append(got, 0.0 if math.isnan(value) else value)
    points, best = low + asked * (high - low), int(np.argmax(got))
    return Found(points[best], float(got[best]), points, got)


def _drawn(rng, d: int, ok, tries: int) -> np.ndarray:
    for _ in range(100 * tries):
        if ok(u := rng.random(d)):
            return u
    raise ValueError(f"no point is allowed: {100 * tries} were drawn")


def _improvement(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Expected improvement over max(y) at the points `at` of the unit cube."""
    y = (y - y.mean()) / max(float(y.std()), 1e-12)

    def covariance(a, b, length):
        r = np.sqrt(5 * ((a[:, None] - b[None]) ** 2).sum(-1)) / length
        return (1 + r + r * r / 3) * np.exp(-r)

    def fit(length):
        root = np.linalg.cholesky(covariance(x, x, length) + 1e-6 * np.eye(len(x)))
        half = np.linalg.solve(root, y)
        return -0.5 * half @ half - np.log(np.diag(root)).sum(), length, root, half

    _, length, root, half = max((fit(scale) for scale in (0.1, 0.2, 0.4, 0.8, 1.6)), key=lambda f: f[0])
    cross = np.linalg.solve(root, covariance(x, at, length))
    mean, sd = cross.T @ half, np.sqrt(np.maximum(1 - (cross**2).sum(0), 1e-12))
    z = (mean - y.max()) / sd
    below = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in z]))
    return (mean - y.max()) * below + sd * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def tune(
    objective: Callable[[Recipe], float],
    *,
    rows: int = 729,
    newlines: int = 0,
    budget: float = 0.25,
    layers: int = 28,
    places: tuple[int, int] = (9, 18),
    calls: int = 100,
    initial: int = 27,
    seed: int = 0,
    tries: int = 512,
    **tower,
) -> tuple[Found, Recipe]:
    """(what was found, the best recipe): the paper's search over vit_ratio, the first ratio, t, m and alpha_v in `BOUNDS`.

    The second ratio follows from the mean `budget` (`last_ratio`); points where it is outside (0, 1] are not asked (our reading, as are the
    bounds of the two ratios). Each recipe compiles anew: capacities are static. tower: shape, grid.
    """

    def made(point) -> Recipe:
        v, r, t, m, alpha = (float(p) for p in point)
        ratios = (r, min(last_ratio(v, r, budget=budget, layers=layers, places=places), 1.0))
        return vflowopt(rows, newlines, vit_ratio=v, ratios=ratios, places=places, t=t, m=m, alpha_v=alpha, **tower)

    possible = lambda p: 0 < last_ratio(float(p[0]), float(p[1]), budget=budget, layers=layers, places=places) <= 1
    found = search(lambda p: objective(made(p)), BOUNDS, calls=calls, initial=initial, seed=seed, allowed=possible, tries=tries)
    return found, made(found.point)
