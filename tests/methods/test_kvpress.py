"""Which tokens are kept of random prompts equals kvpress 0.5.5: golden files always (tests/golden/make_kvpress.py), live where it is installed.

Everything goes through `decoder.prefill` with the golden models' weights. Prompts of 60 tokens run left-padded in a bucket of 96, in the
program of the 96-token prompt; budgets are traced, and once static. Random, H2O and PyramidKV may differ by default: why, is shown.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok as jt
from jaxtok.core import budget, select
from jaxtok.methods import H2O, TOVA, AdaKV, ExpectedAttention, KeyDiff, KNorm, PyramidKV, Random, SnapKV, StreamingLLM
from jaxtok.models import decoder, load
from tests.golden import make_kvpress
from tests.golden.make_kvpress import CASES, FOLDER, GAP, RATIOS, SAFE, WINDOW

BUCKET = {60: 96}  # static length of a prompt, where it is not its own
SLACK = 4.0  # room for the most unequal heads of the golden models


class Golden(NamedTuple):
    name: str
    cfg: Any
    params: Any
    fields: dict[str, np.ndarray]

    @property
    def n(self) -> int:
        return len(self.fields["ids"])

    def kept(self, press: str, i: int) -> np.ndarray:
        """bool [l g n] at the i-th ratio."""
        return self.fields[f"{press}.kept"][i]

    def score(self, press: str, i: int) -> np.ndarray:
        return self.fields[f"{press}.score"][i]

    def count(self, i: int) -> int:
        """kvpress's number of kept tokens a head."""
        return max(1, int(self.n * (1 - RATIOS[i])))


def opened(name: str, folder: pathlib.Path, fields=None) -> Golden:
    cfg, params, _ = load.load(folder, dtype=jnp.float32)
    if fields is None:
        with np.load(folder / "case.npz") as case:
            fields = dict(case)
    return Golden(name, cfg, params, fields)


@functools.cache
def read(name: str) -> Golden:
    return opened(name, FOLDER / name)


def twins(c: int) -> dict[str, Any]:
    """Ours for each press that must be met."""
    return {
        "snapkv": SnapKV(capacity=c, window=WINDOW),
        "tova": TOVA(capacity=c, variant="kvpress"),
        "key_diff": KeyDiff(capacity=c),
        "k_norm": KNorm(capacity=c),
        "expected_attention": ExpectedAttention(capacity=c),
        "expected_mean": ExpectedAttention(capacity=c, future=16, sinks=2, covariance=False, vnorm=False),
        "streaming_llm": StreamingLLM(capacity=c, compact=False),
        "ada_snapkv": ada(SnapKV(capacity=c, window=WINDOW), alpha=SAFE["ada_snapkv"]),
        "ada_expected": ada(ExpectedAttention(capacity=c, epsilon=0.02), alpha=SAFE["ada_expected"]),
        "ada_k_norm": ada(KNorm(capacity=c), alpha=SAFE["ada_k_norm"]),
        "observed_attention": H2O(capacity=c, recent=0.0, variant="kvpress"),
    }


def ada(base, **options):
    return AdaKV(base=base, slack=SLACK, **{"variant": "kvpress", **options})


def others(c: int) -> dict[str, Any]:
    """Ours where it may differ."""
    return {
        "random": Random(capacity=c, seed=11),
        "h2o": H2O(capacity=c),
        "pyramidkv": PyramidKV(capacity=c, window=WINDOW, variant="kvpress"),
        "pyramidkv.paper": PyramidKV(capacity=c, window=WINDOW),
    }


def changed(c: int) -> dict[str, Any]:
    """The twins with one option changed: none of these is kvpress."""
    return {
        "tova.official": TOVA(capacity=c),
        "snapkv.pool": SnapKV(capacity=c, window=WINDOW, pool=3),
        "snapkv.group": SnapKV(capacity=c, window=WINDOW, group="max"),
        "expected_attention.future": ExpectedAttention(capacity=c, future=16),
        "expected_attention.covariance": ExpectedAttention(capacity=c, covariance=False),
        "streaming_llm.sinks": StreamingLLM(capacity=c, compact=False, sinks=3),
        "ada_snapkv.paper": ada(SnapKV(capacity=c, window=WINDOW), variant="paper"),
        "ada_k_norm.paper": ada(KNorm(capacity=c), variant="paper", alpha=SAFE["ada_k_norm"]),
        "ada_k_norm.official": ada(KNorm(capacity=c), variant="official", alpha=SAFE["ada_k_norm"]),
    }


PRESSES = list(twins(64))
LLAMAS = [x for x in CASES if x.startswith("llama")]
GROUPED = [x for x in CASES if x.startswith("llama_gqa")]


def prefill(cfg, params, ids, live, method, keep=None):
    """Positions left in each layer's cache, [1 g m] each."""
    site = "policy" if method.site == "policy" else "cache"
    tokens = decoder.embed(cfg, params, ids, live)
    _, layers = decoder.prefill(cfg, params, tokens, jt.Recipe(**{site: method}), new=0, keep=None if keep is None else {site: keep})
    return [parts[0].kv.pos for parts in layers]


@functools.cache
def program(cfg, n: int):
    """The methods in one program for prompts up to n and every budget; beside the twins only what the tests below ask for."""
    methods = twins(n)
    if cfg.family == "llama":
        methods |= others(n) | (changed(n) if cfg.heads > cfg.kv_heads else {})
    return jax.jit(lambda params, ids, live, keep: {x: prefill(cfg, params, ids, live, method, keep) for x, method in methods.items()})


def masks(layers, n: int) -> np.ndarray:
    """bool [l g n] of positions [1 g m] a layer."""
    return np.stack([[np.isin(np.arange(n), head) for head in np.asarray(pos)[0]] for pos in layers])


def run(golden: Golden, keep) -> dict[str, np.ndarray]:
    """Kept positions bool [l g n] of every method at a budget, i32 broadcastable to the layers."""
    n = BUCKET.get(golden.n, golden.n)
    ids, live = np.zeros((1, n), np.int32), np.arange(n)[None] >= n - golden.n
    ids[live] = golden.fields["ids"]
    keep = np.broadcast_to(np.asarray(keep, np.int32), golden.cfg.layers)[:, None]
    out = jax.device_get(program(golden.cfg, n)(golden.params, ids, live, keep))
    return {x: masks(layers, golden.n) for x, layers in out.items()}


@functools.cache
def ours(name: str, i: int) -> dict[str, np.ndarray]:
    golden = read(name)
    return run(golden, golden.count(i))


def best(score: np.ndarray, count, always=False) -> np.ndarray:
    """bool [l g n]: the `always` and the best others, count (int, or one a layer) of each head; plain numpy."""
    out = np.zeros(score.shape, bool)
    first = np.where(always, np.inf, score)
    for i, c in enumerate(np.broadcast_to(count, len(score))):
        np.put_along_axis(out[i], np.argsort(-first[i], -1, kind="stable")[:, :c], True, -1)
    return out


# --- equal --------------------------------------------------------------------------------------------------------------


def test_the_golden_files_are_those_of_kvpress_0_5_5_and_no_cut_is_near_a_tie():
    for name in CASES:
        golden = read(name)
        assert str(golden.fields["made_with"]).startswith("kvpress==0.5.5 ") and tuple(golden.fields["ratios"]) == RATIOS
        assert len(set(golden.fields["ids"].tolist())) == golden.n
        gaps = make_kvpress.gaps(golden.fields)
        assert set(PRESSES) <= set(gaps) and min(gaps.values()) > GAP
        for press in PRESSES:
            for i in range(len(RATIOS)):  # kvpress's count, truncated in floats: 9 of 50 at 0.8, where 10 is a fifth
                assert (golden.kept(press, i).sum(-1).mean(-1) == golden.count(i)).all()
    cases = [read(name).cfg for name in CASES]
    assert {x.heads // x.kv_heads for x in cases} == {1, 2} and any(x.qk_norm for x in cases)
    assert read("llama_mha_50").count(2) == 9 and budget.capacity(0.2, 50) == 10
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 1e6


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("name", list(CASES))
def test_kept_tokens_are_kvpress_s(name, press):
    golden = read(name)
    for i, removed in enumerate(RATIOS):
        wrong = np.argwhere(ours(name, i)[press] != golden.kept(press, i))
        assert not len(wrong), f"{press}, {removed} removed: (layer, head, position) {wrong.tolist()}"


def test_static_capacities_and_compact_positions_keep_the_same():
    golden, i = read("llama_gqa_60"), 1
    methods = twins(golden.count(i)) | {
        "streaming_llm.compact": StreamingLLM(capacity=golden.count(i)),
        "pyramidkv": PyramidKV(capacity=30, window=WINDOW, variant="kvpress"),
    }
    ids, live = jnp.asarray(golden.fields["ids"])[None], jnp.ones((1, 60), bool)
    out = jax.jit(lambda params: {x: prefill(golden.cfg, params, ids, live, method) for x, method in methods.items()})(golden.params)
    for x, layers in out.items():
        press = x.removesuffix(".compact")
        np.testing.assert_array_equal(masks(layers, 60), golden.kept(press, i), x)
        spare = methods[x].site == "policy"
        slots = [layer.shape[-1] - spare for layer in layers]
        assert slots == ([52, 8] if x == "pyramidkv" else [60, 60] if x.startswith("ada_") else [30, 30])


@pytest.mark.parametrize("change", list(changed(64)))
def test_the_golden_files_see_each_option(change):
    """With one option off, the tokens are no longer kvpress's: the cases are not too weak."""
    press = change.split(".")[0]
    assert any((ours(name, i)[change] != read(name).kept(press, i)).any() for name in GROUPED for i in range(len(RATIOS)))


# --- why random, H2O and PyramidKV may differ ------------------------------------------------------------------------------


def test_random_differs_by_its_generator():
    """Both keep the `count` best of uniform draws; the numbers are torch's there and JAX's here."""
    chosen = jax.jit(select.choose)
    for name in LLAMAS:
        golden = read(name)
        for i in range(len(RATIOS)):
            draws, kept = golden.score("random", i), golden.kept("random", i)
            assert (draws >= 0).all() and (draws < 1).all() and abs(draws.mean() - 0.5) < 0.1
            np.testing.assert_array_equal(best(draws, golden.count(i)), kept)
            np.testing.assert_array_equal(draws[0], draws[1])  # seeded anew in each layer
            got = ours(name, i)["random"]
            assert (got.sum(-1) == golden.count(i)).all() and (got != kept).any() and (got[0] != got[1]).any()
            if name == LLAMAS[0]:  # given torch's numbers, our selection keeps kvpress's tokens
                same = chosen(jnp.asarray(draws), jnp.ones(draws.shape, bool), jnp.full(draws.shape[:2], golden.count(i), jnp.int32))
                np.testing.assert_array_equal(same, kept)


def test_h2o_differs_by_its_recent_half_and_by_not_dividing():
    """kvpress ranks A_j / (queries that see j) and protects nothing (our variant="kvpress", recent=0); H2O ranks A_j beside the newest."""
    differ = 0
    for name in LLAMAS:
        golden = read(name)
        at = np.arange(golden.n)
        for i in range(len(RATIOS)):
            mean, kept, count = golden.score("observed_attention", i), golden.kept("observed_attention", i), golden.count(i)
            np.testing.assert_array_equal(best(mean, count), kept)
            received = mean * (golden.n - at)
            recent = at >= golden.n - (count + 1) // 2  # half up
            want = best(received, count, always=recent)
            free = np.where(recent, np.inf, received)
            assert (np.where(want, free, np.inf).min(-1) - np.where(want, -np.inf, free).max(-1)).min() > GAP
            np.testing.assert_array_equal(ours(name, i)["h2o"], want)
            assert (best(mean, count, always=recent) != kept).any() and (best(received, count) != kept).any(), "both departures count"
            differ += (want != kept).any()
    assert differ == len(LLAMAS) * len(RATIOS)


def pyramid(n: int, removed: float, window: int, layers: int, beta: int = 20) -> list[int]:
    """kvpress's tokens a layer: from max to min in even steps, rounded half to even; uniform unless n >= max >= min >= window."""
    c = n * (1 - removed)
    top, low = 2 * c - c / beta, c / beta
    if top >= n - window:
        top, low = n - window, 2 * c - (n - window)
    if not n >= top >= low >= window:
        return [max(1, round(c))] * layers
    return [round(top - i * (top - low) / (layers - 1)) for i in range(layers)]


def paper(n: int, c: int, window: int, layers: int, beta: int = 20) -> list[int]:
    """The card's tokens a layer, rounded half up: the window comes on top of what is shared out."""
    free = c - window
    if n < 2 * free:
        return [c] * layers
    top, low = 2 * free - free // beta, free // beta
    if top > n - window:
        top, low = n - window, 2 * free - (n - window)
    return [int(np.floor(top - i * (top - low) / (layers - 1) + 0.5)) + window for i in range(layers)]


def test_pyramidkv_differs_by_its_budgets_alone():
    """Tokens a layer: kvpress's rule is the recorded one. At equal budgets the tokens are the same, and the budgets are the same
    (variant="kvpress") where n (1 - ratio) is whole and no layer ends on a half."""
    fractions = 0
    for name in CASES:
        golden = read(name)
        for i, removed in enumerate(RATIOS):
            counts, kept, total = pyramid(golden.n, removed, WINDOW, 2), golden.kept("pyramidkv", i), golden.n * (1 - removed)
            assert kept.sum(-1).tolist() == [[c] * golden.cfg.kv_heads for c in counts]
            np.testing.assert_array_equal(best(golden.score("pyramidkv", i), counts), kept)
            np.testing.assert_array_equal(run(golden, counts)["snapkv"], kept)
            if name not in LLAMAS or golden.n in BUCKET:
                continue  # our pyramid is that of the static length: a test above has n = 60
            got = run(golden, round(total))
            assert got["pyramidkv.paper"].sum(-1)[:, 0].tolist() == paper(golden.n, round(total), WINDOW, 2)
            np.testing.assert_array_equal(
                got["pyramidkv.paper"], best(golden.score("pyramidkv", i), paper(golden.n, round(total), WINDOW, 2))
            )
            if abs(total - round(total)) < 1e-9 or counts[0] == counts[1]:
                np.testing.assert_array_equal(got["pyramidkv"], kept)
            else:
                fractions += 1
                assert (name, total, counts) == ("llama_mha_50", 37.5, [42, 33])
                assert got["pyramidkv"].sum(-1)[:, 0].tolist() == [42, 34], "38 in all of the average layer, not 37.5"
    assert fractions == 1


def test_pyramidkv_rounds_halves_up():
    """c = 30, beta 20: max 58.5, min 1.5; kvpress keeps 58 and 2, we 59 and 2."""
    golden = read("llama_gqa_60")
    for i, removed in enumerate(RATIOS):
        counts = pyramid(60, removed, 1, 2)
        assert golden.kept("pyramidkv_window_1", i)[:, 0].sum(-1).tolist() == counts
        method = PyramidKV(capacity=round(60 * (1 - removed)), window=1, variant="kvpress")
        assert [int(method.layer(j, 2).share(method.capacity, 60)) for j in range(2)] == ([59, 2] if i == 1 else counts)
    assert golden.kept("pyramidkv_window_1", 1)[:, 0].sum(-1).tolist() == [58, 2]


# --- live ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
def test_live(tmp_path):
    """A model and a prompt that no file holds; cuts nearer than GAP to a tie are left out."""
    pytest.importorskip("kvpress", reason="live parity needs kvpress 0.5.5 in an environment of its own: see tests/golden/make_kvpress.py")
    case = make_kvpress.Case("Llama", "gqa", 4321, 96)
    model = make_kvpress.build(case)
    fields = make_kvpress.record(model, make_kvpress.prompt(case))
    make_kvpress.save(tmp_path, model, fields)
    golden, compared = opened("live", tmp_path, fields), 0
    for i in range(len(RATIOS)):
        got = run(golden, golden.count(i))
        for press in PRESSES:
            for layer in range(golden.cfg.layers):
                at = slice(layer, layer + 1)
                if make_kvpress.gap(press, golden.kept(press, i)[at], golden.score(press, i)[at]) > GAP:
                    np.testing.assert_array_equal(got[press][at], golden.kept(press, i)[at], f"{press} layer {layer}")
                    compared += 1
    assert compared > len(PRESSES) * len(RATIOS)
