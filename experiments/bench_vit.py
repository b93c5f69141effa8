"""A ViT-S/16 on the CPU: the full model, merging at 40% fewer FLOPs, and the same merging in torch.

Claim: at 40% fewer counted FLOPs, ToMe and PiToMe run at least 1.3 times as fast as the full model; ToMe at least 1.2 times as fast as the
    same in torch (a goal), on the same weights and with the same groups of rows.
Command: python experiments/bench_vit.py            (in one environment with jaxtok and torch; without torch: --no-torch)
Hardware: any CPU with nothing else to do; every side uses all its cores, one after the other. Time: about three minutes on 2 cores.
Expected: experiments/results/bench_vit/results.json, which also says on what it was measured.

Random weights and images, float32, from pixels to logits. Each method takes the least reduction whose counted FLOPs (jaxtok.evals.cost, its
own work included) are at most --share of the full model's. The sides run in turn, --repeats times after a warm-up, with a pause behind
each (torch's threads spin for a while); medians and quartiles, on the clock and of the time of all cores. The torch side is eager, written
from ToMe's formulas: cosines of the keys' means over heads, even rows to odd ones, the r best pairs, means weighted by size, log of the
size as bias of scaled_dot_product_attention; q, k and v come of one product. Groups are compared by the map from patches to rows left.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from jaxtok.cli.common import console
from jaxtok.core.recipe import Recipe
from jaxtok.evals import cost, report
from jaxtok.methods.vision import evit, mctf, pitome, tome, turbo, zero_tprune
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig

GOAL, GOAL_TORCH = 1.3, 1.2
VITS = EncoderConfig(width=384, layers=12, heads=6, hidden=1536, out=1000)
BATCH, L = 8, VITS.layers
spread = lambda make, s: Recipe(vit=tuple((i, make(s)) for i in range(L)))
# a recipe for s = 1, 2, ...: the larger, the fewer rows are left; whether it attends in proportion to sizes
METHODS: dict[str, tuple[Callable[[int], Recipe], bool]] = {
    "tome": (lambda s: Recipe(vit=tome.schedule(s, L)), True),
    "pitome": (lambda s: Recipe(vit=pitome.schedule(1 - s / 200, L)), False),
    "turbo": (lambda s: spread(lambda r: turbo.Turbo(remove=r), s), True),
    "mctf": (lambda s: Recipe(vit=mctf.schedule(s, L)), True),
    "evit": (lambda s: Recipe(vit=evit.schedule(1 - s / 100)), False),
    "zero_tprune": (lambda s: Recipe(vit=tuple((i, zero_tprune.ZeroTPrune(remove=s)) for i in (1, 3, 6, 9, 11))), False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """share: of the full model's FLOPs. only: tome, pitome and these methods; () = all."""

    share: float = 0.6
    repeats: int = 15
    pause: float = 0.1
    only: tuple[str, ...] = ()
    torch: bool = True
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "bench_vit" / "results.json"


class Side:
    """A compiled forward pass from images to (logits, map from patches to rows left)."""

    def __init__(self, params, images, recipe: Recipe = vit.PLAIN, proportional: bool = False):
        def run(params, images):
            tokens = vit.encode(VITS, params, vit.embed(VITS, params, images), recipe, proportional=proportional).tokens
            return vit.head(VITS, params, tokens), tokens.source

        self.args = params, images
        self.traced = jax.jit(run).trace(*self.args)
        self.flops = cost.count_jaxpr(self.traced.jaxpr).flops

    def compile(self) -> "Side":
        begin = time.perf_counter()
        self.run = self.traced.lower().compile()
        self.compile_s = time.perf_counter() - begin
        return self

    def __call__(self) -> Any:
        return jax.block_until_ready(self.run(*self.args))


def reach(name: str, params, images, most: float) -> tuple[int, Side]:
    """(s, side) of the least s whose FLOPs are at most `most`, by bisection."""
    make, proportional = METHODS[name]
    low, high, found = 1, 98, {}
    while low < high:
        middle = (low + high) // 2
        found[middle] = Side(params, images, make(middle), proportional)
        low, high = (low, middle) if found[middle].flops <= most else (middle + 1, high)
    side = found.get(low) or Side(params, images, make(low), proportional)
    if side.flops > most:
        raise ValueError(f"{name} does not come down to {most:.3g} FLOPs; raise --share")
    return low, side


class Torch:
    """The same model and the same merging of `remove` rows a layer, eager."""

    def __init__(self, params, images, remove: int):
        import torch

        self.torch, self.remove = torch, remove
        torch.set_num_threads(os.cpu_count() or 1)
        new = lambda x: torch.from_numpy(np.array(x))
        self.images, self.params = new(images), jax.tree.map(new, {k: v for k, v in params.items() if k != "layers"})
        self.layers = []
        for p in params["layers"]:
            own = {k: new(v) for k, v in p.items()}
            own["qkv"] = torch.cat([own[n] for n in "qkv"], 1)
            own["qkv_bias"] = torch.cat([own[n + "_bias"] for n in "qkv"])
            self.layers.append(own | {n: own[n].T.contiguous() for n in ("qkv", "o", "up", "down")})  # [out, in], as nn.Linear has it

    def __call__(self) -> Any:
        with self.torch.inference_mode():
            return self.forward()

    def forward(self):
        torch, f, p, c = self.torch, self.torch.nn.functional, self.params, VITS.width
        (rows, cols), (py, px), b = VITS.grid, VITS.patch, BATCH
        x = self.images.reshape(b, rows, py, cols, px, 3).permute(0, 1, 3, 2, 4, 5).reshape(b, rows * cols, -1)
        x = torch.cat([p["cls"].expand(b, 1, c), x @ p["patch"] + p["patch_bias"]], 1) + p["pos"]
        size, source = torch.ones(b, x.shape[1]), torch.arange(x.shape[1]).expand(b, -1)
        norm = lambda x, p, name: f.layer_norm(x, (c,), p[name], p[name + "_bias"], VITS.norm_eps)
        for layer in self.layers:
            n = x.shape[1]
            qkv = f.linear(norm(x, layer, "norm1"), layer["qkv"], layer["qkv_bias"])
            q, k, v = qkv.view(b, n, 3, VITS.heads, -1).permute(2, 0, 3, 1, 4)
            bias = size.log()[:, None, None] if self.remove else None
            y = f.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + f.linear(y.transpose(1, 2).reshape(b, n, c), layer["o"], layer["o_bias"])
            if self.remove:
                x, size, source = self.merge(x, size, source, k.mean(1))
            y = f.gelu(f.linear(norm(x, layer, "norm2"), layer["up"], layer["up_bias"]))
            x = x + f.linear(y, layer["down"], layer["down_bias"])
        return norm(x, p, "norm")[:, 0] @ p["head"] + p["head_bias"], source

    def merge(self, x, size, source, metric):
        torch, r, n = self.torch, self.remove, x.shape[1]
        metric = self.torch.nn.functional.normalize(metric, dim=-1)
        like = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        like[:, 0] = -torch.inf  # the class row
        best, partner = like.max(-1)
        order = best.argsort(-1, descending=True)
        goes, stays = order[:, :r], order[:, r:].sort(-1).values
        to = partner.gather(1, goes)
        wide = lambda i: i[..., None].expand(-1, -1, x.shape[2])
        heavy = x * size[..., None]
        even, odd = heavy[:, ::2], heavy[:, 1::2].clone()
        odd.scatter_add_(1, wide(to), even.gather(1, wide(goes)))
        size_even, size_odd = size[:, ::2], size[:, 1::2].clone()
        size_odd.scatter_add_(1, to, size_even.gather(1, goes))
        size = torch.cat([size_even.gather(1, stays), size_odd], 1)
        x = torch.cat([even.gather(1, wide(stays)), odd], 1) / size[..., None]
        place = torch.empty((len(source), n), dtype=torch.long)  # old row -> new row
        many = stays.shape[1]
        place[:, 1::2] = many + torch.arange(n // 2)
        place[:, ::2].scatter_(1, stays, torch.arange(many).expand(len(source), -1))
        place[:, ::2].scatter_(1, goes, many + to)
        return x, size, place.gather(1, source)


def agreement(ours, theirs) -> dict[str, float]:
    """Of two (logits, source) maps: largest difference of logits, share of images and of patches in the same groups."""
    (z, a), (y, b) = ([np.asarray(x) for x in side] for side in (ours, theirs))
    return {"logits": float(np.abs(z - y).max()), "images": float((a == b).all(1).mean()), "patches": float((a == b).mean())}


def measure(sides: dict[str, Callable[[], Any]], o: Options, tick) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """({side: {clock, cpu: quartiles in ms}}, {side: what it gave})."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    gave = {}
    for i in range(o.repeats + 1):
        for name, side in sides.items():
            begin = time.process_time(), time.perf_counter()
            out = side()
            end = time.process_time(), time.perf_counter()
            time.sleep(o.pause)
            if i:
                took[name].append((end[0] - begin[0], end[1] - begin[1]))
            else:
                gave[name] = out
        tick(i + 1, o.repeats + 1, "measuring")
    quartiles = lambda x: [round(1e3 * float(v), 3) for v in np.quantile(x, (0.25, 0.5, 0.75))]
    return {n: {kind: quartiles([x[j] for x in t]) for j, kind in enumerate(("cpu", "clock"))} for n, t in took.items()}, gave


def main(o: Options) -> dict[str, Any]:
    params = encoder.init(VITS, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (BATCH, *VITS.image, 3), jnp.float32)  # type: ignore[misc]
    full = Side(params, images)
    names = [n for n in METHODS if not o.only or n in ("tome", "pitome", *o.only)]
    sides, settings = {"full": full}, {}
    with report.bar("bench_vit") as bar:
        for i, name in enumerate(names):
            settings[name], sides[name] = reach(name, params, images, o.share * full.flops)
            bar(i + 1, len(names), f"choosing {name}")
        for i, side in enumerate(sides.values()):
            side.compile()
            bar(i + 1, len(sides), "compiling")
        runs: dict[str, Callable[[], Any]] = dict(sides)
        if o.torch:
            runs |= {"torch, full": Torch(params, images, 0), "torch, tome": Torch(params, images, settings["tome"])}
        load = os.getloadavg()
        took, gave = measure(runs, o, bar)
    ratio = lambda a, b, kind: round(took[a][kind][1] / took[b][kind][1], 3)
    rows = []
    for name in runs:
        row: dict[str, Any] = {"side": name, "ms": took[name]["clock"], "cpu_ms": took[name]["cpu"]}
        if name in sides:
            row |= {"flops": sides[name].flops / full.flops, "compile_s": round(sides[name].compile_s, 2)}
            row |= {"faster": ratio("full", name, "clock"), "faster_cpu": ratio("full", name, "cpu")}
        if name in settings:
            row["setting"] = str(METHODS[name][0](settings[name]).vit[0][1])  # of its first layer
        rows.append(row)
    document: dict[str, Any] = {"rows": rows, "goal": GOAL, "met": {n: ratio("full", n, "clock") >= GOAL for n in ("tome", "pitome")}}
    if o.torch:
        against = {"same": agreement(gave["tome"], gave["torch, tome"]), "full": agreement(gave["full"], gave["torch, full"])}
        against |= {"tome_faster": ratio("torch, tome", "tome", "clock"), "full_faster": ratio("torch, full", "full", "clock")}
        document["torch"] = against | {"goal": GOAL_TORCH, "met": against["tome_faster"] >= GOAL_TORCH}
        document["torch"] |= {"version": runs["torch, tome"].torch.__version__, "threads": runs["torch, tome"].torch.get_num_threads()}  # type: ignore[attr-defined]
    table = Table(title=f"ViT-S/16, batch {BATCH}, float32: ms a batch")
    for name in ("side", "FLOPs", "25%", "median", "75%", "times as fast", "all cores"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for r in rows:
        share = f"{100 * r['flops']:.1f}%" if "flops" in r else ""
        table.add_row(
            r["side"], share, *(f"{x:.1f}" for x in r["ms"]), f"{r['faster']:.2f}" if "faster" in r else "", f"{r['cpu_ms'][1]:.1f}"
        )
    screen = console()
    screen.print(table)
    screen.print(document.get("torch", "no torch"))
    document |= {"options": {k: v for k, v in dataclasses.asdict(o).items() if k != "out"}, "machine": report.machine(), "load": load}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    report.write(o.out, document)
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
