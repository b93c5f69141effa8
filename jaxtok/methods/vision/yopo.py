"""YOPO: no image row is dropped, but little is computed for it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jaxtok.core import check
from jaxtok.core.edit import LayerEdit, Spared
from jaxtok.core.registry import register


def load_heads(path: str | pathlib.Path) -> Bool[np.ndarray, "l h"]:
    """Which heads keep what they take from image rows: a published file (headmask_*.npy), one bool for each layer and query head."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"cannot read the heads {path}: {e}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or not found.size or not np.isin(found, (0, 1)).all():
        raise ValueError(f"{path} must hold 0 or 1 for each layer and query head, [l h]; has {getattr(found, 'shape', None)}")
    return found.astype(bool)


def save_heads(path: str | pathlib.Path, heads: Bool[np.ndarray, "l h"]) -> None:
    """The file that `load_heads` and the official code read."""
    with open(path, "wb") as file:
        np.save(file, np.asarray(heads, bool))


@register(
    "yopo",
    site="edits",
    paper="arXiv:2410.06169",
    title="Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
    authors="Zeliang Zhang and Phu Pham and Wentian Zhao and Kun Wan and Yu-Jhe Li and Jianing Zhou and Daniel Miranda and Ajinkya Kale and Chenliang Xu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class YOPO(LayerEdit):
    """Image rows look at near ones, through some heads, half of the MLP, in the first layers only.

        (1) window: image row i sees image row j where |row_i - row_j|, |col_i - col_j| <= floor((window - 1) / 2)  (an even one acts as
            window - 1), both of one picture; text rows see and are seen as always
        (2) heads [l h], 0 or 1: softmax weights on image keys times heads, for all queries, NOT renormalised; and what image rows take from a
            head (from text keys too) times heads
        (3) layercut: from this 0-based layer on nobody sees image keys
        (4) mlpcut: image rows go through the first floor(hidden / mlpcut) channels of the MLP

    variant="paper": the window is causal too, and from `layercut` on the image rows leave the sequence with their keys: the softmax is over
    the text (our reading of dropping visual computation in late layers; a prompt must end in text). variant="official": the window takes the
    place of the causal mask, so an image row sees later ones inside it; from `layercut` on the weights on image keys are 0 after a softmax that
    still counts them, and image rows run on.

    heads are `params["methods"]["edits"][0]["heads"]` (all 1 from `init_params` and without it); `load_heads` reads published ones,
    `train.yopo` finds them. images: image rows that enter, at most; they need `Tokens.cell` (one without a cell, -1, sees itself alone of the
    image rows). Positions stay. The paper's values: window 5, layercut 20 of 40 layers, mlpcut 2.

    What is saved: the MLP's channels of image rows; image rows, their keys and caches from `layercut` on (paper); image to image attention,
    where the window is a list of keys at most a quarter of `images` long, else it is a mask. What is a mask: heads (their image keys stay
    in the softmax), `layercut` of variant="official". Decoding reads the image keys, apart, under the same heads. The official code saves nothing.

    window=None, layercut=None, mlpcut=1 and all heads: the plain model; with one picture, so is a window over its grid in variant="paper"
    (several never see each other, our reading).
    """

    images: int
    window: int | None = 5
    layercut: int | None = 20
    mlpcut: int = 2
    variant: str = "paper"

    def __post_init__(self):
        check.count("images", self.images)
        if self.window is not None:
            check.count("window", self.window, 1, 2**15)
        if self.layercut is not None:
            check.count("layercut", self.layercut, 0)
        check.count("mlpcut", self.mlpcut)
        check.one_of("variant", self.variant, ("paper", "official"))

    @property
    def until(self) -> int | None:  # type: ignore[override]
        return self.layercut if self.variant == "paper" else None

    def init_params(self, key: jax.Array, cfg) -> dict[str, jax.Array]:
        return {"heads": jnp.ones((cfg.layers, cfg.heads), bool)}

    def validate(self, recipe, cfg) -> None:
        super().validate(recipe, cfg)
        if cfg.hidden < self.mlpcut:
            raise ValueError(f"mlpcut={self.mlpcut} leaves none of the MLP's {cfg.hidden} channels")
        if self.window is not None and cfg.window is not None:
            raise ValueError(f"{self.name} has a window of its own and the model one of {cfg.window} tokens; use window=None")

    def layer(self, params, i: int, cfg) -> Spared:
        cut = self.variant == "official" and self.layercut is not None and i >= self.layercut
        heads = None
        if "heads" in params:
            if params["heads"].shape != (cfg.layers, cfg.heads):
                raise ValueError(f"heads are {list(params['heads'].shape)}; the model has {cfg.layers} layers of {cfg.heads} heads")
            heads = jnp.asarray(params["heads"])[i].astype(jnp.float32)
        return Spared(
            reach=None if self.window is None else (self.window - 1) // 2,
            causal=self.variant == "paper",
            channels=None if self.mlpcut == 1 else cfg.hidden // self.mlpcut,
            read=jnp.zeros((cfg.heads,), jnp.float32) if cut else heads,
            write=heads,
        )
