"""The training loop, against numbers worked out by hand and against itself."""

import dataclasses
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok import train

X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
W = np.array([[1.0], [-2.0], [0.5]], np.float32)


def data(step):
    rows = np.random.default_rng(step).choice(64, 12, replace=False)
    return {"x": X[rows], "y": X[rows] @ W}


def regression(params, batch, key):
    error = batch["x"] @ params["w"] + params["b"][None] - batch["y"]
    return (error**2).mean(), {"mae": jnp.abs(error).mean()}


def zeros():
    return {"w": jnp.zeros((3, 1)), "b": jnp.zeros((1,))}


def parabola(params, batch, key):
    return jnp.square(params["w"] - batch).sum(), {}


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@dataclasses.dataclass
class Traces:
    """A loss that counts how often it is traced."""

    loss: object = regression
    count: int = 0

    def __call__(self, params, batch, key):
        self.count += 1
        return self.loss(params, batch, key)

    __hash__ = object.__hash__


def test_two_steps_by_hand():
    # loss (w - 3)^2, gradient 2 (w - 3), rate 0.1: w = 0, then 0.6, then 0.6 + 0.1 * 4.8 = 1.08
    lines = []
    end = train.fit(
        parabola, {"w": jnp.zeros(())}, lambda step: np.float32(3), optimizer=optax.sgd(0.1), steps=2, log_every=1, on_log=lines.append
    )
    np.testing.assert_allclose(end.params["w"], 1.08, rtol=1e-6)
    assert int(end.step) == 2 and int(end.skipped) == 0
    assert [line["step"] for line in lines] == [1, 2]
    np.testing.assert_allclose([line["loss"] for line in lines], [9.0, 5.76], rtol=1e-6)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], [6.0, 4.8], rtol=1e-6)
    assert list(lines[0]) == ["step", "wall", "loss", "grad_norm", "skipped"]


def test_finds_the_optimum():
    end = train.fit(regression, zeros(), data, optimizer=optax.adam(0.05), steps=500)
    np.testing.assert_allclose(end.params["w"], W, atol=1e-3)
    np.testing.assert_allclose(end.params["b"], 0, atol=1e-3)


@pytest.mark.parametrize("k", [2, 3, 12])
def test_accumulation_is_one_big_batch(k):
    lines, lines_k = [], []
    whole = train.fit(regression, zeros(), data, optimizer=optax.adam(0.1), steps=6, log_every=1, on_log=lines.append)
    parts = train.fit(regression, zeros(), data, optimizer=optax.adam(0.1), steps=6, log_every=1, on_log=lines_k.append, accumulate=k)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole.params, parts.params)
    for a, b in zip(lines, lines_k, strict=True):
        np.testing.assert_allclose([b["loss"], b["mae"], b["grad_norm"]], [a["loss"], a["mae"], a["grad_norm"]], rtol=1e-5)


def test_micro_batches_draw_their_own_noise():
    def loss(params, batch, key):
        return (params["w"] * jax.random.normal(key)).sum() + 0 * batch.sum(), {}

    seen = []
    for k in (1, 2):
        start = {"w": jnp.zeros(())}
        end = train.fit(loss, start, lambda step: np.ones(2, np.float32), optimizer=optax.sgd(1.0), steps=2, accumulate=k)
        seen.append(float(end.params["w"]))
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(2)]
    once = sum(float(jax.random.normal(key)) for key in keys)
    twice = sum(float(jax.random.normal(jax.random.fold_in(key, i))) for key in keys for i in range(2)) / 2
    np.testing.assert_allclose(seen, [-once, -twice], rtol=1e-6)


def test_mixed_precision_keeps_float32_masters():
    def loss(params, batch, key):
        assert params["w"].dtype == params["fixed"].dtype == jnp.bfloat16 and params["ids"].dtype == jnp.int32
        return (params["w"] * params["fixed"]).sum(), {}

    params = {"w": jnp.ones((2,)), "fixed": jnp.ones((2,)), "ids": jnp.arange(3)}
    options = dict(optimizer=optax.sgd(1e-4, momentum=0.0), compute_dtype=jnp.bfloat16, trainable=lambda path: path == "w")
    end = train.fit(loss, params, lambda step: 0, steps=10, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves((end.params["w"], end.opt_state))} == {jnp.dtype("float32")}
    # a bfloat16 master would not move: 1 - 1e-4 rounds to 1
    np.testing.assert_allclose(end.params["w"], 1 - 10 * 1e-4, rtol=1e-6)


def test_bfloat16_params_train_in_their_own_dtype():
    end = train.fit(parabola, {"w": jnp.zeros((), jnp.bfloat16)}, lambda step: jnp.bfloat16(3), optimizer=optax.adam(0.1), steps=3)
    assert end.params["w"].dtype == jnp.bfloat16 and float(end.params["w"]) > 0.25
    with pytest.raises(ValueError, match=r"params\['w'\] is bfloat16; cast"):
        train.fit(parabola, {"w": jnp.zeros((), jnp.bfloat16)}, lambda s: 0, optimizer=optax.sgd(1.0), steps=1, compute_dtype="bfloat16")


@pytest.mark.parametrize("trainable", [lambda path: path.startswith("methods/"), {"base": False, "methods": True}])
def test_frozen_leaves(trainable, tmp_path):
    def loss(params, batch, key):
        error = batch["x"] @ (params["base"]["w"] + params["methods"]["w"]) - batch["y"]
        return (error**2).mean(), {}

    base = {"w": jnp.full((3, 1), 0.1), "table": jnp.arange(4), "host": np.ones(2, np.float32)}
    params = {"base": base, "methods": {"w": jnp.zeros((3, 1)), "index": jnp.arange(2)}}
    end = train.fit(loss, params, data, optimizer=optax.adamw(0.05), steps=400, trainable=trainable, directory=tmp_path)
    np.testing.assert_allclose(end.params["methods"]["w"], W - 0.1, atol=2e-2)
    assert all(end.params["base"][name] is leaf for name, leaf in base.items())
    assert end.params["methods"]["index"] is params["methods"]["index"]
    assert [leaf.shape for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim] == [(3, 1), (3, 1)]  # Adam's two moments
    assert same(train.load(tmp_path, params), end.params)


def test_a_step_that_is_not_finite_is_skipped_and_counted(caplog):
    def with_nan(step):
        batch = data(step)
        return {**batch, "y": batch["y"] * np.nan} if step == 3 else batch

    lines = []
    options = dict(optimizer=optax.adam(0.1), log_every=1)
    with caplog.at_level(logging.WARNING, "jaxtok.train"):
        end = train.fit(regression, zeros(), with_nan, steps=6, on_log=lines.append, **options)
    left_out = train.fit(regression, zeros(), lambda step: data(step if step < 3 else step + 1), steps=5, **options)
    assert same(end.params, left_out.params) and same(end.opt_state, left_out.opt_state)
    assert int(end.skipped) == 1 and int(end.step) == 6
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1] and np.isnan(lines[3]["loss"])
    assert ["step 4: 1 updates skipped" in record.getMessage() for record in caplog.records] == [True]


def test_a_gradient_that_is_not_finite_is_skipped_too():
    end = train.fit(lambda p, b, k: (jnp.sqrt(p["w"]).sum(), {}), {"w": jnp.zeros(2)}, lambda s: 0, optimizer=optax.sgd(1.0), steps=2)
    assert int(end.skipped) == 2 and same(end.params, {"w": jnp.zeros(2)})


def test_resumed_is_unbroken_and_compiles_once(tmp_path):
    loss = Traces()
    options = dict(optimizer=optax.adamw(optax.linear_schedule(0.1, 0.0, 40)), save_every=7, log_every=2)
    whole = train.fit(loss, zeros(), data, steps=40, **options)
    for steps in (11, 25, 40):  # three runs, each resumes where the one before ended
        end = train.fit(loss, zeros(), data, steps=steps, directory=tmp_path, **options)
        assert int(end.step) == steps
    assert same((end.params, end.opt_state, end.step), (whole.params, whole.opt_state, whole.step))
    assert loss.count == 1

    def never(step):
        raise AssertionError("a finished run asks for no batch")

    assert same(train.fit(loss, zeros(), never, steps=30, directory=tmp_path, **options).params, whole.params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["35", "40", "metrics.jsonl"]


def test_stages_of_other_shapes_go_on_from_a_state(tmp_path):
    loss, optimizer = Traces(), optax.adam(0.05)

    def halves(step):
        return {name: rows[:6] for name, rows in data(step).items()}

    def stages(directory):
        first = train.fit(loss, zeros(), data, optimizer=optimizer, steps=5, directory=directory)
        return first, train.fit(loss, None, halves, state=first, optimizer=optimizer, steps=9, directory=directory)

    first, end = stages(None)
    one_call = train.fit(loss, zeros(), lambda step: data(step) if step < 5 else halves(step), optimizer=optimizer, steps=9)
    assert loss.count == 2  # one compile a shape, over all calls
    assert same((end.params, end.opt_state, end.step), (one_call.params, one_call.opt_state, one_call.step)) and int(end.step) == 9
    for _ in range(2):  # written, then rerun: both stages are found finished
        assert same(stages(tmp_path)[1].params, end.params)
    assert int(first.step) == 5 and np.isfinite(first.params["w"]).all()  # a state given is not donated
    assert [line["step"] for line in train.read(tmp_path / "metrics.jsonl")] == [5, 9]
    with pytest.raises(ValueError, match="not of this optimizer"):
        train.fit(loss, None, data, state=first, optimizer=optax.sgd(0.1), steps=9)


@pytest.mark.parametrize("donate", [True, False])
def test_donation_leaves_the_callers_arrays(donate):
    params = zeros()
    end = train.fit(regression, params, data, optimizer=optax.sgd(0.1), steps=3, donate=donate)
    assert same(params, zeros()) and not same(end.params, params)


def test_tokens_per_second():
    def slow(step):
        time.sleep(0.02)
        return data(step)

    lines = []
    options = dict(optimizer=optax.sgd(0.1), steps=8, log_every=3, on_log=lines.append)
    train.fit(regression, zeros(), slow, tokens=lambda batch: batch["x"].size, **options)
    assert [line["step"] for line in lines] == [3, 6, 8]
    spans = np.diff([0.0] + [line["wall"] for line in lines])
    np.testing.assert_allclose([line["tokens/s"] for line in lines], np.array([3, 3, 2]) * 36 / spans, rtol=0.01)
    assert spans[1] > 0.06 and spans[2] > 0.04


def bad(**options):
    given = dict(optimizer=optax.sgd(0.1), steps=2)
    return lambda: train.fit(
        options.pop("loss", regression), options.pop("params", zeros()), options.pop("data", data), **{**given, **options}
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(steps=0), ValueError, "steps=0 must be at least 1"),
        (bad(accumulate=-1), ValueError, "accumulate=-1"),
        (bad(accumulate=5), ValueError, r"\['x'\] has shape \(12, 3\).*accumulate=5"),
        (bad(keep=0), ValueError, "keep=0"),
        (bad(params=None), ValueError, "exactly one"),
        (bad(trainable=lambda path: False), ValueError, r"selects no floating leaf.*\['b', 'w'\]"),
        (bad(compute_dtype="int32"), ValueError, "int32 is not floating"),
        (bad(loss=lambda p, b, k: (p["w"], {})), ValueError, r"loss of shape \(3, 1\)"),
        (bad(loss=lambda p, b, k: (p["w"].sum(), {"loss": 0.0})), ValueError, "metric 'loss'"),
        (bad(loss=lambda p, b, k: (p["w"].sum(), 0.0)), TypeError, "dict of scalar metrics"),
        (bad(data=[1, 2]), TypeError, "data is a list"),
        (bad(data=iter([data(0)])), ValueError, "data ended after step 1"),
        (bad(data=iter([data(0)]), directory="never_made"), ValueError, r"state\(\) and restore"),
    ],
)
def test_bad_input(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        call()
    assert not list(tmp_path.iterdir())
