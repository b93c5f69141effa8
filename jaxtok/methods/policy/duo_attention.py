"""DuoAttention: learned gates split the heads. Source: arXiv:2410.10819; mit-han-lab/duo-attention (utils.py, patch/); kvpress."""

import dataclasses
import math
import pathlib
from fractions import Fraction
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float

from jaxtok.core import check, heads
from jaxtok.core.registry import register


def load_gates(path: str | pathlib.Path) -> Float[np.ndarray, "l g"]:
    """Gates of a published file (full_attention_heads.tsv: a line a layer, numbers apart by tabs), clipped to 0 to 1."""
    try:
        found = np.loadtxt(path, delimiter="\t", ndmin=2)
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise ValueError(f"cannot read the gates {path}: {e}") from None
    if not found.size or not np.isfinite(found).all():
        raise ValueError(f"{path} must hold one finite gate for each layer and KV head, has {list(found.shape)}")
    return np.clip(found, 0.0, 1.0)


def save_gates(path: str | pathlib.Path, gates: Float[np.ndarray, "l g"]) -> None:
    """The file that `load_gates` and the official code read."""
    np.savetxt(path, np.asarray(gates), delimiter="\t")


def full_heads(
    gates: Float[np.ndarray, "l g"], *, sparsity: float | int | None = None, threshold: float | int | None = None
) -> Bool[np.ndarray, "l g"]:
    """The heads that keep everything: gates of at least `threshold`, or of at least the `sparsity` quantile of all gates.

    sparsity 0 = all heads full, 1 = none; between, of N heads N - ceil((N - 1) sparsity) are full, as many as reach the quantile when no two
    gates are equal. Ties go to the lower layer, then head; the official code breaks them by noise up to 1e-6, which is also in what it
    compares with a threshold (add it to `gates` for its very heads). kvpress instead streams round(N sparsity) heads.
    """
    gates = np.asarray(gates, np.float64)
    if (sparsity is None) == (threshold is None):
        raise ValueError(f"give sparsity or threshold, exactly one; got sparsity={sparsity}, threshold={threshold}")
    if threshold is not None:
        check.real("threshold", threshold)
        return gates >= float(threshold)
    check.between("sparsity", sparsity, 0, 1)  # type: ignore[arg-type]
    count = 0 if sparsity == 1 else gates.size - math.ceil((gates.size - 1) * Fraction(str(sparsity)))
    return heads.best(gates, count)


@register(
    "duo_attention",
    site="policy",
    paper="arXiv:2410.10819",
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    authors=("Guangxuan Xiao and Jiaming Tang and Jingwei Zuo and Junxian Guo and Shang Yang and Haotian Tang and Yao Fu and Song Han"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoAttention(heads.Streaming):
    """Heads with a large gate keep everything; the others the first `sinks` tokens and the newest `capacity - sinks`.

        trained:    out = gate * full attention + (1 - gate) * attention to sinks and recent tokens,   gate in [0, 1] for each KV head
        deployed:   gate >= threshold: the whole cache; else sinks + recent (64 + 256 here, 128 + 256 in training)

    With `Recipe.heads`: group 0 are the full heads, made contiguous by `models.blocks.reorder_heads`; `load_gates` reads published gates,
    `train.duo_attention` learns them (`learn`) or guesses them from mean queries and keys (`proxy`, kvpress), `full_heads` and
    `core.heads.split` say which and in what order.

    All gates 1: full attention. All 0: StreamingLLM at the positions of the text (compact=False). Tokens keep their positions. As in the
    official code the first prefill attends to everything; a step, or a further token of a prefill read step by step, attends to sinks, recent
    and itself. A continued `prefill` attends to all its rows before anything goes.
    """

    most: ClassVar[float] = 1.0
    capacity: int = 320
    sinks: int = 64

    def __post_init__(self):
        check.count("sinks", self.sinks, 0)
        check.budget("capacity", self.capacity, self.sinks + 1)
