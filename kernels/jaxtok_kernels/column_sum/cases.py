"""Problems for the column_sum kernels, by name: those of flash, whose logsumexp they take, without the values."""

from jaxtok_kernels.flash.cases import GPU, LARGE, Case

CASES = {
    "causal, a ragged tail, GQA 4": Case(h=4, g=1, diagonal=0),
    "scattered positions a head, soft-cap, biases": Case(b=2, h=4, packed=False, heads=True, dead=0.2, softcap=3.0, biased=True),
    "a window of queries, a sliding window": Case(t=8, s=72, diagonal=64, window=40),
    "segments, full, GQA 8": Case(h=8, g=1, t=48, s=48, segments=3, causal=False, dead=0.2),
    "bf16": Case(dtype="bfloat16", h=4, biased=True, softcap=5.0, d=64, diagonal=0),
    "one query, one block": Case(t=1, s=17, h=8, block_q=None, block_k=None),
    "one key": Case(t=5, s=1, packed=False, block_q=None, block_k=None, biased=True),
    "nothing live": Case(dead=1.0, biased=True, t=17, s=33),
}
__all__ = ["CASES", "GPU", "LARGE", "Case"]
