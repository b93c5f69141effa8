"""Prompts that begin alike: which share what, and a prefill that reads what they share once (BatchLLM)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import KV, Frozen, Part, Tokens
from jaxtok.models import decoder
from jaxtok.models.config import Config
from jaxtok.models.decoder import PLAIN, Layers
from jaxtok.ops.attention import Impl


class PrefixGroups(NamedTuple):
    """Which prompts of a batch read one prefix together."""

    group: np.ndarray  # i32 [p] number of each prompt's group, counted in the order in which groups run
    length: np.ndarray  # i32 [groups] tokens that the prompts of a group begin with and read once; 0 = they share nothing
    order: np.ndarray  # i32 [p] prompts in the order in which they run; those of a group stand together
    saved: int  # tokens that need not be read again: sum over the groups of (prompts - 1) * length


def prefix_groups(prompts: Sequence[Sequence[int]], *, new: Sequence[int] | None = None, least: int = 1) -> PrefixGroups:
    """One level of shared prefixes that saves the most tokens, over all prompts of a batch (BatchLLM, arXiv:2412.03594).

        saved(node) = max( (leaves - 1) * depth,  sum over its children of saved(child) )

    over the token tree of the prompts: a node becomes the prefix of all prompts below it where that saves at least as much as what its
    children save by themselves; their own prefixes then go. A prompt keeps its last token for itself, so that every row has something
    to be read by. Groups run by falling (tokens to generate) / (tokens to read), so that steps meet the prefills of later groups; ties and
    prompts of a group: the order given.

    new: tokens to generate for each prompt (None = alike). least: shorter prefixes are not worth a group.
    O(tokens log prompts): prompts are sorted, and the tree is that of their common prefixes. ValueError: an empty prompt, wrong lengths.
    """
    p = len(prompts)
    if not p or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token, and there must be a prompt")
    if new is not None and len(new) != p:
        raise ValueError(f"new has {len(new)} entries for {p} prompts; give one each")
    if least < 1:
        raise ValueError(f"least must be >= 1, got {least}")
    rows = [tuple(int(t) for t in prompt) for prompt in prompts]
    by_text = sorted(range(p), key=lambda i: (rows[i], i))
    alike = [_common(rows[a], rows[b]) for a, b in itertools.pairwise(by_text)]
    found = _best(alike, least)
    taken = {by_text[i] for low, high, _ in found for i in range(low, high)}
    groups = [([by_text[i] for i in range(low, high)], depth) for low, high, depth in found] + [
        ([i], 0) for i in range(p) if i not in taken
    ]
    made = [1] * p if new is None else [int(k) for k in new]

    def ratio(members: list[int], depth: int) -> float:
        return sum(made[i] for i in members) / (depth + sum(len(rows[i]) - depth for i in members))

    groups = sorted(((sorted(members), depth) for members, depth in groups), key=lambda g: (-ratio(*g), g[0][0]))
    group = np.zeros(p, np.int32)
    for number, (members, _) in enumerate(groups):
        group[members] = number
    order = np.array([i for members, _ in groups for i in members], np.int32)
    saved = sum((len(members) - 1) * depth for members, depth in groups)
    return PrefixGroups(group, np.array([depth for _, depth in groups], np.int32), order, saved)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with, of each all but the last."""
    n = min(len(a), len(b)) - 1
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


def _best(alike: list[int], least: int) -> list[tuple[int, int, int]]:
    """The groups (low, high, depth) that save most among sorted prompts, of which neighbours share `alike` tokens."""
    # the tree's inner nodes as intervals, by a stack: each is closed where a neighbour shares less
    done: list[tuple[int, int, list]] = []  # (saved, start, groups) of finished subtrees, in order
    stack: list[tuple[int, int]] = []  # (depth, start) of open nodes
    for i, depth in enumerate([*alike, 0]):
        start = i
        done.append((0, i, []))
        while stack and stack[-1][0] > depth:
            deep, start = stack.pop()
            below = []
            while done and done[-1][1] >= start:
                below.append(done.pop())
            inner, mine = sum(s for s, _, _ in below), (i - start) * deep
            groups = [(start, i + 1, deep)] if mine >= inner and deep >= least else [g for _, _, gs in reversed(below) for g in gs]
            done.append((mine if mine >= inner and deep >= least else inner, start, groups))
        if depth and (not stack or stack[-1][0] < depth):
            stack.append((depth, start))
    return [g for _, _, groups in done for g in groups]


def prefill_shared(
    cfg: Config,
    params,
    prefix: Int[Array, "one p"],
    ids: Int[Array, "b n"],
    live: Bool[Array, "b n"] | None = None,
    recipe: Recipe = PLAIN,
    *,
    new: int,
    prefix_live: Bool[Array, "one p"] | None = None,
    keep: Mapping[str, Any] | None = None,
    key: Array | None = None,
    impl: Impl = "auto",
) -> tuple[Tokens, Layers]:
    """Prefill prompts that begin with one prefix: it is read once, stays one copy for the batch, and each row reads on behind it.

    Attention of a row is that over the shared keys, all rows' queries at once, merged with that over its own by their logsumexps: exactly
    that of the prompts by themselves. `ids`: what follows the prefix, padded. `recipe.cache` compresses the prefix, before any row has been
    seen, which suits methods that need no queries (key norms, KeyDiff, ExpectedAttention, CUR, LagKV, ...). What rows and `generate` add
    is their own, and kept. `keep`: {"cache": budgets of the prefix}.

    Returns what `generate` takes (with `recipe`'s cache left out): the tokens of the rows, and caches whose `frozen` is the prefix.
    ValueError: two prefixes; pruning between layers, a step policy, a reader or head groups; a method that looks at queries.
    """
    if prefix.ndim != 2 or prefix.shape[0] != 1:
        raise ValueError(f"prefix is {list(prefix.shape)}; it must be [1 p], one for the batch")
    rest = recipe.replace(cache=None)
    if rest != PLAIN:
        raise ValueError("prefill_shared takes a recipe with a method at site cache, or none, and nothing else")
    if recipe.passes:
        raise ValueError(f"{recipe.passes[0]} needs more than one pass over the prompt; a shared prefix is read once")
    if recipe.cache is not None:
        asked = recipe.cache.needs
        if asked.rows or asked.turned or asked.received or asked.peak or asked.cls or asked.layers:
            raise ValueError(f"{recipe.cache.name} looks at queries, and those of the rows are not there when the prefix is compressed")
    _, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, prefix, prefix_live), recipe, new=0, keep=keep, key=key, impl=impl)
    if any(part.frozen is not None for parts in layers for part in parts):
        raise ValueError(f"{recipe.cache.name} keeps slots of its own kind apart, and a prefix is one kind")  # type: ignore[union-attr]
    b = ids.shape[0]
    fresh = lambda kv: KV(
        *(jnp.zeros((b, *x.shape[1:2], 0, x.shape[3]), x.dtype) for x in (kv.k, kv.v)),
        pos=jnp.zeros((b, kv.pos.shape[1], 0), jnp.int32),
        bias=jnp.zeros((b, kv.pos.shape[1], 0), jnp.float32),
        seen=jnp.broadcast_to(kv.seen, (b,)),
        delta=jnp.broadcast_to(kv.delta, (b,)),
        cursor=jnp.zeros((), jnp.int32),
        lost=jnp.broadcast_to(kv.lost, (b, kv.lost.shape[1])),
    )
    start = tuple(tuple(Part(fresh(part.kv), part.policy, part.reader, Frozen(part.kv)) for part in parts) for parts in layers)
    return decoder.prefill(cfg, params, decoder.embed(cfg, params, ids, live), rest, new=new, layers=start, key=key, impl=impl)
