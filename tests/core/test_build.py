"""Methods and budgets from text."""

import re

import pytest

import jaxtok.methods as m
from jaxtok.core.registry import build, parse_budget
from jaxtok.core.types import Protect


@pytest.mark.parametrize(
    "spec, want",
    [
        ("snapkv", m.SnapKV(capacity=100)),
        (" snapkv: window=32 , pool=7 ", m.SnapKV(capacity=100, window=32, pool=7)),
        ("k_norm:sinks=2,recent=3", m.KNorm(capacity=100, protect=Protect(sinks=2, recent=3))),
        ("streaming_llm:compact=false,sinks=0", m.StreamingLLM(capacity=100, sinks=0, compact=False)),
        ("expected_attention:scale=none,epsilon=0.5", m.ExpectedAttention(capacity=100, epsilon=0.5, scale=None)),
        ("ada_kv", m.AdaKV(base=m.SnapKV(capacity=100))),
        ("ada_kv:base=k_norm,alpha=1,sinks=4", m.AdaKV(base=m.KNorm(capacity=100, protect=Protect(sinks=4)), alpha=1.0)),
        ("key_rerotation:base=ada_kv,base=key_diff,slack=3", m.KeyRerotation(base=m.AdaKV(base=m.KeyDiff(capacity=100), slack=3.0))),
        ("per_layer:weights=3+2+1,window=8", m.PerLayer(base=m.SnapKV(capacity=100, window=8), weights=(3.0, 2.0, 1.0))),
        ("per_layer:base=k_norm,capacities=64+32", m.PerLayer(base=m.KNorm(capacity=100), capacities=(64, 32))),
        ("quest", m.Quest(pages=6)),
        ("quest:block=8,pages=5", m.Quest(pages=5, block=8)),
        ("tidaldecode:dense_layers=0", m.TidalDecode(top_k=100, dense_layers=0)),
        ("recycled:top_k=7", m.RecycledAttention(top_k=7)),
        ("sentencekv.reader:ends=3+4", m.SentenceKV(budget=100, ends=(3, 4))),
        ("tokenselect:n_init=4,n_local=16", m.TokenSelect(top_k=80, n_init=4, n_local=16)),
        ("landmark:block=20", m.Landmark(top_k=5, block=20)),
        ("chain:methods=snapkv+think,window=16", m.Chain(methods=(m.SnapKV(capacity=100, window=16), m.ThinK(window=16)))),
        (
            "chain:methods=key_diff+k_norm,sinks=2",
            m.Chain(methods=tuple(c(capacity=100, protect=Protect(sinks=2)) for c in (m.KeyDiff, m.KNorm))),
        ),
    ],
)
def test_build(spec, want):
    assert build(spec, 100) == want


@pytest.mark.parametrize(
    "spec, message",
    [
        ("snapk", r"unknown method 'snapk' \(did you mean snapkv\?\); known: .*ada_kv, "),
        ("snapkv:windo=3", "no option windo; snapkv has window, pool, kind, group"),
        ("ada_kv:foo=1", "no option foo; ada_kv has base, alpha, slack, skip, normalize, variant, and those of its base"),
        ("snapkv:window=x", "window=x must be a whole number"),
        ("ada_kv:alpha=x", "alpha=x must be a number"),
        ("h2o:compact=maybe", "compact=maybe must be true or false"),
        ("snapkv:window=200", "capacity=100 has no room for the 200 protected rows"),
        ("snapkv:window=3,window=4", "window is given twice"),
        ("k_norm:sinks=3,sinks=4", "sinks is given twice"),
        ("snapkv:capacity=4", "the capacity is the budget's to say"),
        ("snapkv:window", "'window' is not option=value"),
        ("chain", "chain needs methods"),
        ("chain:methods=a+b", "unknown method 'a'"),
        ("chain:methods=snapkv+k_norm,alpha=2", "no option alpha; chain has methods"),
        ("ada_kv:base=h2o", "ada_kv needs a CacheScorer as its base, which h2o is not"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(spec, message):
    with pytest.raises(ValueError, match=message) as e:
        build(spec, 100)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, want", [("25%", 0.25), ("100%", 1.0), (" 12.5% ", 0.125), ("128", 128)])
def test_budget(text, want):
    assert parse_budget(text) == want and type(parse_budget(text)) is type(want)


@pytest.mark.parametrize("text", ["0", "-3", "0%", "101%", "nan%", "0.25", "x", ""])
def test_bad_budget(text):
    with pytest.raises(ValueError, match=re.escape(f"budget {text!r} must be ")):
        parse_budget(text)
