"""A prefill with ring attention compiled whole for TPU pods, on a machine without a TPU: collectives and memory of each chip.

Claim: with shapes of Llama-3.1-8B a prompt of a million tokens fits on 16 chips of TPU v6e, one of ten millions on 256. (v5e has half the
    memory: ten millions fit on 256 there too, but only because the compiler gathers weights again and again; a million do not on 16.)
Command: python experiments/pod_compile.py                      (needs libtpu: pip install "jax[tpu]")
         python experiments/pod_compile.py --only v6e:4x4       (one topology)
Hardware and time: two cores of a 2.6 GHz Xeon, shared: one to three minutes a row.
Expected: experiments/results/pod_compile/{results.json,README.md}.

What is compiled: embedding, all layers, every layer's keys and values left on the chips, logits of the last token; bfloat16, batch 1, zigzag
layout. Weights are cut over `tensor` and, with `spread`, over the chips of the sequence too, gathered layer by layer. Memory of a chip =
arguments + results + temporaries as the compiler states them; it fits if that is at most the chip's HBM. The layers are alike: programs of 2
and 4 layers are compiled and what a layer adds is extended to 32 (`--whole` compiles all 32 instead).
"""

import dataclasses
import functools
import os
import pathlib
import time
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from jaxtok.evals import report
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.parallel import Spread, make_mesh, shardings
from jaxtok.parallel.traffic import collectives

GIB = 2**30
HBM = {"TPU v5 lite": 16, "TPU v6 lite": 32}  # GiB a chip
LAYERS = 32
SHAPES = dict(
    family="llama", vocab=128_256, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14_336, rope_theta=5e5, norm_eps=1e-5, tied=False
)


@dataclasses.dataclass(frozen=True)
class Case:
    """sequence x tensor chips; thousands (1,024) of tokens."""

    topology: str
    sequence: int
    tensor: int
    thousands: int
    spread: bool = True


CASES = (
    Case("v5e:2x4", 8, 1, 256),
    Case("v5e:4x4", 16, 1, 1024),
    Case("v5e:8x8", 64, 1, 2560),
    Case("v5e:16x16", 256, 1, 10240),
    Case("v6e:2x4", 8, 1, 512),
    Case("v6e:4x4", 16, 1, 1024),
    Case("v6e:8x8", 64, 1, 4096),
    Case("v6e:16x16", 256, 1, 10240),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """only: topologies; whole: compile all layers."""

    only: tuple[str, ...] = ()
    whole: bool = False
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "pod_compile"


def program(case: Case, layers: int, devices: list[Any]) -> dict[str, Any]:
    """What one compiled program needs and sends, of each chip."""
    cfg = Config(layers=layers, **SHAPES)  # type: ignore[arg-type]
    mesh = make_mesh(sequence=case.sequence, tensor=case.tensor, devices=devices)
    spread = Spread(mesh=mesh, layout="zigzag")
    shapes = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0), jnp.bfloat16))
    where = shardings(shapes, mesh, also="sequence" if case.spread else None)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    ids = jax.ShapeDtypeStruct((1, 1024 * case.thousands), jnp.int32, sharding=jax.NamedSharding(mesh, spread.spec("data", "sequence")))

    def prefill(params, ids):
        tokens, caches = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids), new=0, impl=spread)
        return decoder.logits(cfg, params, tokens.x[:, -1:]), [part.kv for (part,) in caches]

    start = time.perf_counter()
    compiled = jax.jit(prefill).lower(params, ids).compile()
    seconds, m = time.perf_counter() - start, compiled.memory_analysis()
    found = collectives(compiled)
    kinds = sorted({c.kind for c in found})
    return {
        "layers": layers, "seconds": round(seconds, 1), "arguments": m.argument_size_in_bytes, "results": m.output_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "collectives": {k: {"issued": sum(c.times for c in found if c.kind == k), "sent": sum(c.sent for c in found if c.kind == k)} for k in kinds},
    }  # fmt: skip


def extended(few: dict[str, Any], more: dict[str, Any], layers: int) -> dict[str, Any]:
    """Sizes at `layers`, on the line through two programs; temporaries that do not grow with the layers stay."""
    each = (layers - few["layers"]) / (more["layers"] - few["layers"])
    line = lambda a, b: a + (b - a) * each
    out: dict[str, Any] = {k: line(few[k], more[k]) for k in ("arguments", "results")}
    out["temporaries"] = max(line(few["temporaries"], more["temporaries"]), more["temporaries"])
    both = {k: (few["collectives"].get(k, {"issued": 0, "sent": 0}), v) for k, v in more["collectives"].items()}
    out["collectives"] = {k: {n: round(line(a[n], b[n])) for n in ("issued", "sent")} for k, (a, b) in both.items()}
    return out | {"layers": layers, "seconds": few["seconds"] + more["seconds"]}


def measure(case: Case, whole: bool) -> dict[str, Any]:
    devices = list(topologies.get_topology_desc(case.topology, platform="tpu").devices)
    run = functools.partial(program, case, devices=devices)
    found = run(layers=LAYERS) if whole else extended(run(layers=2), run(layers=4), LAYERS)
    kind = devices[0].device_kind
    need = found["arguments"] + found["results"] + found["temporaries"]
    tokens = 1024 * case.thousands
    return {
        **dataclasses.asdict(case), "chip": kind, "chips": len(devices), "tokens": tokens, "need": need, "hbm": HBM[kind] * GIB,
        "fits": need <= HBM[kind] * GIB, **found,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    gib = lambda x: f"{x / GIB:.2f}"
    out = ["# Prefill of Llama-3.1-8B shapes, compiled for TPU pods", "", "GiB a chip; sent: by each chip, in all.", "",
           "| topology | chips | tokens | weights, ids | keys, values | temporaries | in all | HBM | fits | permutes | sent | gathers | sent |",
           "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for r in rows:
        if "error" in r:
            out.append(f"| {r['topology']} | | {1024 * r['thousands']:,} | {r['error']} |" + " |" * 9)
            continue
        of = lambda kind, r=r: r["collectives"].get(kind, {"issued": 0, "sent": 0})
        permute, gather = of("collective-permute"), of("all-gather")
        sizes = [gib(r[k]) for k in ("arguments", "results", "temporaries", "need", "hbm")]
        out.append(
            f"| {r['topology']} | {r['chips']} | {r['tokens']:,} | " + " | ".join(sizes) + f" | {'yes' if r['fits'] else 'no'} | "
            f"{permute['issued']:,} | {gib(permute['sent'])} | {gather['issued']:,} | {gib(gather['sent'])} |"
        )  # fmt: skip
    return "\n".join(out) + "\n"


def main(o: Options) -> None:
    rows = []
    for case in CASES:
        if o.only and case.topology not in o.only:
            continue
        try:
            rows.append(measure(case, o.whole))
            print({k: rows[-1][k] for k in ("topology", "tokens", "need", "hbm", "fits", "seconds")}, flush=True)
        except Exception as e:  # what the compiler refuses: out of memory, with its words
            rows.append(dataclasses.asdict(case) | {"error": str(e).splitlines()[0][:300]})
            print(rows[-1], flush=True)
        report.write(o.out / "results.json", {"machine": report.machine(), "rows": rows})
        (o.out / "README.md").write_text(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
