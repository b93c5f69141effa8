"""`fit`: the one training loop. Everything random or positional is a function of the step, so a resumed run is the unbroken run."""

import collections.abc
import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxtok.train.checkpoint import Checkpoints
from jaxtok.train.metrics import RESERVED, Bar, Log, Writer


class TrainState(NamedTuple):
    """Everything that training carries. `params` is whole; `opt_state` knows the trainable leaves only (frozen ones are None in it)."""

    params: Any
    opt_state: Any
    step: Int32[Array, ""]  # updates attempted = batches consumed = the data position
    key: Array  # typed PRNG key, constant: step s draws from fold_in(key, s)
    skipped: Int32[Array, ""]  # updates not made because the loss or a gradient was not finite


def fit(
    loss_fn: Callable,
    params: Any,
    data: Any,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    state: TrainState | None = None,
    seed: int = 0,
    trainable: Any = None,
    accumulate: int = 1,
    compute_dtype: Any = None,
    directory: str | pathlib.Path | None = None,
    resume: bool = True,
    save_every: int | None = 1000,
    keep: int | None = 2,
    log_every: int = 10,
    tokens: Callable | None = None,
    on_log: Callable | None = None,
    progress: bool = True,
    donate: bool = True,
) -> TrainState:
    """Train until `state.step == steps` and return the state.

    loss_fn(params, batch, key) -> (loss, metrics): a scalar and a dict of scalars. Jitted once a batch shape; calling `fit` again with the
        same `loss_fn` and `optimizer` objects compiles nothing new.
    params: pytree of arrays; None when `state` is given. Never donated: the caller's arrays stay valid.
    data: a pure function `data(step) -> batch` (step is 0-based; the data position *is* the step), or an iterator. With a `directory` an
        iterator also needs `state()` (JSON-able) and `restore(state)`, its position before the next batch. Shapes may differ by step.
    steps: the total count, not the count of this call: a curriculum calls `fit(..., steps=900)`, then `fit(loss, None, ..., state=state,
        steps=2000)`, in one directory if params and optimizer stay the same; rerun, finished stages return at once.
    trainable: which leaves are trained: a predicate on the path ("methods/0/w"), or a pytree of bools (a prefix of params); None = all.
        Frozen leaves have no gradient, no optimizer state, no copy in a checkpoint, and come back as the very arrays that went in.
        Leaves of integers are always frozen.
    accumulate: micro-batches a step (rows i, i + k, i + 2k, ... make the i-th), scanned; gradients, loss and metrics are averaged in f32.
        Equal to the whole batch where the loss is a mean over rows of equal weight.
    compute_dtype: the loss sees floating params in this dtype; the params themselves (which must be f32), gradients and optimizer state
        stay f32. No loss scaling, so bfloat16 rather than float16. The batch is not cast.
    directory: checkpoints (a save is atomic: a kill leaves the last good one) and `metrics.jsonl`; None = nothing is written.
    resume: continue from the newest checkpoint in `directory`, bit for bit as if never stopped (same batches of data assumed);
        False refuses a directory that holds one.
    save_every, keep: steps between checkpoints (None = only the last step) and how many stay (None = all).
    log_every: steps between lines of `metrics.jsonl`: step (updates done), wall (seconds of training, over resumes), loss, grad_norm,
        skipped (total), tokens/s with `tokens`, and every metric, all of that step. The last step always has a line.
    tokens: batch -> int, how many tokens it trains on.
    on_log: called with each line (a dict).
    progress: a progress bar on runs over two seconds (process 0 only).
    donate: update in place.

    A step whose loss or gradient is not finite changes neither params nor optimizer state; it is counted in `skipped` and warned of in
    the log "jaxtok.train". A schedule counts updates made, so it stands still on such a step.
    Raises ValueError on bad arguments, an unwritable directory, a checkpoint of another structure or seed, or data that ends early.
    """
    _validate(params, state, steps=steps, accumulate=accumulate, log_every=log_every, save_every=save_every, keep=keep)
    if compute_dtype is not None:
        compute_dtype = jnp.dtype(compute_dtype)
    whole = params if state is None else state.params
    mask = _mask(whole, trainable)
    # Copied, because the step donates them; strong-typed, because a weak type in the first state would compile a second time.
    trained = jax.tree.map(lambda x, m: jnp.array(x, dtype=x.dtype) if m else None, whole, mask)
    frozen = jax.tree.map(lambda x, m: None if m else x, whole, mask)
    on_device = jax.tree.map(jnp.asarray, frozen)  # numpy leaves would travel at each step
    _check_dtypes(trained, compute_dtype)
    now = _begin(optimizer, trained, state, seed)
    next_batch, position, restore = _source(data, directory)
    with contextlib.ExitStack() as stack:
        checkpoints, log = None, None
        if directory is not None:
            checkpoints = stack.enter_context(Checkpoints(directory, keep=keep))
            restored = checkpoints.restore(now, resume=resume)
            if restored is not None:
                now, saved = restored
                restore(saved)
            log = stack.enter_context(Log(pathlib.Path(directory) / "metrics.jsonl", step=int(now.step)))
        first = int(now.step)
        if first >= steps:
            return _whole(now, frozen)
        bar = stack.enter_context(Bar(steps, enabled=progress and jax.process_index() == 0))
        writer = Writer(log, on_log, skipped=int(now.skipped))
        previous = None
        for step in range(first, steps):
            batch = next_batch(step)
            now, out = _STEPS[donate](
                now, on_device, batch, loss_fn=loss_fn, optimizer=optimizer, accumulate=accumulate, compute_dtype=compute_dtype
            )
            # One step is always in flight while the host works; waiting for the one before bounds memory and never idles the device.
            jax.block_until_ready(previous)
            previous = out
            writer.flush()
            writer.tokens += tokens(batch) if tokens is not None else 0
            done = step + 1
            if done % log_every == 0 or done == steps:
                writer.due(done, out)
            if checkpoints is not None and (done == steps or (save_every and done % save_every == 0)):
                writer.flush()
                checkpoints.save(done, now, position())
            bar.update(done)
        writer.flush()
        return _whole(now, frozen)


def _begin(optimizer, trained, state, seed) -> TrainState:
    """The state before the first step, of the trained leaves only."""
    if state is None:
        opt_state = jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype), optimizer.init(trained))
        return TrainState(trained, opt_state, jnp.int32(0), jax.random.key(seed), jnp.int32(0))
    _check_optimizer(optimizer, trained, state.opt_state)
    return jax.tree.map(jnp.copy, state._replace(params=trained))


def _whole(state, frozen):
    return state._replace(params=_merge(state.params, frozen))


def _step(state, frozen, batch, *, loss_fn, optimizer, accumulate, compute_dtype):
    """One update. `state.params` holds the trained leaves only."""

    def loss(trained, batch, key):
        params = _merge(trained, frozen)
        if compute_dtype is not None:
            params = jax.tree.map(lambda x: x.astype(compute_dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
        value, metrics = loss_fn(params, batch, key)
        _check_outputs(value, metrics)
        return jnp.asarray(value, jnp.float32), {name: jnp.asarray(metric, jnp.float32) for name, metric in metrics.items()}

    grad = jax.value_and_grad(loss, has_aux=True)
    key = jax.random.fold_in(state.key, state.step)
    if accumulate == 1:
        (value, metrics), grads = grad(state.params, batch, key)
    else:

        def micro(total, xs):
            i, part = xs
            out, grads = grad(state.params, part, jax.random.fold_in(key, i))
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), out

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), state.params)
        total, outs = jax.lax.scan(micro, zeros, (jnp.arange(accumulate), _split(batch, accumulate)))
        value, metrics = jax.tree.map(lambda x: x.mean(0), outs)
        grads = jax.tree.map(lambda t, x: (t / accumulate).astype(x.dtype), total, state.params)

    finite = jnp.isfinite(value)
    for leaf in jax.tree.leaves(grads):
        finite &= jnp.isfinite(leaf).all()
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes (Adam: float ** int32 count)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state))
    skipped = state.skipped + (~finite).astype(jnp.int32)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
    out = {"loss": value, "grad_norm": norm, "skipped": skipped, **metrics}
    return TrainState(params, opt_state, state.step + 1, state.key, skipped), out


_STATIC = ("loss_fn", "optimizer", "accumulate", "compute_dtype")
_STEPS = {True: jax.jit(_step, static_argnames=_STATIC, donate_argnums=0), False: jax.jit(_step, static_argnames=_STATIC)}


def _split(batch, k):
    """Every leaf [b ...] -> [k b/k ...]. Strided, so that a batch axis sharded over devices stays where it is."""

    def one(path, x):
        if not x.ndim or x.shape[0] % k:
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path) or '(the batch)'} has shape {x.shape}, whose leading axis does not divide by "
                f"accumulate={k}; make the batch a multiple of it"
            )
        return jnp.moveaxis(x.reshape(x.shape[0] // k, k, *x.shape[1:]), 1, 0)

    return jax.tree_util.tree_map_with_path(one, batch)


def _merge(trained, frozen):
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)


def _mask(params, trainable):
    """A tree of Python bools shaped like params."""
    if trainable is None:
        mask = jax.tree.map(lambda _: True, params)
    elif callable(trainable):
        mask = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(trainable(jax.tree_util.keystr(path, simple=True, separator="/"))), params
        )
    else:
        mask = jax.tree.map(lambda m, part: jax.tree.map(lambda _: bool(m), part), trainable, params)
    mask = jax.tree.map(lambda m, x: m and bool(jnp.issubdtype(x.dtype, jnp.floating)), mask, params)
    if not any(jax.tree.leaves(mask)):
        paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(f"trainable selects no floating leaf of params, which has {paths[:8]}{' ...' if len(paths) > 8 else ''}")
    return mask


def _source(data, directory) -> tuple[Callable, Callable, Callable]:
    """(next_batch(step), position() -> JSON-able, restore(position)) of either kind of data."""
    if isinstance(data, collections.abc.Iterator):
        state, restore = getattr(data, "state", None), getattr(data, "restore", None)
        if not callable(state) or not callable(restore):
            state, restore = _nothing, _nothing
        if directory is not None and state is _nothing:
            raise ValueError("an iterator needs state() and restore(state) to be checkpointed; add them, or pass a function of the step")

        def next_batch(step):
            try:
                return next(data)
            except StopIteration:
                raise ValueError(f"data ended after step {step}; give fewer steps or let it repeat") from None

        return next_batch, state, restore
    if not callable(data):
        raise TypeError(f"data is a {type(data).__name__}; give a function step -> batch, or an iterator")
    return data, _nothing, _nothing


def _nothing(*_):
    return None


def _validate(params, state, *, steps, accumulate, log_every, save_every, keep):
    if (params is None) == (state is None):
        raise ValueError("give params (a new run) or state (to go on from), exactly one of them; the other is None")
    for name, value in (("steps", steps), ("accumulate", accumulate), ("log_every", log_every), ("save_every", save_every), ("keep", keep)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_dtypes(trained, compute_dtype):
    if compute_dtype is None:
        return
    if not jnp.issubdtype(compute_dtype, jnp.floating):
        raise ValueError(f"compute_dtype={compute_dtype} is not floating; use bfloat16 or None")
    for path, x in jax.tree_util.tree_leaves_with_path(trained):
        if x.dtype != jnp.float32:
            raise ValueError(
                f"compute_dtype={compute_dtype} needs float32 params to update, but params{jax.tree_util.keystr(path)} is {x.dtype}; "
                "cast them to float32, or leave compute_dtype out to train in the params' own dtype"
            )


def _check_optimizer(optimizer, trained, opt_state):
    wanted, given = jax.eval_shape(optimizer.init, trained), opt_state
    same = jax.tree.structure(wanted) == jax.tree.structure(given) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True)
    )
    if not same:
        raise ValueError(
            f"state.opt_state {jax.tree.structure(given)} is not of this optimizer and these trainable leaves "
            f"{jax.tree.structure(wanted)}; pass the same optimizer and trainable, or start anew with params=state.params"
        )


def _check_outputs(value, metrics):
    if jnp.shape(value):
        raise ValueError(f"loss_fn returned a loss of shape {jnp.shape(value)}; it must be a scalar: take the mean")
    if not isinstance(metrics, dict):
        raise TypeError(f"loss_fn must return (loss, dict of scalar metrics), not (loss, {type(metrics).__name__})")
    for name, metric in metrics.items():
        if name in RESERVED or jnp.shape(metric):
            raise ValueError(f"metric {name!r} of shape {jnp.shape(metric)}: metrics are scalars, not named any of {RESERVED}")
