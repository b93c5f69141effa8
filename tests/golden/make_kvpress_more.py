"""Adds more.npz to the folders of tests/golden/kvpress/: what the other presses of kvpress 0.5.5 keep of the same prompts.

    python -m tests.golden.make_kvpress_more       (after make_kvpress, in its environment; writes about 0.2 MB)

Fields as in case.npz: <press>.kept bool [r l g n] and, for scorers, <press>.score f32 [r l g n]. Besides
    finch_turned.keys    f32 [l g m d]  the keys that are left at the middle ratio, turned to compact positions, by order
    merging.values       f32 [l g m d]  the values that are left at the middle ratio, by order
    think.channels       bool [r l g d] the channels that are left
    kvzip...kept         with the prompts REPEAT, GO_ON and SUFFIX in place of a tokenizer's
No case is refused for a near tie: the test leaves out cuts that are nearer than GAP.
"""

import logging
import sys
from importlib.metadata import version
from typing import Any

import numpy as np

from tests.golden.make_kvpress import CASES, FOLDER, KVPRESS, RATIOS, WINDOW, build, prompt

CHUNK, LAG, PIECE = 6, 16, 32  # ChunkKV's chunk, LagKV's partition, KVzip's
HALVES = {96: 48}  # FINCH's chunks, where they divide the prompt evenly
REPEAT, GO_ON, SUFFIX = (3, 5, 7, 9, 11), (3, 5, 8, 13, 21, 34), (2, 4)  # token ids


class Tokenizer:
    """Stands in for the tokenizer that KVzip takes its prompts from."""

    chat_template = None

    def encode(self, text: str, **_: Any) -> Any:
        import torch

        ids = {"": (), "\n": SUFFIX, "\n\nRepeat the previous context exactly.": REPEAT}.get(text, GO_ON)
        return torch.tensor([ids], dtype=torch.long)


def presses(removed: float, n: int) -> dict[str, Any]:
    import kvpress as kp

    snap = lambda: kp.SnapKVPress(removed, window_size=WINDOW)
    flat = lambda: kp.ExpectedAttentionPress(removed, use_vnorm=False)

    def finch(rerotate: bool = False, normalize: bool = True, chunk: int | None = None) -> Any:
        press = kp.FinchPress(removed, chunk_length=chunk, rerotate_keys=rerotate, normalize_scores=normalize)
        press.delimiter_token_id, press.window_size = -1, WINDOW
        return press

    out = {
        "chunkkv_snapkv": kp.ChunkKVPress(snap()),
        "chunkkv_knorm": kp.ChunkKVPress(kp.KnormPress(removed), CHUNK),
        "criticalkv_snapkv": kp.CriticalKVPress(snap()),
        "criticalkv_expected": kp.CriticalKVPress(flat(), first_stage_ratio=0.25),
        "criticalada_snapkv": kp.CriticalAdaKVPress(snap()),
        "lagkv": kp.LagKVPress(removed, lag_size=LAG),
        "lagkv_cross": kp.LagKVPress(removed, lag_size=LAG, cross_scoring=True),
        "cur": kp.CURPress(removed),
        "cur_mean": kp.CURPress(removed, leverage_type="kv_avg", local_window_size=5, num_sinks=2),
        "cur_value": kp.CURPress(removed, leverage_type="value", use_local_approximation=False),
        "finch": finch(),
        "finch_plain": finch(normalize=False),
        "finch_turned": finch(rerotate=True),
        "merging": kp.MergingPress(snap()),
        "merging_half": kp.MergingPress(kp.KnormPress(removed), similarity_threshold=0.1, merge_fraction=0.5),
        "think": kp.ThinKPress(removed, window_size=WINDOW),
        "kvzip": kp.KVzipPress(removed),
        "kvzip_layer": kp.KVzipPress(removed, layerwise=True, chunk_size=PIECE),
        "kvzip_pieces": kp.KVzipPress(removed, chunk_size=PIECE),
        "kvzip_plus": kp.KVzipPress(removed, kvzip_plus_normalization=True, chunk_size=PIECE),
    }
    if n in HALVES:
        out["finch_chunk"] = finch(chunk=HALVES[n])
    return out


def press_once(model: Any, press: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """{kept bool [l g n], score f32 [l g n] where the press scores, keys and values by order (lists of [g m d])} of one prefill."""
    import torch
    from kvpress.presses import kvzip_press
    from transformers import DynamicCache

    kvzip_press.AutoTokenizer = type("Stub", (), {"from_pretrained": staticmethod(lambda *_: Tokenizer())})
    model.set_attn_implementation("sdpa")
    batch, n, layers = torch.from_numpy(ids)[None].long(), len(ids), [x.self_attn for x in model.model.layers]
    scores: list[np.ndarray] = []
    inner = press if hasattr(press, "score") else getattr(press, "press", press)
    if hasattr(inner, "score"):
        plain = inner.score

        def score(*args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            scores.append(out[0].clone().float().numpy())
            return out

        inner.score = score
    if hasattr(press, "score_val"):
        plain_post = press.compress_post

        def post(model: Any) -> Any:
            plain_post(model)
            scores.extend(press.score_val[:, 0].clone().float().numpy())

        press.compress_post = post
    whole, cache = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model.model(input_ids=batch, past_key_values=whole)
        hooks = super(type(press), press).__call__ if type(press).__name__ == "FinchPress" else press
        with hooks(model):
            model.model(input_ids=batch, past_key_values=cache)
    out: dict[str, Any] = {"kept": [], "keys": [], "values": []}
    for i, attn in enumerate(layers):
        keys, values, old = cache.layers[i].keys[0], cache.layers[i].values[0], whole.layers[i]
        same = (values[:, :, None] == old.values[0][:, None]).all(-1) | (keys[:, :, None] == old.keys[0][:, None]).all(-1)
        if type(press).__name__ == "ThinKPress":
            mask = (keys != 0).any(1).numpy()  # [g d]
        else:
            assert (same.sum(-1) == 1).all(), "what is left in the cache is not exactly one token"
            mask = same.any(1).numpy()
            order = same.float().argmax(-1).argsort(-1)[..., None].expand_as(keys)
            out["keys"].append(keys.gather(1, order).numpy())
            out["values"].append(values.gather(1, order).numpy())
        hidden = getattr(attn, "masked_key_indices", None)
        if hidden is not None:
            _, head, at = hidden
            mask[head.numpy(), at.numpy()] = False
            attn.masked_key_indices = None
        out["kept"].append(mask)
    out["kept"] = np.stack(out["kept"])
    if scores and scores[0].shape[-1] == n:
        out["score"] = np.stack(scores)
    return out


def record(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of more.npz for one prompt."""
    made = np.array(" ".join(f"{x}=={version(x)}" for x in ("kvpress", "transformers", "torch")))
    out: dict[str, np.ndarray] = {"made_with": made}
    for name in presses(0.5, len(ids)):
        runs = [press_once(model, presses(removed, len(ids))[name], ids) for removed in RATIOS]
        if name == "think":
            out["think.channels"] = np.stack([run["kept"] for run in runs])
            continue
        out[f"{name}.kept"] = np.stack([run["kept"] for run in runs])
        if all("score" in run for run in runs):
            out[f"{name}.score"] = np.stack([run["score"] for run in runs])
        for kind, presses_ in {"keys": ("finch_turned",), "values": ("merging", "merging_half")}.items():
            if name in presses_:
                out[f"{name}.{kind}"] = np.stack(runs[1][kind])
    return out


def main() -> None:
    if version("kvpress") != KVPRESS:
        raise SystemExit(f"the golden files are those of kvpress {KVPRESS}, this is {version('kvpress')}")
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    for name, case in CASES.items():
        fields = record(build(case), prompt(case))
        np.savez_compressed(FOLDER / name / "more.npz", **fields)  # type: ignore[arg-type]
        print(f"{name:14} {(FOLDER / name / 'more.npz').stat().st_size} bytes, {len(fields)} fields", file=sys.stderr)


if __name__ == "__main__":
    main()
