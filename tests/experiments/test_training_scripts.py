"""Every script that trains compiles its step once a batch shape, counted by running the script itself at a tiny size."""

import dataclasses
import importlib.util
import pathlib
import re
import sys

import jax
import numpy as np

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


def script(name, monkeypatch):
    """The module of an experiment, not run."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_script_that_trains_is_counted_here():
    """A new one needs its own test below."""
    trains = {p.stem for p in FOLDER.glob("*.py") if re.search(r"\boptax\b|jaxtok\.train(?!\.(?:compresskv|sale))", p.read_text())}
    assert trains == {
        "train_embedded",
        "train_lococo",
        "linen_example",
        "train_duo_gates",
        "train_small_vlm",
        "long_range",
        "train_attention",
    }


def test_the_embedded_model(tmp_path, monkeypatch):
    """Three phases of stages in two batch shapes that come back: two traces of the loss, whatever the checkpoints and stages do."""
    m = script("train_embedded", monkeypatch)
    stage = m.Stage(steps=52, length=128, batch=2, pairs=(2, 4), kinds=(0.4, 0.3, 0.3))
    long = dataclasses.replace(stage, length=160, batch=1)
    for name, phase in (
        ("CURRICULUM", (stage, long)),
        ("FINISH", (dataclasses.replace(stage, steps=3), long)),
        ("LAST", (dataclasses.replace(long, steps=2),)),
    ):
        monkeypatch.setattr(m, name, phase)
    monkeypatch.setattr(m, "BIG", dataclasses.replace(m.BIG, width=16, head_dim=4, hidden=16, layers=1))
    text = "".join(np.random.default_rng(0).choice(list("etaoin shrdlu\n"), 5000))
    monkeypatch.setattr(m, "books", lambda: (text, text, text))
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    traces, shapes, make, batch_of = [], set(), m.make_loss, m.batch_of

    def counted(cfg):
        loss = make(cfg)

        def loss_fn(params, batch, key):
            traces.append(batch["ids"].shape)
            return loss(params, batch, key)

        return loss_fn

    def seen(*args):
        batch = batch_of(*args)
        shapes.add(batch["ids"].shape)
        return batch

    monkeypatch.setattr(m, "make_loss", counted)
    monkeypatch.setattr(m, "batch_of", seen)
    m.train(m.Args(out=tmp_path / "results", models=tmp_path / "models"))
    assert (tmp_path / "models" / "embedded" / "model.safetensors").is_file()
    assert shapes == {(2, 129), (1, 161)} and sorted(traces) == sorted(shapes), "the step was compiled again for a shape it had seen"


def test_the_linen_example(monkeypatch):
    m = script("linen_example", monkeypatch)
    state = m.TrainState.create(
        apply_fn=m.Decoder(cfg := m.Config(vocab=8, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=8)).apply,
        params={"decoder": m.blocks.init(cfg, jax.random.key(0))},
        tx=m.optax.sgd(0.1),
    )
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, cfg.vocab)
    loss, traces = m.loss_fn, []
    monkeypatch.setattr(m, "loss_fn", lambda *a: traces.append(1) or loss(*a))
    for _ in range(3):
        state, _ = m.train_step(state, ids)
    assert len(traces) == 1 and int(state.step) == 3


def test_lococo(tmp_path, monkeypatch):
    """Its measurement takes the same loss, in programs of their own."""
    m = script("train_lococo", monkeypatch)
    text = "".join(np.random.default_rng(0).choice(list("etaoin shrdlu"), m.HELD + 5000))
    monkeypatch.setattr(m, "book", lambda: text)
    cfg, params, tokenizer = m.load.load("embedded")
    cfg = dataclasses.replace(cfg, width=16, head_dim=4, hidden=16, layers=1)
    params = m.blocks.init(cfg, jax.random.key(0))
    monkeypatch.setattr(m.load, "load", lambda _: (cfg, params, tokenizer))
    traces, make = [], m.lococo.make_loss

    def counted(*args, **options):
        loss = make(*args, **options)
        return lambda *batch: (traces.append(jax.config.jax_disable_jit), loss(*batch))[1]

    monkeypatch.setattr(m.lococo, "make_loss", counted)
    out = m.main(m.Args(slots=8, block=8, length=24, batch=2, steps=4, rows=4, out=tmp_path))
    assert len(traces) == 2, "once for the step, once for the measurement"
    assert set(out["nats a character"]) == {"full cache", "alpha = 0: heavy hitters only", "before training", "trained"}
    assert (tmp_path / "curves.png").is_file() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_gates_of_duo_attention(tmp_path, monkeypatch):
    """One batch shape, one trace of the loss; the gates are written, and the evaluation is of as many whole heads as asked."""
    m, traces = script("train_duo_gates", monkeypatch), []
    from jaxtok.train import duo_attention
    from tests.evals import tiny

    make = duo_attention.make_loss

    def counted(*args, **options):
        loss = make(*args, **options)
        return lambda *args: traces.append(args[1]["ids"].shape) or loss(*args)

    monkeypatch.setattr(duo_attention, "make_loss", counted)
    monkeypatch.setattr(m.load, "load", lambda _: tiny.make())
    seen = []
    monkeypatch.setattr(m, "found", lambda cfg, params, tokenizer, args, full: seen.append(int(full.sum())) or 0.5)
    monkeypatch.setattr(m, "SEARCH", {})
    args = m.Args(length=250, steps=3, batch=2, pool=3, sinks=1, recent=4, out=tmp_path)
    document = m.main(args)
    assert len(traces) == 1 and seen == [4, 2, 2, 0]
    np.testing.assert_allclose(np.loadtxt(tmp_path / "gates.tsv"), document["gates"], atol=1e-4)
    assert (tmp_path / "results.json").is_file() and 0 <= np.min(document["gates"]) <= np.max(document["gates"]) <= 1


def test_the_small_vision_language_model(tmp_path, monkeypatch):
    """Each loss is traced once a batch shape for the steps and once for the watched digits, whatever the checkpoints and stages do."""
    m = script("train_small_vlm", monkeypatch)
    stage = lambda steps, kind, **more: m.Stage(steps=steps, kind=kind, least=4, batch=2, **more)
    whole = stage(2, "whole", patches=9, dense=0.5)
    stages = (stage(1, "views", patches=16), stage(252, "tower", patches=9), whole, dataclasses.replace(whole, steps=1))
    monkeypatch.setattr(m, "STAGES", stages)
    small = dataclasses.replace(m.CFG.vision, width=16, heads=2, hidden=16, layers=2)
    text = dataclasses.replace(m.CFG.text, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, layers=1)
    monkeypatch.setattr(m, "CFG", dataclasses.replace(m.CFG, vision=small, text=text, until=1))
    rng = np.random.default_rng(0)
    image = np.zeros((30, 28, 28), np.uint8)
    image[:, 9:19, 9:19] = rng.integers(128, 256, (30, 10, 10))
    source = m.digits.Digits(image, np.arange(30) % 10)
    monkeypatch.setattr(m, "sources", lambda: (source, source))
    batches, traces = {}, []
    batch_of, tower_loss, whole_loss = m.batch_of, m.tower_loss, m.whole_loss
    monkeypatch.setattr(m, "batch_of", lambda d, seed, step, s: batches.setdefault((s, step > 2), batch_of(d, seed, step, s)))
    monkeypatch.setattr(m, "tower_loss", lambda p, b, key: traces.append(("tower", b["at"].shape)) or tower_loss(p, b, key))
    monkeypatch.setattr(m, "whole_loss", lambda share, p, b, key: traces.append(("whole", share)) or whole_loss(share, p, b, key))
    monkeypatch.setattr(m, "ship", lambda args, params: None)
    m.train(m.Args(out=tmp_path))
    views = 2 * m.VIEWS
    assert {x: traces.count(x) for x in traces} == {("tower", (views, 16)): 2, ("tower", (2, 9)): 2, ("whole", 0.5): 3}
    assert len((tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()) > 0


def test_long_range(tmp_path, monkeypatch):
    """One trace of the loss a length of the steps and one a measured length, for each system; what is done is not done again."""
    m, traces = script("long_range", monkeypatch), []
    make = m.language.make_loss

    def counted(cfg, method, **options):
        loss = make(cfg, method, **options)
        return lambda *args: traces.append(args[1]["ids"].shape) or loss(*args)

    monkeypatch.setattr(m.language, "make_loss", counted)
    monkeypatch.setattr(m, "STAGES", {"recall": (m.Stage(1, 40, 2, 4), m.Stage(1, 80, 2, 2)), "text": (m.Stage(1, 40),)})
    monkeypatch.setattr(m, "LENGTHS", {"recall": (80,), "text": (40,)})
    args = m.Args(systems=("meta",), out=tmp_path, near=8, group=4, width=16, layers=1, hidden=96, tokens=80, rows=2)
    result = m.main(args)
    assert traces == [(2, 44), (1, 88), (1, 88)]
    for row in result["systems"].values():
        assert [x["length"] for x in row["lengths"]] == [80]
        assert all(x["flops"] > 0 and 0 <= min(x["recall"], x["needle"]) <= max(x["recall"], x["needle"]) <= 1 for x in row["lengths"])
    assert m.main(args) == result and len(traces) == 3
    assert {p.name for p in (tmp_path / "recall").iterdir()} == {"meta", "eval.json", "lengths.png", "README.md"}
    for task in m.STAGES:
        shown = dataclasses.replace(m.Args(), task=task)
        full = m.count(*m.system("full", shown))
        assert all(abs(m.count(*m.system(name, shown)) - full) <= 0.02 * full for name in m.SYSTEMS)
    monkeypatch.setattr(m, "book", lambda: (jax.numpy.arange(300) % 256, jax.numpy.arange(200) % 256))
    bits = m.main(dataclasses.replace(args, task="text", systems=("scout",)))["systems"]["scout"]["lengths"][0]["bits"]
    assert 4 < bits < 20


def test_other_attention_in_encoders(tmp_path, monkeypatch):
    """One trace of the loss a system; a second call goes on from the checkpoints and trains nothing."""
    m, traces = script("train_attention", monkeypatch), []
    from jaxtok.evals.digits import Digits

    make = m.classify.make_loss

    def counted(*args, **options):
        loss = make(*args, **options)
        return lambda *batch: (traces.append(1), loss(*batch))[1]

    digits = Digits(np.random.default_rng(0).integers(0, 255, (20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8))
    monkeypatch.setattr(m.classify, "make_loss", counted)
    monkeypatch.setattr(m, "load", lambda _: digits)
    monkeypatch.setattr(m.clutter, "held_out", lambda step: m.clutter.batch(digits, 0, 10, step=step))
    monkeypatch.setattr(m, "CONFIGS", {t: dataclasses.replace(c, width=8, heads=2, hidden=8, layers=2) for t, c in m.CONFIGS.items()})
    args = m.Args(steps=3, batch=2, rows=4, systems=("biformer", "ponet"), out=tmp_path)
    first = m.main(args)
    assert [(r["task"], r["system"]) for r in first] == [("clutter", "biformer"), ("recall", "ponet")] and len(traces) == 2
    assert all((tmp_path / r["task"] / r["system"] / "curves.png").is_file() for r in first)
    assert [r["right"] for r in m.main(args)] == [r["right"] for r in first] and len(traces) == 2
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {r['system']} | {r['right']:.3f} |" in page and (tmp_path / f"{r['task']}.png").is_file() for r in first)
