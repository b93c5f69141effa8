"""Site edits: what a decoder spares the rows of pictures without dropping them. The model (`models.edits`) owns the rest."""

from typing import NamedTuple

import jax

from jaxtok.core.protocols import Method


class Spared(NamedTuple):
    """What image rows are spared in one layer; the default is the plain layer.

    Image rows are those of images, crops and frames; everything else is text here, newlines too.
    """

    reach: int | None = None  # image rows see those of their picture whose cell is at most so many rows and columns away; None = all
    causal: bool = True  # and of these none that stands later
    channels: int | None = None  # image rows go through the first channels of the MLP; None = through all
    read: jax.Array | None = None  # f32 [h] factor of what each head takes from image rows, after the softmax; None = 1
    write: jax.Array | None = None  # f32 [h] factor of what image rows take from each head; None = 1


class LayerEdit(Method):
    """Site edits: image rows stay, but less is computed for them.

    images: image rows that enter the decoder, at most (static). It decides the shapes: of n rows at most `images` are image rows and
    n - images text; rows beyond either, the oldest, are dropped before the first layer and counted in `lost`.
    """

    images: int
    until: int | None = None  # before this layer image rows leave the sequence: no layer behind sees them, no cache there holds them

    def layer(self, params, i: int, cfg) -> Spared:
        """What 0-based layer `i` of a decoder of configuration `cfg` spares, for i < until."""
        raise NotImplementedError(f"{type(self).__name__} must say what it spares")

    def validate(self, recipe, cfg) -> None:
        """ValueError where the edit cannot work in `recipe` on a model of configuration `cfg`."""
        if len(recipe.edits) > 1:
            raise ValueError(f"one edit at a time: {', '.join(m.name for m in recipe.edits)}")
        beside = [site for site in ("layers", "cache", "policy", "reader", "heads") if getattr(recipe, site)]
        if beside:
            raise ValueError(
                f"{self.name} keeps the keys of image rows apart from those of the text; use it without {' and '.join(beside)} "
                "(prompt, vit and select go with it)"
            )
