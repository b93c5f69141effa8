"""Sequence parallelism: contexts that outgrow one chip, by attention over shards of a sequence."""

from jaxtok.parallel.launch import initialize, leader
from jaxtok.parallel.layout import Layout
from jaxtok.parallel.ring import ring_attention
from jaxtok.parallel.scheme import Spread, make_mesh
from jaxtok.parallel.sharding import by_path, shardings
from jaxtok.parallel.token_ring import token_ring_attention
from jaxtok.parallel.ulysses import gathered_attention, ulysses_attention

__all__ = [
    "Layout",
    "Spread",
    "by_path",
    "gathered_attention",
    "initialize",
    "leader",
    "make_mesh",
    "ring_attention",
    "shardings",
    "token_ring_attention",
    "ulysses_attention",
]
