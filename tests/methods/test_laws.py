"""Every law over every registered method, the exemptions with their reasons, and broken methods that the laws must catch."""

import dataclasses
import os

import jax.numpy as jnp
import pytest

import jaxtok.methods
from jaxtok.core import registry
from jaxtok.core.protocols import CacheScorer
from jaxtok.core.reduce import reduce_kv
from jaxtok.core.select import choose, pack
from jaxtok.core.types import Needs
from jaxtok.testing import LAWS, ROW_LAWS
from tests.methods.laws import makers

# (label, law): the reason, from the method's card. A row whose law holds is stale and fails.
_MOVED = "keys move to compact positions by design: the masked full cache keeps the old distances"
_FOLDED = "what goes is folded into what stays"
_MEAN = "what is dropped stays in one token, their mean"
_CHANNELS = "channels of keys are dropped, no tokens"
_MERGED = "rows are merged, not dropped"
RECYCLED = ("recycled", "recycled:threshold")
_MERGERS = (
    *("tome", "tome.kth", "tome.random", "tomesd", "pitome", "pitome:bsm", "pitome:text", "turbo", "mctf", "mctf:recompute", "mctf:behind"),
    *("token_transforming", "token_transforming:received", "evit", "code_merge", "code_merge:learned", "mustdrop.vit"),
    *("mustdrop.vit:threshold", "expedit", "crossget", "crossget:llava", "crossget:cross"),
    *("visionzip", "visiondrop.select", "aim.select", "prumerge", "prumerge:plus", "pool_rows", "vflowopt.select"),
    *("visiondrop.layers", "sparsevlm:recycle", "sparsevlm:paper", "maelre.vit"),
)
EXEMPT: dict[tuple[str, str], str] = {
    **{(name, "rows_dropped_equals_masked"): _MERGED for name in _MERGERS},
    **{
        (name, "rows_duplicates"): "more is merged than rows that are the same"
        for name in ("mustdrop.vit", "mustdrop.vit:threshold", "pitome:text", "pool_rows", "tome.kth")
    },
    ("crossget:cross", "rows_full_budget"): "the cross token, which is trained, is seen by all rows whatever is merged",
    ("hiprune:qwen", "rows_full_budget"): "rows that are picked as anchors and again as registers count once: fewer than the budget stay",
    **{(name, "rows_full_budget"): "each row that stays takes in its neighbours" for name in ("prumerge", "prumerge:plus")},
    ("key_rerotation", "dropped_equals_masked"): _MOVED,
    ("key_rerotation-ada_kv", "dropped_equals_masked"): _MOVED,
    ("streaming_llm:compact", "dropped_equals_masked"): _MOVED,
    **{
        (name, "dropped_equals_masked"): "nothing is dropped, only left unread"
        for name in ("quest", "tidaldecode", *RECYCLED, "tokenselect", "tokenselect:pages", "actqkv", "sentencekv.reader", "landmark")
    },
    ("merging", "dropped_equals_masked"): _FOLDED,
    ("lococo", "dropped_equals_masked"): _FOLDED,
    ("cam", "dropped_equals_masked"): _FOLDED,
    ("cam-mean", "dropped_equals_masked"): _FOLDED,
    ("cam.policy", "dropped_equals_masked"): _FOLDED,
    ("cam.policy:mean", "dropped_equals_masked"): _FOLDED,
    ("ems", "dropped_equals_masked"): _FOLDED,
    ("ems-count", "dropped_equals_masked"): _FOLDED,
    ("razor_attention", "dropped_equals_masked"): _MEAN,
    ("think", "dropped_equals_masked"): _CHANNELS,
    ("think-kvpress", "dropped_equals_masked"): _CHANNELS,
    ("landmark", "full_budget_is_identity"): "the grouped softmax of a model trained with landmarks: plain attention is no limit of it",
    ("random", "heads_are_interchangeable"): "draws by the head's index",
}

# methods of site prompt choose ids before the model runs: tests/methods/prompt/test_site.py has their laws
NAMES = [name for name in registry.names() if registry.get(name).site in ("cache", "policy", "reader")]
ROWS = [name for name in registry.names() if registry.get(name).site in ("vit", "select", "layers")]
CASES = [(label, make) for name in NAMES for label, make in makers(name).items()]
FIRST = [next(iter(makers(name))) for name in NAMES]
# with JAXTOK_FULL=1 in the environment for every variant of a method, otherwise for its first
DEAR = ("transforms_compose", "sharded", "jit_equals_eager", "bf16_model")
DEAR_ROWS = ("rows_repacked", "rows_bf16")
ONE_EACH = ("snapkv", "h2o", "quest", "ada_kv")  # a method a protocol, and a wrapper: these also run on Python 3.12


@pytest.mark.parametrize(
    "label, make, law",
    [
        pytest.param(label, make, law, id=f"{label}-{law}", marks=pytest.mark.py312 if label in ONE_EACH else ())
        for label, make in CASES
        for law in LAWS
        if law not in DEAR or label in FIRST or os.environ.get("JAXTOK_FULL")
    ],
)
def test_law(label, make, law):
    if (label, law) not in EXEMPT:
        LAWS[law](make)
        return
    with pytest.raises(AssertionError):
        LAWS[law](make)


@pytest.mark.parametrize(
    "label, make, law",
    [
        pytest.param(label, make, law, id=f"{label}-{law}")
        for name in ROWS
        for i, (label, make) in enumerate(makers(name).items())
        for law in ROW_LAWS
        if law not in DEAR_ROWS or i == 0 or os.environ.get("JAXTOK_FULL")
    ],
)
def test_law_of_rows(label, make, law):
    if (label, law) not in EXEMPT:
        ROW_LAWS[law](make)
        return
    with pytest.raises(AssertionError):
        ROW_LAWS[law](make)


def test_exemptions_name_a_method_and_a_law():
    known = {label for label, _ in CASES} | {label for name in ROWS for label in makers(name)}
    assert not [row for row in EXEMPT if row[0] not in known or row[1] not in LAWS | ROW_LAWS]


# --- methods broken on purpose ------------------------------------------------------------------------------------------

frozen = dataclasses.dataclass(frozen=True, kw_only=True)


@frozen
class KeepLoudest(CacheScorer):
    """A right method: the keys of largest attention received."""

    capacity: int
    site = "cache"

    @property
    def needs(self):
        return Needs(received=True)

    def score(self, params, kv, evidence):
        b, h, s = evidence.received.shape
        return evidence.received.reshape(b, kv.k.shape[1], -1, s).mean(2)


@frozen
class NextIsLiveCount(KeepLoudest):
    """The next position is the number of live slots."""

    def compress(self, params, kv, evidence, keep=None):
        kv, evidence = super().compress(params, kv, evidence, keep)
        return kv._replace(seen=jnp.max(jnp.sum(kv.pos >= 0, -1, dtype=jnp.int32), -1)), evidence


@frozen
class WrongGroups(KeepLoudest):
    """Query head i votes for KV head i % g."""

    def score(self, params, kv, evidence):
        b, h, s = evidence.received.shape
        return evidence.received.reshape(b, -1, kv.k.shape[1], s).mean(1)


@frozen
class DeadRowsSpend(KeepLoudest):
    """The budget is counted over all slots, then dead ones are cleared."""

    def plan(self, params, kv, evidence, keep=None):
        score = self.score(params, kv, evidence) + jnp.where(kv.pos < 0, 1e6, 0.0)
        mask = choose(score, jnp.ones(kv.pos.shape, bool), self.capacity) & (kv.pos >= 0)
        return pack(mask, self.capacity)


@frozen
class ReadsNeighbour(KeepLoudest):
    """Scores are averaged over the batch."""

    def score(self, params, kv, evidence):
        score = super().score(params, kv, evidence)
        return score + jnp.mean(score, 0, keepdims=True) * 10


@frozen
class RecompilesPerBudget(KeepLoudest):
    """The budget decides a shape."""

    def compress(self, params, kv, evidence, keep=None):
        small = dataclasses.replace(self, capacity=int(jnp.max(jnp.asarray(keep)))) if keep is not None else self
        plan = super(RecompilesPerBudget, small).plan(params, kv, evidence)
        return reduce_kv(plan, kv), evidence


@frozen
class IgnoresKeep(KeepLoudest):
    """Always spends its capacity."""

    def plan(self, params, kv, evidence, keep=None):
        return super().plan(params, kv, evidence)


def test_the_right_method_passes():
    make = lambda capacity: KeepLoudest(capacity=capacity)
    for law in LAWS.values():
        law(make)


@pytest.mark.parametrize(
    "broken, law",
    [
        (NextIsLiveCount, "positions_are_sound"),
        (WrongGroups, "heads_are_interchangeable"),
        (DeadRowsSpend, "budget_is_spent"),
        (ReadsNeighbour, "rows_are_independent"),
        (RecompilesPerBudget, "one_compile"),
        (IgnoresKeep, "one_compile"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_law_catches(broken, law):
    with pytest.raises((AssertionError, TypeError)):
        LAWS[law](lambda capacity: broken(capacity=capacity))


assert jaxtok.methods  # importing the package fills the registry
