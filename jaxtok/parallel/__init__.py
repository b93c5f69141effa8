"""Sequence parallelism: contexts that outgrow one chip, by attention over shards of a sequence."""

from jaxtok.parallel.layout import Layout
from jaxtok.parallel.ring import ring_attention
from jaxtok.parallel.scheme import Spread, make_mesh
from jaxtok.parallel.token_ring import token_ring_attention
from jaxtok.parallel.ulysses import gathered_attention, ulysses_attention

__all__ = ["Layout", "Spread", "gathered_attention", "make_mesh", "ring_attention", "token_ring_attention", "ulysses_attention"]
