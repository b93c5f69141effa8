"""What is kept of random prompts equals kvpress 0.5.5, for wrappers, ranks, channels and folded values (golden files: make_kvpress_more).

As in test_kvpress.py everything goes through `decoder.prefill`, budgets are traced and a prompt of 60 tokens runs in a bucket of 96.
LagKV's ranks tie by design: there the scores of what is kept are compared.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import jaxtok as jt
from jaxtok.decode import prefill_reread
from jaxtok.methods import (
    CUR,
    AdaKV,
    ChunkKV,
    CriticalKV,
    ExpectedAttention,
    Finch,
    KeyRerotation,
    KNorm,
    KVzip,
    LagKV,
    Merging,
    SnapKV,
    ThinK,
)
from jaxtok.models import decoder
from tests.golden.make_kvpress import CASES, FOLDER, GAP, RATIOS, WINDOW
from tests.golden.make_kvpress_more import CHUNK, GO_ON, HALVES, LAG, PIECE, REPEAT, SUFFIX
from tests.methods.test_kvpress import BUCKET, SLACK, Golden, masks, opened

EPSILON = 1e-4 * WINDOW  # beside SnapKV's score, which is a mean over the window there and a sum here


@functools.cache
def read(name: str) -> Golden:
    with np.load(FOLDER / name / "case.npz") as case, np.load(FOLDER / name / "more.npz") as more:
        return opened(name, FOLDER / name, dict(case) | dict(more))


def snap(c):
    return SnapKV(capacity=c, window=WINDOW)


def twins(c: int) -> dict[str, Any]:
    """Ours for each press; FINCH in chunks is in `program`."""
    flat = ExpectedAttention(capacity=c, vnorm=False)
    finch = functools.partial(Finch, capacity=c, window=WINDOW, variant="kvpress")
    return {
        "chunkkv_snapkv": ChunkKV(base=snap(c), variant="kvpress"),
        "chunkkv_knorm": ChunkKV(base=KNorm(capacity=c), chunk=CHUNK, variant="kvpress"),
        "criticalkv_snapkv": CriticalKV(base=snap(c), epsilon=EPSILON),
        "criticalkv_expected": CriticalKV(base=flat, first=0.25),
        "criticalada_snapkv": CriticalKV(base=AdaKV(base=snap(c), slack=SLACK, variant="kvpress"), epsilon=EPSILON, safeguard=0.2),
        "lagkv": LagKV(capacity=c, lag=LAG),
        "lagkv_cross": LagKV(capacity=c, lag=LAG, cross=True),
        "cur": CUR(capacity=c),
        "cur_mean": CUR(capacity=c, kind="mean", local=5, sinks=2),
        "cur_value": CUR(capacity=c, kind="value", local=None),
        "finch": finch(),
        "finch_plain": finch(normalize=False),
        "finch_turned": KeyRerotation(base=finch()),
        "merging": Merging(base=snap(c)),
        "merging_half": Merging(base=KNorm(capacity=c), threshold=0.1, fraction=0.5),
    }


def changed(c: int) -> dict[str, Any]:
    """The twins with one option changed: none of these is kvpress."""
    return {
        "chunkkv_snapkv.paper": ChunkKV(base=snap(c)),
        "chunkkv_knorm.paper": ChunkKV(base=KNorm(capacity=c), chunk=CHUNK),
        "criticalkv_snapkv.first": CriticalKV(base=snap(c), epsilon=EPSILON, first=0.9),
        "criticalkv_snapkv.epsilon": CriticalKV(base=snap(c)),
        "criticalada_snapkv.uniform": CriticalKV(base=snap(c), epsilon=EPSILON),
        "lagkv_cross.ranks": LagKV(capacity=c, lag=LAG),
        "cur.kind": CUR(capacity=c, kind="mean"),
        "cur_mean.local": CUR(capacity=c, kind="mean", sinks=2),
        "finch.normalize": Finch(capacity=c, window=WINDOW, normalize=False),
    }


TURNED = ("merging", "merging_half", "finch_turned")  # those of which keys or values are compared too


@functools.cache
def program(cfg, n: int, chunk: int | None = None):
    """All methods in one program for prompts up to n and every budget, or FINCH alone in chunks of a prompt of n."""
    methods = twins(n) if chunk is None else {"finch_chunk": Finch(capacity=n, window=WINDOW, variant="kvpress", chunk=chunk)}
    if chunk is None and cfg.family == "llama" and cfg.heads > cfg.kv_heads:
        methods |= changed(n)

    def run(params, ids, live, count):
        out = {}
        for x, method in methods.items():
            layers = decoder.prefill(
                cfg, params, decoder.embed(cfg, params, ids, live), jt.Recipe(cache=method), new=0, keep={"cache": count}
            )[1]
            out[x] = [parts[0].kv if x in TURNED else parts[0].kv.pos for parts in layers]
        return out

    return jax.jit(run)


def padded(golden: Golden):
    n = BUCKET.get(golden.n, golden.n)
    ids, live = np.zeros((1, n), np.int32), np.arange(n)[None] >= n - golden.n
    ids[live] = golden.fields["ids"]
    return ids, live


@functools.cache
def ours(name: str, i: int) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """(kept positions bool [l g n], caches of TURNED) of every method at the i-th ratio."""
    golden = read(name)
    ids, live = padded(golden)
    out = program(golden.cfg, ids.shape[1])(golden.params, ids, live, np.int32(golden.count(i)))
    if golden.n in HALVES:
        half = HALVES[golden.n]
        count = np.int32(2 * int(half * (1 - RATIOS[i])))  # FINCH rounds in each chunk
        out |= program(golden.cfg, golden.n, half)(golden.params, ids, live, count)
    out = jax.device_get(out)
    kept = {x: masks([kv.pos for kv in layers] if x in TURNED else layers, golden.n) for x, layers in out.items()}
    return kept, {x: out[x] for x in TURNED}


EXACT = [*(x for x in twins(64) if not x.startswith("lagkv")), "finch_chunk"]


@pytest.mark.parametrize("press", EXACT)
@pytest.mark.parametrize("name", list(CASES))
def test_kept_tokens_are_kvpress_s(name, press):
    golden = read(name)
    if f"{press}.kept" not in golden.fields:
        assert press == "finch_chunk" and golden.n not in HALVES
        return
    for i in range(len(RATIOS)):
        got = ours(name, i)[0][press]
        wrong = np.argwhere(got != golden.kept(press, i))
        assert not len(wrong), f"{press}, {RATIOS[i]} removed: (layer, head, position) {wrong.tolist()}"


def ties(golden, press, i, got):
    """The scores of what is kept are those of what kvpress keeps: of equal scores (all 1 in the last stretch) either may stay."""
    score, kept = golden.score(press, i), golden.kept(press, i)
    for layer, head in np.ndindex(got.shape[:2]):
        mine, theirs = (np.sort(score[layer, head, mask[layer, head]]) for mask in (got, kept))
        np.testing.assert_allclose(mine, theirs, atol=GAP)


@pytest.mark.parametrize("press", ["lagkv", "lagkv_cross"])
@pytest.mark.parametrize("name", list(CASES))
def test_lagkv_keeps_the_same_scores(name, press):
    for i in range(len(RATIOS)):
        ties(read(name), press, i, ours(name, i)[0][press])


@pytest.mark.parametrize("change", list(changed(64)))
def test_the_golden_files_see_each_option(change):
    press = change.split(".")[0]
    cases = [x for x in CASES if x.startswith("llama_gqa")]
    assert any((ours(name, i)[0][change] != read(name).kept(press, i)).any() for name in cases for i in range(len(RATIOS)))


@pytest.mark.parametrize("name", list(CASES))
def test_folded_values_and_turned_keys_are_kvpress_s(name):
    """At the middle ratio: the numbers that are left, by order."""
    golden, caches = read(name), ours(name, 1)[1]
    for press, what in {"merging": "values", "merging_half": "values", "finch_turned": "keys"}.items():
        want = golden.fields[f"{press}.{what}"]
        for layer, kv in enumerate(caches[press]):
            x = kv.v[0] if what == "values" else kv.k[0]
            got = np.stack([head[pos >= 0] for head, pos in zip(x, kv.pos[0], strict=True)])
            np.testing.assert_allclose(got, want[layer], atol=3e-5, err_msg=press)


@pytest.mark.parametrize("name", list(CASES))
def test_channels_are_kvpress_s(name):
    golden = read(name)
    ids, live = map(jax.numpy.asarray, padded(golden))
    methods = [ThinK(ratio=1 - removed, window=WINDOW, variant="kvpress") for removed in RATIOS]
    prefill = lambda params, method: decoder.prefill(
        golden.cfg, params, decoder.embed(golden.cfg, params, ids, live), jt.Recipe(cache=method), new=0
    )[1]
    out = jax.jit(lambda params: [[parts[0].frozen.channels for parts in prefill(params, method)] for method in methods])(golden.params)
    for i, layers in enumerate(out):
        got = np.stack([(np.asarray(x)[0][:, :, None] == np.arange(golden.cfg.head_dim)).any(1) for x in layers])
        np.testing.assert_array_equal(got, golden.fields["think.channels"][i])


# --- KVzip --------------------------------------------------------------------------------------------------------------

ZIPPED = {
    "kvzip": (dict(share="model"), 2048),
    "kvzip_layer": (dict(share="layer"), PIECE),
    "kvzip_pieces": (dict(share="model"), PIECE),
    "kvzip_plus": (dict(share="model", plus=True), PIECE),
}


@functools.cache
def zipped(cfg, n: int):
    """Kept positions of every form of KVzip, budgets traced."""

    def run(params, ids, live, counts):
        out = {}
        for press, (options, chunk) in ZIPPED.items():
            recipe = jt.Recipe(cache=KVzip(capacity=n, slack=1.0, **options))
            ask = dict(chunk=chunk, prompt=REPEAT, further=GO_ON, suffix=SUFFIX)
            layers = prefill_reread(cfg, params, ids, live, recipe, new=0, keep={"cache": counts}, **ask)[1]
            out[press] = [parts[0].kv.pos for parts in layers]
        return out

    return jax.jit(run)


@pytest.mark.parametrize("name", list(CASES))
def test_kvzip_keeps_what_kvpress_keeps(name):
    """kvpress removes floor(removed n l g) slots in all (of a layer: floor(removed n g)), we keep whole numbers a head: where these differ,
    ours are the same best slots but for the few that do not make a number."""
    golden = read(name)
    cfg, n, whole = golden.cfg, golden.n, 0
    ids, live = map(jax.numpy.asarray, padded(golden))
    for i, removed in enumerate(RATIOS):
        for press in ZIPPED:
            heads = cfg.kv_heads * (1 if press == "kvzip_layer" else cfg.layers)
            total = n * heads - int(n * heads * removed)
            got = zipped(cfg, ids.shape[1])(golden.params, ids, live, np.full((cfg.layers, 1), total // heads, np.int32))[press]
            got, want = masks(got, n), golden.kept(press, i)
            assert not (got & ~want).any(), (press, removed, np.argwhere(got & ~want).tolist())
            over = want.sum() - got.sum()
            assert over == (total % heads) * (cfg.layers if press == "kvzip_layer" else 1)
            whole += over == 0
            low = np.where(got, golden.score(press, i), np.inf).min() if press != "kvzip_layer" else np.inf
            assert over == 0 or press == "kvzip_layer" or np.where(want & ~got, golden.score(press, i), -np.inf).max() <= low
    assert whole >= 6
