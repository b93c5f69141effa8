"""Bytes that a scheme sends, and the collectives that a compiled program holds."""

import dataclasses
import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call: of n devices (`ring` of them around the ring of USP) each holds c tokens of b sequences, h query and g KV heads."""

    n: int
    b: int
    h: int
    g: int
    c: int
    d: int
    dtype: DTypeLike = jnp.bfloat16
    bias: bool = False
    segments: bool = False
    ring: int = 1

    @property
    def keys(self) -> int:
        """Bytes of one device's k, v, positions, biases and segments."""
        kv = 2 * self.b * self.g * self.c * self.d * jnp.dtype(self.dtype).itemsize
        return kv + 4 * self.b * self.c * (1 + self.segments) + 4 * self.b * self.g * self.c * self.bias

    @property
    def queries(self) -> int:
        """Bytes of one device's q, positions and segments."""
        return self.b * self.h * self.c * self.d * jnp.dtype(self.dtype).itemsize + 4 * self.b * self.c * (1 + self.segments)

    @property
    def answers(self) -> int:
        """Bytes of one device's out and lse in float32."""
        return 4 * self.b * self.h * self.c * (self.d + 1)


class Sent(NamedTuple):
    """Bytes that each device sends in one call, by the collective that carries them."""

    permute: int = 0
    exchange: int = 0
    gather: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def sent(scheme: str, call: Call, *, backward: bool = False) -> Sent:
    """What a device sends in the forward pass of a call, or in its backward pass (ring only).

        ring        forward (n-1) keys;   backward (n-1) keys + n x float32 gradients of k, v, bias
        token_ring  (n-1) (queries + answers)
        ulysses     (n-1)/n of q, k, v, bias, out, lse by all-to-all;   (n-1) x positions and segments of queries and keys by all-gather
                    (with `ring` > 1, USP: then a ring whose devices hold n c tokens of h/n heads)
        gathered    (n-1) keys

    KV heads that Ulysses repeats count as often as they are sent. Source: the docstrings of the schemes.
    """
    n, b, c, d, width = call.n, call.b, call.c, call.d, jnp.dtype(call.dtype).itemsize
    if backward and scheme != "ring":
        raise ValueError(f"the backward pass of {scheme} follows JAX's own rules; only the ring's is modelled")
    if scheme == "ring":
        grads = n * 4 * b * call.g * c * (2 * d + call.bias) if backward and n > 1 else 0
        return Sent(permute=(n - 1) * call.keys + grads)
    if scheme == "token_ring":
        return Sent(permute=(n - 1) * (call.queries + call.answers))
    if scheme == "gathered":
        return Sent(gather=(n - 1) * call.keys)
    if scheme == "ulysses":
        g = call.g * n // math.gcd(call.g, n)
        rows = b * c * (width * d * (2 * call.h + 2 * g) + 4 * call.h + 4 * g * call.bias)
        pos = 4 * b * c * 2 * (1 + call.segments)
        inner = Sent()
        if call.ring > 1:
            inner = sent("ring", dataclasses.replace(call, n=call.ring, c=n * c, h=call.h // n, g=g // n, ring=1))
        return Sent(permute=inner.permute, exchange=rows * (n - 1) // n, gather=pos * (n - 1))
    raise ValueError(f"scheme {scheme!r} must be one of ring, token_ring, ulysses, gathered")


# --- what a compiled program holds ---------------------------------------------------------------------------------------------


class Collective(NamedTuple):
    kind: str  # as HLO names it
    nbytes: int  # of its operands on one device
    times: int  # that a run of the program issues it
    devices: int  # that take part together

    @property
    def sent(self) -> int:
        """Bytes that one device sends in all its runs."""
        if self.kind == "collective-permute":
            return self.times * self.nbytes
        if self.kind == "all-to-all":
            return self.times * self.nbytes * (self.devices - 1) // self.devices
        if self.kind == "all-reduce":  # a ring: reduce-scatter, then all-gather
            return self.times * 2 * self.nbytes * (self.devices - 1) // self.devices
        if self.kind == "reduce-scatter":
            return self.times * self.nbytes * (self.devices - 1) // self.devices
        return self.times * self.nbytes * (self.devices - 1)


KINDS = ("collective-permute", "all-to-all", "all-gather", "all-reduce", "reduce-scatter")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_OP = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\((.*)$")


def collectives(program: Any) -> list[Collective]:
    """The collectives of a compiled program (`jitted.lower(...).compile()`), those inside loops as often as the loops run.

    Raises:
      ValueError: a collective stands in a loop whose number of rounds the compiler does not know.
    """
    text = program if isinstance(program, str) else program.as_text()
    bodies, entry, name = {}, None, None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{\s*$", line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name is not None and _OP.match(line):
            bodies[name].append(line)
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    found: Counter[tuple[str, int, int]] = Counter()

    def visit(name: str, times: int | None) -> None:
        for line in bodies[name]:
            made, op, rest = _OP.match(line).groups()  # type: ignore[union-attr]
            kind = op.removesuffix("-start")
            if kind in KINDS:
                if times is None:
                    raise ValueError(f"{kind} in a loop of unknown length: {line.strip()[:120]}")
                devices = _devices(rest)
                nbytes = _operands(made, kind, op != kind, devices)
                found[kind, nbytes, devices] += times
            inner = times
            if op == "while":
                rounds = _rounds(rest, bodies)
                inner = rounds * times if rounds is not None and times is not None else None
            for called in re.findall(
                r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)=\{?%?([\w.-]+(?:, %?[\w.-]+)*)", rest
            ):
                for each in called.replace("%", "").split(", "):
                    if each in bodies:
                        visit(each, inner)

    visit(entry, 1)
    return [Collective(kind, nbytes, times, devices) for (kind, nbytes, devices), times in found.items() if nbytes and times]


def _rounds(rest: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a loop runs: as the compiler says, or from a condition `counter < constant` (loops of jax count from 0)."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', rest)
    if known:
        return int(known[1])
    test = re.search(r"condition=%?([\w.-]+)", rest)
    lines = bodies.get(test[1], []) if test else []
    least = [line for line in lines if " compare(" in line and "direction=LT" in line and line.lstrip().startswith("ROOT")]
    most = [found[1] for line in lines for found in [re.search(r"= [su]32\[\][^ ]* constant\((\d+)\)", line)] if found]
    return int(most[0]) if len(least) == 1 and len(most) == 1 else None


def _devices(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([0-9,]*)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)  # 'axis_0'=1,'axis_1'=8  and those that take part
    if not mesh:
        return 1
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", mesh[2]))


def _operands(made: str, kind: str, started: bool, devices: int) -> int:
    """Bytes of the operands, from the type of the result."""
    sizes = [_SIZES[t] * _product(dims) for t, dims in _SHAPE.findall(made) if t in _SIZES]
    if started and kind in ("collective-permute", "all-gather"):  # (operand, result, context ...)
        sizes = sizes[1:2]
    total = sum(sizes)
    return total // devices if kind == "all-gather" else total * devices if kind == "reduce-scatter" else total


def _product(dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(","))))
