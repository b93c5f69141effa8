"""Adds decoding.npz to folders of tests/golden/kvpress/: what kvpress 0.5.5 keeps while generating, and the logits of every step.

    python -m tests.golden.make_kvpress_decoding       (after make_kvpress, in its environment; writes about 25 KB)

A prompt of the case's length, then STEPS forced tokens, under a PrefillDecodingPress: prompt cut to TARGET tokens, again every INTERVAL steps. Fields:
    ids                  i32 [n + STEPS]
    <press>.kept         bool [c l g n + STEPS]: the positions that are left after the prefill and after each cut
    <press>.logits       f32 [STEPS SOME]: the first SOME logits after each forced token
    alone.<press>.*      the same (n = TARGET) for the DecodingPress alone, after the first TARGET tokens of the prompt
Presses for which the order of the slots is nothing: 0.5.5 leaves them by falling score, so that pooling, runs and chunks meet other
neighbours from the second cut on. A file is refused where a cut is closer than GAP to a tie.
"""

import sys
from importlib.metadata import version
from typing import Any

import numpy as np

from tests.golden.make_kvpress import CASES, FOLDER, GAP, KVPRESS, VOCAB, build

TARGET, INTERVAL, STEPS, SOME = 20, 6, 20, 16
CHOSEN = {"llama_gqa_60": 9, "qwen3_gqa_72": 8}  # and the seed of their ids
ALONE = ("k_norm", "snapkv_1")


def presses(removed: float) -> dict[str, Any]:
    import kvpress as kp

    return {
        "k_norm": kp.KnormPress(removed),
        "key_diff": kp.KeyDiffPress(removed),
        "cur_whole": kp.CURPress(removed, num_sinks=0, use_local_approximation=False),
        "snapkv_1": kp.SnapKVPress(removed, window_size=1, kernel_size=1),
    }


def play(model: Any, name: str, ids: np.ndarray, n: int, alone: bool) -> tuple[dict[str, np.ndarray], float]:
    """({kept, logits} of a prompt of n and the rest one by one, the least gap between what is kept and what is not)."""
    import kvpress as kp
    import torch
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    layers, total = len(model.model.layers), len(ids)
    first, later = presses(max(1 - (TARGET + 0.5) / n, 0.0))[name], presses(0.0)[name]
    cuts = kp.DecodingPress(later, compression_interval=INTERVAL, target_size=TARGET)
    press = cuts if alone else kp.PrefillDecodingPress(prefilling_press=first, decoding_press=cuts)
    places: list[Any] = [None] * layers
    found: list[list[np.ndarray]] = [[] for _ in range(layers)]
    gaps: list[float] = []

    def watch(inner: Any) -> None:
        plain, score = inner.compress, getattr(inner, "base_press", inner).score

        def scored(*args: Any, **kwargs: Any) -> Any:
            out = score(*args, **kwargs)
            best = out[0].float().sort(-1, descending=True).values
            if best.shape[-1] > TARGET:
                gaps.append(float((best[:, TARGET - 1] - best[:, TARGET]).min()))
            return out

        def compress(module: Any, hidden: Any, keys: Any, values: Any, *rest: Any) -> Any:
            left = plain(module, hidden, keys, values, *rest)
            i, (g, slots) = module.layer_idx, values.shape[1:3]
            old = np.zeros((g, 0), int) if places[i] is None else places[i]
            start = old.max(initial=-1) + 1 if places[i] is None else seen[i]
            new = np.arange(start, start + slots - old.shape[1])
            place = np.concatenate([old, np.broadcast_to(new, (g, len(new)))], 1)
            seen[i] = start + len(new)
            same = (left[1][0][:, :, None] == values[0][:, None]).all(-1)  # [g left slots]
            assert (same.sum(-1) == 1).all(), "what is left in the cache is not exactly one token"
            places[i] = np.take_along_axis(place, same.float().argmax(-1).numpy(), 1)
            mask = np.zeros((g, total), bool)
            np.put_along_axis(mask, places[i], True, 1)
            found[i].append(mask)
            return left

        inner.compress = compress
        getattr(inner, "base_press", inner).score = scored

    seen = [0] * layers
    for inner in (cuts,) if alone else (first, cuts):
        watch(inner)
    if alone:
        g = model.config.num_key_value_heads
        for i in range(layers):
            places[i], seen[i] = np.broadcast_to(np.arange(n), (g, n)), n
            found[i].append(np.broadcast_to(np.arange(total) < n, (g, total)))
    cache, logits = DynamicCache(), []
    with torch.no_grad(), press(model):
        model.model(input_ids=torch.from_numpy(ids[:n])[None].long(), past_key_values=cache)
        for t in range(n, total):
            where = torch.tensor([[t]])
            out = model(input_ids=torch.tensor([[int(ids[t])]]), past_key_values=cache, position_ids=where)
            logits.append(out.logits[0, -1, :SOME].float().numpy())
    return {"kept": np.stack([np.stack(x) for x in found], 1), "logits": np.stack(logits)}, min(gaps)


def record(model: Any, n: int, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """The fields of decoding.npz for a model and a prompt of n, and the least gap."""
    ids = np.random.default_rng(seed).permutation(VOCAB)[: n + STEPS].astype(np.int32)
    made = " ".join(f"{x}=={version(x)}" for x in ("kvpress", "transformers", "torch"))
    out, least = {"made_with": np.array(made), "ids": ids}, np.inf
    for name in presses(0.5):
        for alone in (False, True)[: 1 + (name in ALONE)]:
            fields, gap = play(model, name, ids[: TARGET + STEPS] if alone else ids, TARGET if alone else n, alone)
            out |= {f"{'alone.' * alone}{name}.{key}": x for key, x in fields.items()}
            least = min(least, gap)
    return out, least


def main() -> None:
    if version("kvpress") != KVPRESS:
        raise SystemExit(f"the golden files are those of kvpress {KVPRESS}, this is {version('kvpress')}")
    for name, seed in CHOSEN.items():
        fields, least = record(build(CASES[name]), CASES[name].length, seed)
        if not least > GAP:
            raise SystemExit(f"{name} is cut {least:.1e} from a tie, GAP is {GAP}")
        np.savez_compressed(FOLDER / name / "decoding.npz", **fields)  # type: ignore[arg-type]
        print(f"{name:14} least gap {least:.1e}, {(FOLDER / name / 'decoding.npz').stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
