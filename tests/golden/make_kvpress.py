"""Makes tests/golden/kvpress/: which tokens kvpress 0.5.5 keeps of random prompts in tiny random decoders.

    python -m tests.golden.make_kvpress            (from the checkout; writes about 0.3 MB)

Needs an environment of its own, since kvpress wants transformers < 5.3: Python 3.11, `pip install torch==2.13.0`, then
`pip install kvpress==0.5.5`; with `pip install -e '.[test]'` on top, tests/methods/test_kvpress.py runs its live test there.

Each folder: config.json and model.safetensors (bfloat16) of the model, run in float32, and case.npz: made_with (versions),
ids i32 [n], ratios f64 [r] (fractions removed), and for each press of `presses`
    <press>.kept   bool [r l g n]: the positions that are left, read off the keys in kvpress's cache (AdaKV: off its mask)
    <press>.score  f32  [r l g n]: what the press's own score function returned (AdaKV: its base's)
Prompts are not padded and alone in their batch, which is what kvpress handles. A case is refused where the cut is closer than GAP to a
tie: float32 rounding could then decide.
"""

import pathlib
import sys
import tempfile
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "kvpress"
RATIOS = (0.25, 0.5, 0.8)
GAP = 1e-5
WINDOW, SAFE = 8, {"ada_snapkv": 0.2, "ada_expected": 0.2, "ada_k_norm": 0.05}  # AdaKV's alpha
KVPRESS = "0.5.5"
VOCAB = 128
SIZE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
HEADS = {"mha": (4, 4), "gqa": (4, 2)}


class Case(NamedTuple):
    family: str
    heads: str
    seed: int
    length: int
    also: tuple[str, ...] = ()  # presses that this case alone has


ONLY_SOME = ("pyramidkv_window_1",)
CASES = {
    "llama_gqa_96": Case("Llama", "gqa", 70, 96),
    "llama_gqa_60": Case("Llama", "gqa", 253, 60, also=ONLY_SOME),
    "llama_gqa_60_b": Case("Llama", "gqa", 239, 60),
    "llama_mha_50": Case("Llama", "mha", 863, 50),
    "qwen3_gqa_72": Case("Qwen3", "gqa", 697, 72),
}


def presses(removed: float) -> dict[str, Any]:
    """The presses at a compression ratio."""
    import kvpress as kp

    return {
        "snapkv": kp.SnapKVPress(removed, window_size=WINDOW),
        "tova": kp.TOVAPress(removed),
        "key_diff": kp.KeyDiffPress(removed),
        "k_norm": kp.KnormPress(removed),
        "expected_attention": kp.ExpectedAttentionPress(removed),
        "expected_mean": kp.ExpectedAttentionPress(removed, n_future_positions=16, n_sink=2, use_covariance=False, use_vnorm=False),
        "streaming_llm": kp.StreamingLLMPress(removed),
        "ada_snapkv": kp.AdaKVPress(kp.SnapKVPress(removed, window_size=WINDOW), SAFE["ada_snapkv"]),
        "ada_expected": kp.AdaKVPress(kp.ExpectedAttentionPress(removed, epsilon=0.02), SAFE["ada_expected"]),
        "ada_k_norm": kp.AdaKVPress(kp.KnormPress(removed), SAFE["ada_k_norm"]),
        "random": kp.RandomPress(removed, seed=11),
        "observed_attention": kp.ObservedAttentionPress(removed),
        "pyramidkv": kp.PyramidKVPress(removed, window_size=WINDOW),
        "pyramidkv_window_1": kp.PyramidKVPress(removed, window_size=1),
    }


def build(case: Case) -> Any:
    """A random transformers model, float32, whose scores lie far apart.

    Rows of the embedding share a direction, so that queries agree on what they look for; attention is soft; the KV heads' keys differ in
    length (for AdaKV). Parameters are bfloat16 numbers, norms too.
    """
    import torch
    import transformers

    h, g = HEADS[case.heads]
    config = getattr(transformers, case.family + "Config")(**SIZE, num_attention_heads=h, num_key_value_heads=g)
    model = getattr(transformers, case.family + "ForCausalLM")._from_config(config).float().eval()
    noise = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=noise)
            if p.ndim == 1:
                x = 1 + 0.3 * x
            elif "embed" in name:
                x = x + torch.randn(p.shape[1], generator=noise)
            else:
                x = x * p.shape[1] ** -0.5 * (0.7 if "q_proj" in name else 1.5)
            if "k_proj" in name:
                x = (x.view(g, -1) * torch.linspace(1.4, 0.7, g)[:, None]).view(p.shape)
            p.copy_(x.bfloat16().float())
    return model


def prompt(case: Case) -> np.ndarray:
    """ids i32 [n], no token twice: the same token has the same key norm in the first layer."""
    return np.random.default_rng(case.seed).permutation(VOCAB)[: case.length].astype(np.int32)


def press_once(model: Any, press: Any, ids: np.ndarray, eager: bool) -> tuple[np.ndarray, np.ndarray]:
    """(kept bool [l g n], score f32 [l g n]) of one prefill under a press."""
    import torch
    from transformers import DynamicCache

    model.set_attn_implementation("eager" if eager else "sdpa")
    batch, n, layers = torch.from_numpy(ids)[None].long(), len(ids), [x.self_attn for x in model.model.layers]
    scorer, scores = getattr(press, "press", press), []
    plain = scorer.score

    def score(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        scores.append(out[0].clone().float().numpy())
        return out

    whole, cache = DynamicCache(), DynamicCache()
    scorer.score = score
    with torch.no_grad():
        model.model(batch, past_key_values=whole)
        with press(model):
            model.model(batch, past_key_values=cache)
    kept = []
    for i, attn in enumerate(layers):
        left, keys = cache.layers[i].keys[0], whole.layers[i].keys[0]
        here = (left[:, :, None] == keys[:, None]).all(-1)  # [g m n]: gathered keys are the very numbers
        assert (here.sum(-1) == 1).all(), "a key in the compressed cache is not that of exactly one token"
        mask = here.any(1).numpy()
        if scorer is not press:  # AdaKV leaves the cache whole and names what attention must not see
            assert mask.all() and left.shape[1] == n
            _, head, at = attn.masked_key_indices
            mask[head.numpy(), at.numpy()] = False
            attn.masked_key_indices = None
        kept.append(mask)
    return np.stack(kept), np.stack(scores)


def gap(name: str, kept: np.ndarray, score: np.ndarray) -> float:
    """The distance of the lowest kept from the highest dropped score, the least over layers and heads ([l g n])."""
    low = np.where(kept, score, np.inf)
    high = np.where(kept, -np.inf, score).max(-1)  # [l g]
    least = (low.min(-1) - high).min()
    if name in SAFE:  # jointly over the heads, but for each head's safe ones
        count = kept.sum((1, 2)) // kept.shape[1]
        for i, c in enumerate(count):
            free = np.sort(low[i], -1)[:, ::-1]  # +inf (dropped) first, then from the best kept on
            safe = max(1, int(c * SAFE[name]))
            extra = [row[np.isfinite(row)][safe:] for row in free]
            least = min(least, np.concatenate(extra).min(initial=np.inf) - high[i].max())
    return float(least)


def record(model: Any, ids: np.ndarray, also: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The fields of case.npz for one prompt, of the presses that every case has and of those in `also`."""
    out: dict[str, np.ndarray] = {
        "made_with": np.array(" ".join(f"{x}=={version(x)}" for x in ("kvpress", "transformers", "torch"))),
        "ids": ids,
        "ratios": np.array(RATIOS),
    }
    for name in [x for x in presses(0.5) if x not in ONLY_SOME or x in also]:
        runs = [press_once(model, presses(removed)[name], ids, eager=name == "observed_attention") for removed in RATIOS]
        out[f"{name}.kept"], out[f"{name}.score"] = (np.stack(x) for x in zip(*runs, strict=True))
    return out


def gaps(case: Any) -> dict[str, float]:
    """The least distance from a tie of each press."""
    names = [key.removesuffix(".kept") for key in case if key.endswith(".kept")]
    return {x: min(gap(x, *pair) for pair in zip(case[f"{x}.kept"], case[f"{x}.score"], strict=True)) for x in names}


def save(folder: pathlib.Path, model: Any, fields: dict[str, np.ndarray]) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        model.to(torch.bfloat16).save_pretrained(tmp)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes(pathlib.Path(tmp, file).read_bytes())
    np.savez_compressed(folder / "case.npz", **fields)


def main() -> None:
    if version("kvpress") != KVPRESS:
        raise SystemExit(f"the golden files are those of kvpress {KVPRESS}, this is {version('kvpress')}")
    for name, case in CASES.items():
        model, ids = build(case), prompt(case)
        fields = record(model, ids, case.also)
        least = gaps(fields)
        worst = min(least, key=least.__getitem__)
        if not least[worst] > GAP:
            raise SystemExit(f"{name}: {worst} is cut {least[worst]:.1e} from a tie, GAP is {GAP}; take another seed")
        save(FOLDER / name, model, fields)
        size = sum(p.stat().st_size for p in (FOLDER / name).iterdir())
        print(f"{name:14} least gap {least[worst]:.1e} ({worst}), {size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
