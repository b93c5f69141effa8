"""Where the parameters of a model stand on a mesh: a table of patterns, a file apart from the model."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Pattern searched in the path of a parameter -> the axis, counted from the end, that `tensor` cuts; what matches none is whole everywhere.
# Heads and hidden channels are cut, so that a block makes its sum over devices once: behind o, behind down.
DECODER: dict[str, int] = {
    r"(^|/)(q|k|v|gate|up)$": -1,
    r"(^|/)(q|k|v|gate|up)_bias$": -1,
    r"(^|/)(o|down)$": -2,
    r"^embed$": -2,
    r"^head$": -1,
}
ENCODER = {k: v for k, v in DECODER.items() if k not in (r"^embed$", r"^head$")}
VLM = {
    r"^(?!vision/)(?:.*/)?(q|k|v|gate|up)$": -1,
    r"^(?!vision/)(?:.*/)?(q|k|v|gate|up)_bias$": -1,
    r"^(?!vision/)(?:.*/)?(o|down)$": -2,
    **ENCODER,
}


def shardings(
    params: Any,
    mesh: Mesh,
    table: dict[str, int] = DECODER,
    *,
    tensor: str = "tensor",
    whole: tuple[str, ...] = (),
    also: str | None = None,
) -> Any:
    """A NamedSharding for each leaf of params (arrays or ShapeDtypeStructs), by the first pattern that its path matches.

    A path is "layers/0/q"; stacked layers ("layers/q", a leading axis) go by the same table. An axis that the devices do not divide stays
    whole, as does what a pattern of `whole` names: with fewer KV heads than devices, ("(^|/)[kv]$", "(^|/)[kv]_bias$"), for a cut inside a head is no use.
    also: a second axis of the mesh, which cuts the longest axis of matrices that is left (weights are then gathered where they are used).
    Give the result to `jax.device_put`, or its leaves by path to `models.load(sharding=...)`; see `by_path`.

    Raises:
      ValueError: the mesh has no such axis.
    """
    if tensor not in mesh.shape:
        raise ValueError(f"the mesh has the axes {', '.join(mesh.axis_names)}, and none is called {tensor!r}")

    def one(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = None if any(re.search(p, name) for p in whole) else next((a for p, a in table.items() if re.search(p, name)), None)
        spec: list[str | None] = [None] * len(x.shape)
        if axis is not None and len(x.shape) >= -axis and not x.shape[axis] % mesh.shape[tensor]:
            spec[axis] = tensor
        free = [i for i in range(len(x.shape)) if spec[i] is None and also is not None and not x.shape[i] % mesh.shape[also]]
        if axis is not None and free:
            spec[max(free, key=lambda i: x.shape[i])] = also
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def by_path(tree: Any) -> dict[str, NamedSharding]:
    """The leaves of `shardings` as the table that `models.load(sharding=...)` takes: each shard of a checkpoint goes straight to its devices."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"^{re.escape(jax.tree_util.keystr(path, simple=True, separator='/'))}$": x for path, x in leaves}
