"""Adds duo.npz to two folders of tests/golden/kvpress/: kvpress 0.5.5's DuoAttention of the same prompts, with its scores on the fly.

    python -m tests.golden.make_duo       (after make_kvpress, in its environment; writes about 10 kB)

Fields: made_with; texts i32 [t n] (token ids, -1 behind the end) and length i64 [], which stand in for its book samples and its 500
positions; scores f32 [l g]; kept bool [r l g n] of the prompt in case.npz with those scores, SINKS + RECENT tokens in the streaming heads
and RATIOS of the heads streaming.
"""

import sys
from importlib.metadata import version
from typing import Any

import numpy as np

from tests.golden.make_kvpress import CASES, FOLDER, KVPRESS, RATIOS, VOCAB, build, prompt

SINKS, RECENT, LENGTH, TEXTS = 6, 17, 40, (33, 24, 45)
NAMES = ("llama_gqa_96", "qwen3_gqa_72")


def texts(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, n).astype(np.int32) for n in TEXTS]


def record(model: Any, ids: np.ndarray, samples: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The fields of duo.npz for one prompt."""
    import pandas
    import torch
    from kvpress.presses import duo_attention_press as module
    from transformers import BatchEncoding

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> Any:
            return BatchEncoding({"input_ids": torch.from_numpy(samples[int(text)])[None].long()})

    class Books:
        def to_pandas(self) -> Any:
            return pandas.DataFrame({"chapter": [str(i) for i in range(len(samples))]})

    module.load_dataset = lambda *_, **__: Books()
    module.AutoTokenizer = type("Stub", (), {"from_pretrained": staticmethod(lambda *_: Tokenizer())})
    module.cache.clear()
    model.set_attn_implementation("sdpa")
    scores = module.duo_attention_on_the_fly(model, num_samples=len(samples), q_len=LENGTH)
    module.duo_attention_on_the_fly = lambda model, plain=module.duo_attention_on_the_fly: scores
    kept = []
    for removed in RATIOS:
        press = module.DuoAttentionPress(head_compression_ratio=removed, on_the_fly_scoring=True)
        press.post_init_from_model(model)
        press.sink_size, press.recent_size = SINKS, RECENT
        press.post_init_from_model = lambda model: None
        layers = [x.self_attn for x in model.model.layers]
        with torch.no_grad(), press(model):
            model.model(torch.from_numpy(ids)[None].long())
        mask = np.ones((len(layers), layers[0].k_proj.out_features // layers[0].head_dim, len(ids)), bool)
        for i, attn in enumerate(layers):
            _, head, at = attn.masked_key_indices
            mask[i, head.numpy(), at.numpy()] = False
            attn.masked_key_indices = None
        kept.append(mask)
    padded = np.full((len(samples), max(TEXTS)), -1, np.int32)
    for row, sample in zip(padded, samples, strict=True):
        row[: len(sample)] = sample
    made = np.array(" ".join(f"{x}=={version(x)}" for x in ("kvpress", "transformers", "torch")))
    return {"made_with": made, "texts": padded, "length": np.array(LENGTH), "scores": scores, "kept": np.stack(kept)}


def main() -> None:
    if version("kvpress") != KVPRESS:
        raise SystemExit(f"the golden files are those of kvpress {KVPRESS}, this is {version('kvpress')}")
    from kvpress.presses import duo_attention_press as module

    plain = module.duo_attention_on_the_fly
    for name in NAMES:
        case, module.duo_attention_on_the_fly = CASES[name], plain
        fields = record(build(case), prompt(case), texts(case.seed))
        least = np.diff(np.sort(fields["scores"].ravel())).min()
        if not least > 1e-4:
            raise SystemExit(f"{name}: two heads' scores are {least:.1e} apart; take another seed")
        np.savez_compressed(FOLDER / name / "duo.npz", **fields)  # type: ignore[arg-type]
        print(f"{name:14} {(FOLDER / name / 'duo.npz').stat().st_size} bytes, scores {fields['scores'].ravel()}", file=sys.stderr)


if __name__ == "__main__":
    main()
