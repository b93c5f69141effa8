"""Write a method: from a formula to a table, in one file. This one.

Claim: the dozen lines under "1" are a whole KV-cache method. It passes every law, and at a quarter of the cache it finds more answers
    than KeyDiff on the model of the package.
Command: python experiments/write_a_method.py
    The same for a file of yours, without a script: jaxtok compare --import my_method.py --methods mine key_diff random
Hardware and time: two cores of a 2.6 GHz Xeon, a minute, most of it compiling.
Expected: score (mean of both tasks) at 50% / 25% of the cache: random 0.16 / 0.06, KeyDiff 0.97 / 0.47, this method 1.00 / 0.75; the full
    cache 1.00 (experiments/results/write_a_method.json).

The question is not seen when the cache is compressed, so a method must guess what will be asked.
"""

import dataclasses

import jax
import jax.numpy as jnp
import tyro

from jaxtok.cli.common import console
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.registry import register
from jaxtok.core.types import KV, Evidence, Protect
from jaxtok.evals import compare, report
from jaxtok.models import load
from jaxtok.testing import check

# --- 1. The method ------------------------------------------------------------------------------------------------------
#
# A method is a frozen dataclass of its settings plus one formula. A CacheScorer says how important each slot of a layer's cache is
# (float32, higher stays). Its base class does the rest: the budget, the choice for each KV head, what is protected, positions.
#
# The idea: text is mostly alike. A token whose value vector lies far from the mean value says something that the others do not.
#
# What a formula has to know: `kv.k` and `kv.v` are [b g s d] (batch, KV heads, slots, head dimension). Prompts of different lengths
# share a batch, so some slots are dead, `kv.pos` says which (-1), and they may hold anything: a mean must leave them out. Attention,
# queries, hidden rows come in `evidence`, if the property `needs` asks for them (see jaxtok/methods/cache/snapkv.py).


@register(
    "outlying_values",
    site="cache",  # compresses once, after the prompt; "policy" acts at every step, "reader" only reads less
    paper="https://example.org/outlying-values",  # or "arXiv:2404.14469"; with the rest, what `jaxtok list outlying_values` says to cite
    title="Outlying Values",
    authors="You",
    year=2026,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlyingValues(CacheScorer):
    """Keep the values furthest from the mean.  score_j = |v_j - a|,  a = mean over the live i of v_i.

    A cache of equal values ties and the oldest stay.
    """

    capacity: int
    protect: Protect = CacheScorer.protect  # Protect(sinks=4, recent=8) would keep these whatever their score

    def score(self, params, kv: KV, evidence: Evidence):
        live = (kv.pos >= 0)[..., None]
        v = jnp.where(live, kv.v.astype(jnp.float32), 0.0)
        mean = jnp.sum(v, 2, keepdims=True) / jnp.maximum(jnp.sum(live, 2, keepdims=True, dtype=jnp.float32), 1.0)
        return jnp.linalg.norm(v - mean, axis=-1)


# --- 2. The laws, 3. the comparison ---------------------------------------------------------------------------------------


def main(count: int = 16, length: int = 512, out: str | None = None) -> list[dict]:
    """Check the method, compare it with two others at two budgets, print the table; `out`: a file for its rows as JSON.

    count: cases for each task. length: tokens of a case.
    """
    print("2. The laws: every method obeys them, whoever wrote it. Leave out `live` above and one of them catches it.")
    for law, said in check(lambda capacity: OutlyingValues(capacity=capacity)).items():
        print(f"   {law.replace('_', ' ')}: {said}")

    print("3. The comparison, at half and at a quarter of the cache, against KeyDiff (unusual keys) and random slots.")
    cfg, params, tokenizer = load.load("embedded")
    options = compare.Options(
        methods=("full", "random", "key_diff", "outlying_values"),  # by name: registering was enough
        budgets=("50%", "25%"),
        tasks=("needle", "kv_recall"),
        lengths=(length,),
        count=count,
        batch=2 * count,
        repeats=1,
    )
    rows = compare.run(cfg, params, tokenizer, options).rows
    console(160).print(report.table(rows))
    summary = report.summary(rows)
    if out is not None:
        report.write(out, {"options": dataclasses.asdict(options), "machine": report.machine(), "summary": summary})
    print("4. Next: a test of its own with numbers worked out by hand, as in tests/methods/cache/test_key_diff.py.")
    return summary


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # one law shards the cache over two devices
    tyro.cli(main, description=__doc__)
