"""jaxtok against transformers and kvpress (both torch) on the CPU: prefill, greedy decoding, and SnapKV at a quarter of the cache.

Claim: on the same random-weight model, prefill >= 1.1 times as fast, decoding >= 1 (batch 1) and >= 1.2 (batch 4) times, prefill and
    decoding with SnapKV >= 1.2 times as fast as kvpress.
Command: python experiments/bench_decoder.py           (in one environment with jaxtok, torch, transformers < 5.3 and kvpress 0.5.5)
Hardware: any CPU; both sides use all its cores, one after the other. Time: about ten minutes on 2 cores.
Expected: experiments/results/bench_decoder/results.json, which also says on what it was measured.

Every figure is the median of interleaved repeats (jaxtok, torch, jaxtok, torch, ...), after a warm-up that also shows that both sides
give the same logits and text. torch runs sdpa attention without generate()'s bookkeeping: a bare loop over the model's forward, the
fastest way that needs no compiler. jaxtok's 256 steps are one compiled loop; its compile time is printed beside.
"""

import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import kvpress
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate
from jaxtok.methods import SnapKV
from jaxtok.models import decoder, load

ROOT = pathlib.Path(__file__).parents[1]
GOALS = {("prefill", 1): 1.1, ("prefill", 4): 1.1, ("decode", 1): 1.0, ("decode", 4): 1.2, ("snapkv", 1): 1.2, ("snapkv", 4): 1.2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """length: prompt tokens; new: greedy steps; kept: share of the prompt that SnapKV keeps."""

    length: int = 2048
    new: int = 256
    kept: float = 0.25
    batches: tuple[int, ...] = (1, 4)
    repeats: int = 5
    width: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 1408
    vocab: int = 8192
    out: pathlib.Path = ROOT / "experiments/results/bench_decoder"


def models(o: Options):
    """(torch model, cfg, params): the same random weights, by way of a saved directory."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.LlamaConfig(
        hidden_size=o.width,
        intermediate_size=o.hidden,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads,
        vocab_size=o.vocab,
        max_position_embeddings=4 * o.length,
        initializer_range=0.05,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cfg, params, _ = load.load(folder)
    return model, cfg, params


class Torch:
    """The peer: forward passes with a dynamic cache."""

    def __init__(self, model, ids, new, press=None):
        self.model, self.ids, self.new, self.press = model, torch.tensor(np.asarray(ids)), new, press

    @torch.no_grad()
    def prefill(self):
        cache = transformers.DynamicCache()
        run = functools.partial(self.model, self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if self.press is None:
            out = run()
        else:
            with self.press(self.model):
                out = run()
        return out.logits[:, -1], cache

    @torch.no_grad()
    def decode(self, state):
        logits, cache = state
        out, n = [logits.argmax(-1, keepdim=True)], self.ids.shape[1]
        for i in range(self.new - 1):
            at = torch.full((1, 1), n + i)
            logits = self.model(out[-1], past_key_values=cache, use_cache=True, position_ids=at, cache_position=at[0]).logits[:, -1]
            out.append(logits.argmax(-1, keepdim=True))
        return torch.cat(out, 1)


class Jaxtok:
    """Ours: two compiled programs."""

    def __init__(self, cfg, params, ids, new, recipe=decoder.PLAIN):
        self.params, self.ids = params, jnp.asarray(ids, jnp.int32)

        def prefill(params, ids):
            tokens, layers = decoder.prefill(cfg, params, decoder.embed(cfg, params, ids), recipe, new=new)
            return decoder.logits(cfg, params, tokens.x[:, -1:])[:, 0], tokens._replace(x=tokens.x[:, -1:], pos=tokens.pos[:, -1:]), layers

        def decode(params, tokens, layers):
            return generate(cfg, params, tokens, layers, recipe, new=new, eos=())

        begin = time.perf_counter()
        self._prefill = jax.jit(prefill).lower(params, self.ids).compile()
        _, tokens, layers = jax.eval_shape(prefill, params, self.ids)
        self._decode = jax.jit(decode, donate_argnums=2).lower(params, tokens, layers).compile()
        self.compile_s = time.perf_counter() - begin

    def prefill(self):
        return jax.block_until_ready(self._prefill(self.params, self.ids))

    def decode(self, state):
        return jax.block_until_ready(self._decode(self.params, state[1], state[2]))


def measure(sides, repeats, tick):
    """{name: ([prefill s], [decode s])}, the sides in turn, and the first (logits, ids) of each."""
    times, first = {name: ([], []) for name in sides}, {}
    for i in range(repeats + 1):
        for name, side in sides.items():
            a = time.perf_counter()
            state = side.prefill()
            b = time.perf_counter()
            logits = np.asarray(state[0])
            c = time.perf_counter()
            out = side.decode(state)
            d = time.perf_counter()
            if i == 0:
                first[name] = logits, np.asarray(out.ids if hasattr(out, "ids") else out)
            else:
                times[name][0].append(b - a)
                times[name][1].append(d - c)
            tick()
    return times, first


def main(o: Options) -> None:
    console = Console()
    model, cfg, params = models(o)
    window = SnapKV(capacity=round(o.kept * o.length), window=64, pool=5)
    press = kvpress.SnapKVPress(compression_ratio=1 - o.kept, window_size=64, kernel_size=5)
    rows, checks = [], {}
    with Progress(console=console) as bar:
        job = bar.add_task("measuring", total=len(o.batches) * 4 * (o.repeats + 1))
        for b in o.batches:
            ids = np.random.default_rng(b).integers(0, o.vocab, (b, o.length))
            full = {"jaxtok": Jaxtok(cfg, params, ids, o.new), "torch": Torch(model, ids, o.new)}
            times, first = measure(full, o.repeats, lambda: bar.advance(job))
            checks[f"batch {b} full"] = compare(first)
            for i, what in enumerate(("prefill", "decode")):
                rows.append(row(what, b, {name: t[i] for name, t in times.items()}, full["jaxtok"].compile_s))
            small = {"jaxtok": Jaxtok(cfg, params, ids, o.new, Recipe(cache=window)), "torch": Torch(model, ids, o.new, press)}
            times, first = measure(small, o.repeats, lambda: bar.advance(job))
            checks[f"batch {b} snapkv"] = compare(first)
            both = {name: [x + y for x, y in zip(*t, strict=True)] for name, t in times.items()}
            rows.append(row("snapkv", b, both, small["jaxtok"].compile_s))
    table = Table("what", "batch", "jaxtok s", "torch s", "times as fast", "goal", "compile s")
    for r in rows:
        goal = f"{r['goal']:.1f}" if r["goal"] else ""
        table.add_row(
            r["what"], str(r["batch"]), f"{r['jaxtok_s']:.3f}", f"{r['torch_s']:.3f}", f"{r['ratio']:.2f}", goal, f"{r['compile_s']:.1f}"
        )
    console.print(table)
    console.print(checks)
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers, np)} | {
        "kvpress": kvpress_version(),
        "python": platform.python_version(),
    }
    o.out.mkdir(parents=True, exist_ok=True)
    options = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(o).items() if k != "out"}
    result = {"options": options, "versions": versions, "cpu": cpu(), "cores": os.cpu_count(), "rows": rows, "agreement": checks}
    (o.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")


def compare(first) -> dict[str, float]:
    """Largest logit difference after the prefill and share of equal greedy tokens of the two sides."""
    (a, x), (b, y) = first.values()
    return {"logits": float(np.abs(a - b).max()), "logit range": float(np.ptp(b)), "same tokens": float((x == y).mean())}


def row(what: str, b: int, times: dict[str, list[float]], compile_s: float) -> dict:
    ours, theirs = (statistics.median(times[name]) for name in ("jaxtok", "torch"))
    return {
        "what": what,
        "batch": b,
        "jaxtok_s": ours,
        "torch_s": theirs,
        "ratio": theirs / ours,
        "goal": GOALS.get((what, b)),
        "compile_s": compile_s,
        "all": times,
    }


def kvpress_version() -> str:
    from importlib.metadata import version

    return version("kvpress")


def cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(tyro.cli(Options))
