"""Adds wrapped.npz to folders of tests/golden/kvpress/: what the wrappers of kvpress 0.5.5 keep of the same prompts.

    python -m tests.golden.make_kvpress_wrapped       (after make_kvpress, in its environment; writes about 60 KB)

    chunk_key_diff.kept, chunk_k_norm.kept   bool [r l g n]  ChunkPress in pieces of PIECE
    composed.kept                            bool [l g n]    ComposedPress: key norms, then KeyDiff on what they leave
    thinned.kept, thinned.channels           bool [l g n], [l g d]  ComposedPress: SnapKV, then ThinK on what it leaves
    per_layer.kept                           bool [l g n]    PerLayerCompressionPress around SnapKV
    turned.kept, turned.keys                 bool [l g n], f32 [l g m d]  KeyRerotationPress around SnapKV; by order
    cam.ids                                  i32 [TARGET + STEPS]: a prompt of TARGET tokens and STEPS forced ones
    cam.kept, cam.values, cam.logits         bool [STEPS l g TARGET + STEPS], f32 [l g TARGET d] at the end, f32 [STEPS SOME]
                                             CAMPress around TOVA at every step, with the chance of each toss in the place of its outcome
The singles are at FIRST and SECOND removed (the former of a chain, or of layer 0). A file is refused where a cut is closer than GAP to a tie.
"""

import sys
from importlib.metadata import version
from typing import Any

import numpy as np

from tests.golden.make_kvpress import CASES, FOLDER, GAP, KVPRESS, RATIOS, VOCAB, WINDOW, build, prompt
from tests.golden.make_kvpress_more import press_once

PIECE, FIRST, SECOND, MERGE = 20, 0.25, 0.5, 4
TARGET, STEPS, SOME = 16, 12, 16
CHOSEN = {"llama_gqa_60": 4, "qwen3_gqa_72": 5}  # and the seed of the ids of CAMPress


def singles() -> dict[str, Any]:
    import kvpress as kp

    snap = lambda removed: kp.SnapKVPress(removed, window_size=WINDOW)
    return {
        "composed": kp.ComposedPress([kp.KnormPress(FIRST), kp.KeyDiffPress(SECOND)]),
        "thinned": kp.ComposedPress([snap(FIRST), kp.ThinKPress(SECOND, window_size=WINDOW)]),
        "per_layer": kp.PerLayerCompressionPress(snap(0.5), [FIRST, SECOND]),
        "turned": kp.KeyRerotationPress(snap(SECOND)),
    }


def cam(model: Any, ids: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """(fields of CAMPress, the least gap between what stays and what goes)."""
    import kvpress as kp
    import torch
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    layers, g = len(model.model.layers), model.config.num_key_value_heads
    press = kp.CAMPress(kp.TOVAPress(), compression_interval=1, target_size=TARGET, merge_budget=MERGE)
    place = [np.broadcast_to(np.arange(TARGET), (g, TARGET)) for _ in range(layers)]
    plain, score, gaps = press.compress, press.base_press.score, []

    def scored(*args: Any, **kwargs: Any) -> Any:
        out = score(*args, **kwargs)
        best = out[0].float().mean(0).sort(descending=True).values
        gaps.append(float(best[TARGET - 1] - best[TARGET]))
        return out

    def compress(module: Any, hidden: Any, keys: Any, values: Any, *rest: Any) -> Any:
        before = keys.clone()
        left = plain(module, hidden, keys, values, *rest)
        i = module.layer_idx
        new = np.full((g, 1), TARGET + step)
        same = (left[0][0][:, :, None] == before[0][:, None]).all(-1)
        assert (same.sum(-1) == 1).all(), "what is left in the cache is not exactly one token"
        place[i] = np.take_along_axis(np.concatenate([place[i], new], 1), same.float().argmax(-1).numpy(), 1)
        return left

    press.compress, press.base_press.score, toss = compress, scored, torch.bernoulli
    torch.bernoulli = lambda p: p
    cache, logits, kept = DynamicCache(), [], []
    try:
        with torch.no_grad(), press(model):
            model.model(input_ids=torch.from_numpy(ids[:TARGET])[None].long(), past_key_values=cache)
            for step in range(STEPS):
                at = torch.tensor([[TARGET + step]])
                out = model(input_ids=torch.tensor([[int(ids[TARGET + step])]]), past_key_values=cache, position_ids=at)
                logits.append(out.logits[0, -1, :SOME].float().numpy())
                kept.append([[np.isin(np.arange(len(ids)), head) for head in heads] for heads in place])
    finally:
        torch.bernoulli = toss
    values = [np.take_along_axis(cache.layers[i].values[0].numpy(), np.argsort(place[i], -1)[..., None], 1) for i in range(layers)]
    return {"cam.ids": ids, "cam.kept": np.array(kept), "cam.values": np.stack(values), "cam.logits": np.stack(logits)}, min(gaps)


def record(model: Any, ids: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The fields of wrapped.npz for a model and a prompt."""
    import kvpress as kp

    out = {"made_with": np.array(" ".join(f"{x}=={version(x)}" for x in ("kvpress", "transformers", "torch")))}
    inner = {"chunk_key_diff": kp.KeyDiffPress, "chunk_k_norm": kp.KnormPress}
    for name, make in inner.items():
        runs = [press_once(model, kp.ChunkPress(make(removed), PIECE), ids) for removed in RATIOS]
        out[f"{name}.kept"] = np.stack([run["kept"] for run in runs])
    for name, press in singles().items():
        run = press_once(model, press, ids)
        out[f"{name}.kept"] = run["kept"]
        if name == "turned":
            out["turned.keys"] = np.stack(run["keys"])
        if name == "thinned":
            out["thinned.channels"] = np.stack([(keys != 0).any(1) for keys in run["keys"]])
    fields, least = cam(model, np.random.default_rng(seed).permutation(VOCAB)[: TARGET + STEPS].astype(np.int32))
    if not least > GAP:
        raise SystemExit(f"CAMPress cuts {least:.1e} from a tie, GAP is {GAP}; take another seed")
    return out | fields


def main() -> None:
    if version("kvpress") != KVPRESS:
        raise SystemExit(f"the golden files are those of kvpress {KVPRESS}, this is {version('kvpress')}")
    for name, seed in CHOSEN.items():
        fields = record(build(CASES[name]), prompt(CASES[name]), seed)
        np.savez_compressed(FOLDER / name / "wrapped.npz", **fields)  # type: ignore[arg-type]
        print(f"{name:14} {(FOLDER / name / 'wrapped.npz').stat().st_size} bytes, {len(fields)} fields", file=sys.stderr)


if __name__ == "__main__":
    main()
