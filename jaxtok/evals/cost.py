"""FLOPs and bytes of a program, counted by walking its jaxpr. Nothing is compiled and nothing runs.

XLA's own analysis counts a scan body once whatever its length, a gather as its whole operand and ``cond`` as its dearer branch, so it cannot
show what keeping fewer tokens saves. This count does, and every FLOPs and bytes figure of the project comes from here.

FLOPs
    dot_general, ragged_dot_general      2 * elements of the result * contracted length
    convolution                          2 * elements of the result * kernel taps * input channels a group
    arithmetic, comparison, select,      1 an element of the result, whatever the dtype (XLA files transcendentals apart)
      transcendentals, random bits
    reduce (sum, max, ...)               elements in - elements out; argmax, argmin, cumsum and its like: elements in
    reduce_window (pooling)              elements of the result * window
    sort, top_k                          elements in * ceil(log2(length of the sorted axis))
    scatter-add and its like             elements of the updates; scatter (set) 0
    moves (reshape, transpose, slice, gather, convert, concatenate, ...) 0

Bytes: traffic with memory under ideal fusion, the model of a roofline.
    1. An array is *stored* (program inputs, results of kernels) or *fused*. Kernels are dot, convolution, gather, scatter,
       dynamic_update_slice, reduce, cumulative, sort, top_k, collectives, Pallas kernels. Everything else (elementwise, broadcast, convert,
       transpose, slice, dynamic_slice, concatenate, pad, iota) is fused: it never reaches memory by itself. A reshape is the array itself.
    2. A kernel reads each distinct stored array behind its operands once, and writes its result once. A slice of a stored array reads the
       slice. So ``w.astype(f32)`` in a dot reads w's own bytes, and ``k`` broadcast over a head group reads k once.
    3. A fused array that stands for more than twice its own bytes is stored first by whoever reads it (sources read, itself written).
       Program outputs and what enters or leaves a loop or a branch are stored likewise.
    4. gather reads what it returns and its indices, and writes what it returns. scatter reads indices and updates and writes the
       updates' bytes (scatter-add and its like read them too). dynamic_update_slice reads and writes the update. Both write in place, as
       they do into a donated buffer; one into a loop's constant or slice pays for a copy, as restacking a cache through scan does.
    5. Arrays of one element are free: loop counters and indices live in registers.

Control flow: scan is its body times its length; while its body (and condition) times ``trips``; cond the chosen branch; shard_map one
device's body times the devices; jit, remat, custom_jvp, custom_vjp are looked into. Code whose result is unused is not counted; code that
appears twice is counted twice (no common subexpressions).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

Number = int | float


class Cost(NamedTuple):
    """What a program costs. ``unknown`` names what was only guessed, in branches not taken as well: primitives without a rule (operands
    read, results written, a FLOP an element), ``while[i]`` without trips (once; i in program order), ``pallas_call:name`` undeclared."""

    flops: Number
    bytes: Number
    by_primitive: dict[str, tuple[Number, Number]]  # primitive -> (flops, bytes), dearest first; "fusion": fused arrays that were stored
    unknown: tuple[str, ...]

    def times(self, n: Number) -> Cost:
        """This cost n times over."""
        return _cost({name: (f * n, b * n) for name, (f, b) in self.by_primitive.items()}, self.unknown)

    def plus(self, other: Cost) -> Cost:
        """This cost and another one's."""
        table = dict(self.by_primitive)
        _add(table, other.by_primitive, 1)
        return _cost(table, {*self.unknown, *other.unknown})


_DECLARED: dict[str, Callable[..., tuple[Number, Number]]] = {}


def declare(name: str, rule: Callable[..., tuple[Number, Number]]) -> None:
    """Give the jitted function or Pallas kernel called `name` its cost: ``rule(*inputs) -> (flops, bytes)``, inputs being avals with shape
    and dtype. For kernels that cannot carry a ``pl.CostEstimate``; wins over one. ValueError when the name is taken."""
    if name in _DECLARED:
        raise ValueError(f"cost of {name!r} is declared already; choose another name for the kernel")
    _DECLARED[name] = rule


def count(
    fn: Callable,
    *args: Any,
    static_argnums: int | Sequence[int] = (),
    trips: int | Mapping[int, int] | None = None,
    branch: str | int | Sequence[float] | Mapping[int, Any] = "max",
    **kwargs: Any,
) -> Cost:
    """The cost of ``fn(*args, **kwargs)``; arguments are arrays or ShapeDtypeStructs. A jitted `fn` keeps its own static arguments.

    trips: how often each while loop runs: one number for all, or {i: number} for the i-th in program order.
    branch: which branch a cond takes: "max" (most FLOPs, then most bytes), an index (lax.cond: 1 is the true branch), one probability a
    branch (expected cost), or {i: any of these} for the i-th cond in program order (the others "max").
    """
    staged: Any = fn if hasattr(fn, "trace") and static_argnums == () else jax.jit(fn, static_argnums=static_argnums)
    return count_jaxpr(staged.trace(*args, **kwargs).jaxpr, trips=trips, branch=branch)


def count_jaxpr(jaxpr: Any, *, trips: int | Mapping[int, int] | None = None, branch: Any = "max") -> Cost:
    """`count` of a closed jaxpr."""
    walk = _Walk(trips, branch)
    return _cost(walk.nested(jaxpr, [walk.stored(v.aval) for v in jaxpr.jaxpr.invars])[0], walk.unknown)


def peak_memory(compiled: Any) -> int:
    """Bytes a compiled program (``jit(f).lower(...).compile()``) holds at once: arguments + outputs + temporaries - donated arguments."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError(f"no memory analysis on {jax.default_backend()}; compile for the CPU to get one")
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes


def _add(table: dict, other: Mapping, scale: Number) -> None:
    for name, (flops, nbytes) in other.items():
        table[name] = (table.get(name, (0, 0))[0] + flops * scale, table.get(name, (0, 0))[1] + nbytes * scale)


def _cost(table: Mapping, unknown: Any) -> Cost:
    rows = {k: v for k, v in sorted(table.items(), key=lambda kv: (-kv[1][0], -kv[1][1], kv[0])) if v != (0, 0)}
    return Cost(sum(f for f, _ in rows.values()), sum(b for _, b in rows.values()), rows, tuple(sorted(unknown)))


@functools.cache
def _bits(dtype: Any) -> int:
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else None
    return info(dtype).bits if info else 8 * dtype.itemsize  # int4 has an itemsize of 1


def _nbytes(aval: Any) -> int:
    return 0 if getattr(aval, "size", 0) <= 1 else -(-aval.size * _bits(aval.dtype) // 8)


@dataclasses.dataclass(eq=False)
class _Array:
    size: int  # bytes
    reads: dict[Any, int]  # what a kernel that uses it reads: stored array (or slice of one) -> bytes
    stored: bool = False
    root: Any = None  # the buffer it lives in: in-place writes keep their operand's


# fmt: off
_ELEMENTWISE = set("""
    add sub mul div rem max min neg sign floor ceil round exp exp2 log log1p expm1 tanh logistic sin cos tan asin acos atan sinh cosh asinh
    acosh atanh atan2 erf erf_inv erfc pow integer_pow sqrt rsqrt cbrt square reciprocal abs is_finite and or xor not shift_left
    shift_right_logical shift_right_arithmetic select_n clamp eq ne lt le gt ge eq_to lt_to le_to nextafter population_count clz lgamma digamma
    igamma igammac polygamma bessel_i0e bessel_i1e add_any mulhi random_bits random_seed random_fold_in random_split threefry2x32
    rng_uniform""".split())
_FUSED = set("""
    broadcast_in_dim broadcast_to transpose convert_element_type reduce_precision rev concatenate pad iota iota_2x32_shape copy copy_p
    real imag complex conj stack tile full zeros_like empty axis_index platform_index random_clone
    debug_callback debug_print create_token after_all dce_sink""".split())
_SAME = set("""
    reshape squeeze expand_dims bitcast_convert_type stop_gradient optimization_barrier sharding_constraint reshard mesh_cast
    layout_constraint device_put name pvary pcast random_wrap random_unwrap with_memory_space_constraint preduced tie""".split())
_SLICES = {"slice", "dynamic_slice", "split", "unstack"}
_CALLS = set("""
    jit pjit closed_call call checkpoint remat remat2 remat_opt custom_jvp_call custom_vjp_call custom_vmap_call composite""".split())
_COLLECTIVE = set("""
    psum psum_invariant unreduced_psum pmax pmin all_gather all_gather_invariant all_gather_reduced all_to_all ppermute pbroadcast
    reduce_scatter unreduced_reduce_scatter ragged_all_to_all""".split())
# fmt: on


def _kernel_flops(eqn: Any) -> Number | None:
    """FLOPs of one primitive that is a kernel; None when there is no rule."""
    name, x, out, p = eqn.primitive.name, eqn.invars and eqn.invars[0].aval, eqn.outvars[0].aval, eqn.params
    if name in ("dot_general", "ragged_dot_general"):
        dims = p["dimension_numbers"] if name == "dot_general" else p["ragged_dot_dimension_numbers"].dot_dimension_numbers
        return 2 * out.size * math.prod(x.shape[i] for i in dims[0][0])
    if name == "conv_general_dilated":
        w = eqn.invars[1].aval
        return 2 * out.size * (w.size // w.shape[p["dimension_numbers"].rhs_spec[0]])
    if name.startswith("reduce_window"):
        return out.size * math.prod(p["window_dimensions"])
    if name in ("argmax", "argmin") or name.startswith("cum"):
        return x.size
    if name in _COLLECTIVE:
        return out.size if name.startswith(("psum", "pm", "reduce", "unreduced")) else 0
    if name.startswith("reduce"):
        return max(0, x.size - out.size)
    if name in ("sort", "top_k", "approx_top_k"):
        axis = {"sort": p.get("dimension"), "top_k": p.get("axis", -1), "approx_top_k": p.get("reduction_dimension")}[name]
        return x.size * max(1, (x.shape[axis] - 1).bit_length())
    return None


def _is_view(eqn: Any) -> bool:
    """Whether the result is the operand under another shape."""
    name, p = eqn.primitive.name, eqn.params
    if name == "transpose":  # of axes of length one
        moved = [i for i in p["permutation"] if eqn.invars[0].aval.shape[i] != 1]
        return moved == sorted(moved)
    x, out = eqn.invars and eqn.invars[0].aval, eqn.outvars[0].aval
    return name in _SAME or (name in ("broadcast_in_dim", "convert_element_type") and (x.size, x.dtype) == (out.size, out.dtype))


class _Walk:
    """One count: the table being filled, what was guessed, how many whiles and conds were met."""

    def __init__(self, trips: Any, branch: Any) -> None:
        self.trips, self.branch = trips, branch
        self.table: dict[str, tuple[Number, Number]] = {}
        self.unknown: set[str] = set()
        self.whiles, self.conds, self.keys = itertools.count(), itertools.count(), itertools.count()

    def tally(self, name: str, flops: Number = 0, nbytes: Number = 0) -> None:
        _add(self.table, {name: (flops, nbytes)}, 1)

    def stored(self, aval: Any, root: Any = None) -> _Array:
        key, size = next(self.keys), _nbytes(aval)
        return _Array(size, {key: size}, True, key if root is None else root)

    def store(self, a: _Array) -> None:
        if not a.stored:
            self.tally("fusion", 0, sum(a.reads.values()) + a.size)
            key = next(self.keys)
            a.reads, a.stored, a.root = {key: a.size}, True, key

    def read(self, arrays: Sequence[_Array]) -> int:
        merged: dict[Any, int] = {}
        for a in arrays:
            if sum(a.reads.values()) > 2 * a.size:
                self.store(a)
            merged |= a.reads
        return sum(merged.values())

    def part(self, a: _Array, whole: Any, part: Any) -> _Array:
        """A slice: its share of what the whole reads."""
        if not _nbytes(part):
            return _Array(0, {})
        key = next(self.keys)
        return _Array(_nbytes(part), {(k, key): -(-b * part.size // whole.size) for k, b in a.reads.items()})

    def nested(self, closed: Any, args: Sequence[_Array], needed: Sequence[bool] | None = None) -> tuple[dict, list[_Array]]:
        """A jaxpr in a table of its own, with its outputs stored."""
        outer, self.table = self.table, {}
        outs = self.run(closed, args, needed)
        for a in outs:
            self.store(a)
        table, self.table = self.table, outer
        return table, outs

    def run(self, closed: Any, args: Sequence[_Array], needed: Sequence[bool] | None = None) -> list[_Array]:
        jaxpr = getattr(closed, "jaxpr", closed)
        env: dict[Any, _Array] = {v: self.stored(v.aval) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))
        fetch = lambda v: _Array(_nbytes(v.aval), {}) if isinstance(v, jex.Literal) else env[v]
        needed = [True] * len(jaxpr.outvars) if needed is None else needed
        live = {v for v, n in zip(jaxpr.outvars, needed, strict=True) if n and not isinstance(v, jex.Literal)}
        eqns = []
        for eqn in reversed(jaxpr.eqns):
            used = [v in live for v in eqn.outvars]
            if any(used) or eqn.effects:
                eqns.append((eqn, used))
                live.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
        for eqn, used in reversed(eqns):
            env.update(zip(eqn.outvars, self.equation(eqn, [fetch(v) for v in eqn.invars], used), strict=True))
        # an unneeded output stands for nothing: its equation may not have been walked
        return [fetch(v) if n else _Array(0, {}) for v, n in zip(jaxpr.outvars, needed, strict=True)]

    def equation(self, eqn: Any, ins: list[_Array], used: list[bool]) -> list[_Array]:
        name, p = eqn.primitive.name, eqn.params
        avals, out = [v.aval for v in eqn.outvars], eqn.outvars[0].aval if eqn.outvars else None
        label = str(p.get("name") or "")
        declared = name in (*_CALLS, "pallas_call") and label in _DECLARED
        if name in _CALLS and not declared:
            return self.run(p.get("jaxpr") or p.get("call_jaxpr") or p.get("call"), ins, used)
        if declared or name in ("scan", "while", "cond", "shard_map", "pallas_call"):  # nothing fuses into these
            for a in ins:
                self.store(a)
        if name in ("scan", "while", "cond", "shard_map"):
            return getattr(self, "loop" if name in ("scan", "while") else name)(eqn, ins, used)
        if _is_view(eqn) and len(avals) <= len(ins):
            return ins[: len(avals)]
        if name in _SLICES:
            return [self.part(ins[0], eqn.invars[0].aval, a) for a in avals]
        if name in _ELEMENTWISE or name in _FUSED:
            self.tally(name, sum(a.size for a in avals) if name in _ELEMENTWISE else 0)
            reads = {k: b for a in ins for k, b in a.reads.items()}
            return [_Array(_nbytes(a), dict(reads) if _nbytes(a) else {}) for a in avals]
        if declared:
            self.tally(label, *_DECLARED[label](*[v.aval for v in eqn.invars]))
        elif name == "gather":  # of a fused operand: what stands behind the elements it returns
            self.tally(name, 0, self.read([self.part(ins[0], eqn.invars[0].aval, out), ins[1]]) + _nbytes(out))
        elif name == "dynamic_update_slice" or name.startswith("scatter"):
            update, sets = eqn.invars[1 if name.startswith("dyn") else 2].aval, name in ("dynamic_update_slice", "scatter")
            self.store(ins[0])
            self.tally(name, 0 if sets else update.size, self.read(ins[1:]) + (1 if sets else 2) * _nbytes(update))
            return [self.stored(out, ins[0].root)]
        elif name == "pallas_call" and p.get("cost_estimate") is not None:
            estimate = p["cost_estimate"]
            self.tally(f"pallas_call:{label}", estimate.flops + estimate.transcendentals, estimate.bytes_accessed)
        else:
            flops = _kernel_flops(eqn) if eqn.outvars else 0
            if flops is None:
                name, flops = (f"pallas_call:{label}", 0) if name == "pallas_call" else (name, sum(getattr(a, "size", 0) for a in avals))
                self.unknown.add(name)
            self.tally(name, flops, self.read(ins) + sum(map(_nbytes, avals)))
        return [self.stored(a) for a in avals]

    def loop(self, eqn: Any, ins: list[_Array], used: list[bool]) -> list[_Array]:
        p = eqn.params
        if eqn.primitive.name == "scan":
            # told by rank, since the counts' parameters differ between versions of JAX: xs and ys have the loop's axis outside only
            same = lambda outer, inner: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))
            length, body = p["length"], p["jaxpr"]
            carries = same(eqn.outvars, body.jaxpr.outvars)
            consts = same(eqn.invars, body.jaxpr.invars) - carries
        else:
            label, (skip, consts), carries, body = next(self.whiles), (p["cond_nconsts"], p["body_nconsts"]), len(used), p["body_jaxpr"]
            length = self.trips.get(label) if isinstance(self.trips, Mapping) else self.trips
            if length is None:
                self.unknown.add(f"while[{label}]")
                length = 1
            if length < 0:
                raise ValueError(f"trips={self.trips!r}: while {label} cannot run {length} times; give a number from 0 up")
            _add(self.table, self.nested(p["cond_jaxpr"], [self.stored(v.aval) for v in p["cond_jaxpr"].jaxpr.invars])[0], length)
            ins = ins[skip:]
        kind = lambda i: "carry" if consts <= i < consts + carries else "other"
        inner = [self.stored(v.aval, (kind(i), i)) for i, v in enumerate(body.jaxpr.invars)]
        table, results = self.nested(body, inner, [True] * carries + used[carries:])
        for i, a in enumerate(results):
            # a carry may be any carry's buffer (double buffering); a stacked output is a buffer of its own
            if isinstance(a.root, tuple) and (i >= carries or a.root[0] == "other"):
                _add(table, {"copy": (0, 2 * a.size)}, 1)
        _add(self.table, table, length)
        return [self.stored(v.aval, ins[consts + i].root if i < carries else None) for i, v in enumerate(eqn.outvars)]

    def cond(self, eqn: Any, ins: list[_Array], used: list[bool]) -> list[_Array]:
        branches, label = eqn.params["branches"], next(self.conds)
        pick = self.branch.get(label, "max") if isinstance(self.branch, Mapping) else self.branch
        runs = [self.nested(b, [self.stored(v.aval, a.root) for v, a in zip(b.jaxpr.invars, ins[1:], strict=True)], used) for b in branches]
        if pick == "max":
            pick = max(range(len(runs)), key=lambda i: _cost(runs[i][0], ())[:2])
        if isinstance(pick, int) and 0 <= pick < len(runs):
            pick = [int(i == pick) for i in range(len(runs))]
        if isinstance(pick, str | int) or len(pick) != len(runs) or abs(sum(pick) - 1) > 1e-6 or min(pick) < 0:
            raise ValueError(
                f"branch={pick!r}: cond {label} has {len(runs)} branches; give 'max', an index below that, or a probability each"
            )
        for weight, (table, _) in zip(pick, runs, strict=True):
            _add(self.table, table, weight)
        roots = [{outs[i].root for _, outs in runs} for i in range(len(eqn.outvars))]
        return [self.stored(v.aval, r.pop() if len(r) == 1 else None) for v, r in zip(eqn.outvars, roots, strict=True)]

    def shard_map(self, eqn: Any, ins: list[_Array], used: list[bool]) -> list[_Array]:
        p = eqn.params
        body = getattr(p["jaxpr"], "jaxpr", p["jaxpr"])
        devices = math.prod(p["mesh"].shape[a] for a in p["newly_manual_axes"])
        _add(self.table, self.nested(body, [self.stored(v.aval) for v in body.invars], used)[0], devices)
        return [self.stored(v.aval) for v in eqn.outvars]
