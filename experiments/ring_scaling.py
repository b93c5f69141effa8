"""What each scheme of sequence parallelism sends and computes, by number of devices, and the same read off compiled programs.

Claim: the traffic model of jaxtok.parallel.traffic equals the collectives of the compiled program to the byte; zigzag and striped cuts share
    causal work evenly, contiguous ones do not.
Command: python experiments/ring_scaling.py      (8 virtual CPU devices)
Hardware and time: any CPU, about a minute.
Expected: experiments/results/ring_scaling/{results.json,README.md,scaling.png}.

Bytes are those that one device sends in one attention call of a layer (shapes of Llama-3.1-8B: 32 query and 8 KV heads of 128, bfloat16,
batch 1), modelled for up to 256 devices; the check compiles a small call in float32 on 2, 4 and 8.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtok.evals import report
from jaxtok.parallel import Layout
from jaxtok.parallel.layout import KINDS
from jaxtok.parallel.scheme import MASKS, SCHEMES
from jaxtok.parallel.traffic import Call, collectives, sent

DEVICES = (2, 4, 8, 16, 64, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    tokens: int = 1_048_576
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "ring_scaling"


def modelled(tokens: int) -> list[dict[str, Any]]:
    rows = []
    for n in DEVICES:
        call = Call(n=n, b=1, h=32, g=8, c=tokens // n, d=128)
        for scheme in SCHEMES:
            if scheme == "ulysses" and 32 % n:
                continue
            row = {"devices": n, "scheme": scheme, "forward": sent(scheme, call).total}
            rows.append(row | ({"backward": sent(scheme, call, backward=True).total} if scheme == "ring" else {}))
    return rows


def checked(scheme: str, n: int) -> dict[str, Any]:
    """Modelled and compiled bytes of a small call."""
    call = Call(n=n, b=1, h=8, g=2, c=16, d=16, dtype=jnp.float32)
    mesh = jax.make_mesh((n,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    heads, rows = P(None, None, "s"), P(None, "s")
    run = functools.partial(SCHEMES[scheme], axis="s")
    attend = jax.shard_map(
        lambda q, k, v, i, j: run(q, k, v, q_pos=i, k_pos=j), mesh=mesh, in_specs=(heads,) * 3 + (rows,) * 2, out_specs=(heads, heads)
    )
    put = lambda spec, *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
    t = call.c * n
    args = *(put(heads, 1, x, t, 16) for x in (8, 2, 2)), *(put(rows, 1, t, dtype=jnp.int32) for _ in range(2))
    found = sum(c.sent for c in collectives(jax.jit(attend).lower(*args).compile()))
    return {"scheme": scheme, "devices": n, "modelled": sent(scheme, call).total, "compiled": found}


def figure(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(drawn)
    axis = drawn.subplots()
    for scheme, marker in zip(SCHEMES, "osD^", strict=True):
        points = [(r["devices"], r["forward"] / 2**20) for r in rows if r["scheme"] == scheme]
        axis.plot(*zip(*points, strict=True), marker=marker, label=scheme)
    axis.set(xscale="log", yscale="log", xlabel="devices", ylabel="MiB sent by each, one layer, forward")
    axis.set_xticks(DEVICES, [str(n) for n in DEVICES])
    axis.legend()
    drawn.savefig(path, dpi=120)


def markdown(found: dict[str, Any], tokens: int) -> str:
    show = lambda x: f"{x / 2**20:,.1f}"
    out = ["# Sequence parallelism: what is sent and who works", "", "![bytes sent](scaling.png)", "", f"MiB that each device sends in one attention call, {tokens:,} tokens, 32 query and 8 KV heads of 128, bfloat16:", "",
           "| devices | " + " | ".join(SCHEMES) + " | ring, backward |", "|---:|" + "---:|" * (len(SCHEMES) + 1)]  # fmt: skip
    for n in DEVICES:
        of = {r["scheme"]: r for r in found["modelled"] if r["devices"] == n}
        cells = [show(of[s]["forward"]) if s in of else "too few heads" for s in SCHEMES]
        out.append(f"| {n} | " + " | ".join(cells) + f" | {show(of['ring']['backward'])} |")
    out += ["", "The model against compiled programs (bytes, a small call in float32):", "", "| scheme | devices | modelled | compiled |", "|---|---:|---:|---:|"]  # fmt: skip
    out += [f"| {r['scheme']} | {r['devices']} | {r['modelled']:,} | {r['compiled']:,} |" for r in found["checked"]]
    out += ["", "Visible pairs of causal attention at 8,192 tokens on 8 devices, the most that one has over the least:", ""]
    out += [f"- {kind}: {ratio:.4f}" for kind, ratio in found["balance"].items()]
    out += ["", "What works with what:", "", "| scheme | " + " | ".join(KINDS) + " | masks | limits |", "|---|" + "---|" * (len(KINDS) + 2)]
    out += [f"| {s} | " + " | ".join("yes" for _ in KINDS) + f" | {', '.join(MASKS)} | {limit} |" for s, limit in LIMITS.items()]
    return "\n".join(out) + "\n"


LIMITS = {
    "ring": "zigzag and causal: an even number of tokens a device",
    "token_ring": "as ring",
    "ulysses": "query heads a multiple of the devices",
    "gathered": "none; all keys of one head at a time on each device",
}


def main(o: Options) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    pairs = {kind: Layout(kind, 8).pairs(8192) for kind in KINDS}
    found = {
        "machine": report.machine(), "tokens": o.tokens, "modelled": modelled(o.tokens), "checked": [checked(s, n) for s in SCHEMES for n in (2, 4, 8)],
        "balance": {kind: float(p.max() / p.min()) for kind, p in pairs.items()},
    }  # fmt: skip
    wrong = [r for r in found["checked"] if r["modelled"] != r["compiled"]]
    report.write(o.out / "results.json", found)
    (o.out / "README.md").write_text(markdown(found, o.tokens))
    figure(found["modelled"], o.out / "scaling.png")
    print((o.out / "README.md").read_text())
    if wrong:
        raise ValueError(f"the model is wrong for {wrong}")


if __name__ == "__main__":
    main(tyro.cli(Options))
