"""Checkpoints with orbax: three items a step, `params` (trained leaves), `rest` (optimizer, step, key, skipped), `data` (its position)."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Checkpoints:
    """The checkpoints of one directory. A save is written aside and renamed, so a kill leaves the last good one.

    Saves block: the training step donates its buffers, and a writer in the background would read what the next step overwrites.
    Arrays are restored with the sharding of the state that asks for them.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int | None = 2):
        self.directory = pathlib.Path(directory).absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()
        except OSError as e:
            raise ValueError(f"directory={str(directory)!r} cannot be written ({e.strerror}); give one that can") from e
        self.manager = _manager(self.directory, keep=keep, writable=True)

    def save(self, step: int, state: Any, data: Any) -> None:
        """`data` is JSON-able: the position of the iterator, None for a function of the step."""
        import orbax.checkpoint as ocp

        params, rest = _items(state)
        args = {"params": ocp.args.StandardSave(params), "rest": ocp.args.StandardSave(rest), "data": ocp.args.JsonSave({"position": data})}
        # force: the manager otherwise declines a step at or before the newest; here it would be a save lost in silence.
        if self.manager.latest_step() != step:
            self.manager.save(step, args=ocp.args.Composite(**args), force=True)

    def restore(self, state: Any, *, resume: bool = True) -> tuple[Any, Any] | None:
        """(state, data position) of the newest checkpoint, None where there is none. ValueError where it does not fit `state`."""
        import orbax.checkpoint as ocp

        step = self.manager.latest_step()
        if step is None:
            return None
        where = f"the checkpoint of step {step} in {self.directory}"
        if not resume:
            raise ValueError(f"resume=False, but there is {where}; give an empty directory or resume=True")
        if step < int(state.step):
            raise ValueError(f"{where} is older than the given state (step {int(state.step)}); give this run a directory of its own")
        params, rest = _items(state)
        _check(self.manager, step, {"params": params, "rest": rest}, where)
        args = {"params": ocp.args.StandardRestore(params), "rest": ocp.args.StandardRestore(rest), "data": ocp.args.JsonRestore()}
        saved = self.manager.restore(step, args=ocp.args.Composite(**args))
        rest = saved["rest"]
        if (rest["key"] != jax.random.key_data(state.key)).any():
            raise ValueError(f"{where} was made with another seed; pass that seed, or another directory")
        new = state._replace(params=saved["params"], opt_state=rest["opt_state"], step=rest["step"], skipped=rest["skipped"])
        new = jax.tree.map(_like, new._replace(key=None), state._replace(key=None))._replace(key=state.key)
        return new, saved["data"]["position"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()


def load(directory: str | pathlib.Path, params: Any, *, step: int | None = None) -> Any:
    """`params` with the trained leaves of a checkpoint that `fit` wrote (the newest, or of `step`).

    params: arrays or ShapeDtypeStructs, the whole tree; leaves that the checkpoint lacks (frozen ones) are returned as given.
    Raises ValueError when there is no such checkpoint or a leaf of it has no match in params.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(directory).absolute()
    if not path.is_dir():
        raise ValueError(f"directory={str(directory)!r} is no directory")
    manager = _manager(path, keep=None, writable=False)
    try:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise ValueError(f"no checkpoint{'' if step is None else f' of step {step}'} in {path}; it holds steps {steps}")
        step = steps[-1] if step is None else step
        saved = _paths(manager.item_metadata(step)["params"])
        wanted = jax.tree_util.tree_map_with_path(lambda p, x: x if _name(p) in saved else None, params)
        _check(manager, step, {"params": wanted}, f"the checkpoint of step {step} in {path}")
        found = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(wanted)))["params"]
    finally:
        manager.close()
    return jax.tree.map(lambda new, old: old if new is None else new, found, params, is_leaf=lambda x: x is None)


def _manager(path, *, keep, writable):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=writable,
        cleanup_tmp_directories=writable,  # what a killed save left behind
        enable_async_checkpointing=False,
    )
    handlers = {"params": ocp.StandardCheckpointHandler(), "rest": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(os.fspath(path), options=options, item_handlers=handlers)


def _like(new, old):
    """orbax commits what it restores to its device; an uncommitted array must stay so: it follows the batch, and compiles nothing new."""
    return new if old.committed else jnp.array(np.asarray(new))


def _items(state):
    rest = state._asdict()
    params = rest.pop("params")
    rest["key"] = jax.random.key_data(rest["key"])
    return params, rest


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _paths(tree):
    """path -> (shape, dtype). Names only: orbax gives lists for tuples and dicts for NamedTuples."""
    return {_name(p): (tuple(x.shape), str(x.dtype)) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _check(manager, step, items, where):
    """Compared before orbax restores: it would cast a dtype in silence, and reports a wrong shape without its name."""
    metadata = manager.item_metadata(step)
    problems = []
    for item, tree in items.items():
        saved, wanted = _paths(metadata[item]), _paths(tree)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                problems.append(f"{item}/{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"{where} is of another structure: {'; '.join(problems[:6])}{more}. Give the params, optimizer and trainable that made it, or another directory"
        )
