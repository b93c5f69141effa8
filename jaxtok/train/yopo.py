"""YOPO's heads: which of them look at image rows. Source: arXiv:2410.06169; ZhangAIPI/YOPO_MLLM_Pruning (gen_mask_llava.py)."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxtok.core import check
from jaxtok.core.selector import pictured
from jaxtok.core.types import Needs, Tokens
from jaxtok.models import decoder
from jaxtok.models.config import Config


def measure(cfg: Config, params, tokens: Tokens) -> tuple[Float[jax.Array, "l b h"], Float[jax.Array, "l b h"]]:
    """(attention to image rows, attention to all others), summed over the live queries of each sample (a row of the batch)."""
    image = pictured(tokens)[:, None]
    evidence = decoder.survey(cfg, params, tokens, Needs(received=True))[2]
    seen = jnp.stack([check.given("received", found.received) for (found,) in evidence])
    return jnp.sum(jnp.where(image, seen, 0.0), -1), jnp.sum(jnp.where(image, 0.0, seen), -1)


def vote(
    visual: Float[np.ndarray, "l s h"], rest: Float[np.ndarray, "l s h"], threshold: float | int, *, most: float | int = 0.4, whole: int = 2
) -> tuple[Int[np.ndarray, "l h"], Bool[np.ndarray, "l h"]]:
    """(votes, heads): a sample votes for a head with visual / rest > threshold; heads with more than `most` of the s samples' votes stay.

    In the first `whole` layers every sample votes for every head. The paper: 100 samples, more than 40 votes; thresholds .2, .077, .035 for
    the files named 10, 20, 30 (of 40 heads a layer, on average).
    """
    visual, rest = np.asarray(visual, np.float32), np.asarray(rest, np.float32)
    if visual.ndim != 3 or visual.shape != rest.shape or not visual.size:
        raise ValueError(f"visual {list(visual.shape)} and rest {list(rest.shape)} must both be [layers samples heads], and not empty")
    check.at_least("threshold", threshold, 0)
    check.between("most", most, 0, 1)
    check.count("whole", whole, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a head may look at nothing else
        above = visual / rest > np.float32(threshold)
    above[:whole] = True
    votes = above.sum(1)
    return votes, votes > float(most) * visual.shape[1]


def threshold_of(
    visual: Float[np.ndarray, "l s h"], rest: Float[np.ndarray, "l s h"], heads: float | int, *, most: float | int = 0.4, whole: int = 2
) -> float:
    """The smallest threshold of `vote` that keeps `heads` heads a layer or fewer, on average (the paper adjusts it by hand).

    ValueError where the first `whole` layers alone are more.
    """
    check.between("heads", heads, 0, np.shape(visual)[-1])
    kept = lambda level: vote(visual, rest, level, most=most, whole=whole)[1].sum(1).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.unique(np.asarray(visual, np.float32) / np.asarray(rest, np.float32))  # where votes change
    levels = np.concatenate([[0.0], levels[np.isfinite(levels)]])
    low, high = 0, len(levels) - 1
    if kept(levels[high]) > heads:
        raise ValueError(f"{heads} heads a layer are out of reach: {kept(levels[high]):g} stay at any threshold")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(levels[middle]) <= heads else (middle + 1, high)
    return float(levels[low])


def calibrate(
    cfg: Config, params, data: Iterable[Tokens], threshold: float | int, *, most: float | int = 0.4, whole: int = 2
) -> Bool[np.ndarray, "l h"]:
    """The heads for `params["methods"]["edits"][0]["heads"]` by the votes of all rows of the batches of `data`, all of one shape."""
    run = jax.jit(lambda params, tokens: measure(cfg, params, tokens))
    found = [jax.device_get(run(params, tokens)) for tokens in data]
    if not found:
        raise ValueError("data holds no batch")
    visual, rest = (np.concatenate(x, 1) for x in zip(*found, strict=True))
    return vote(visual, rest, threshold, most=most, whole=whole)[1]
