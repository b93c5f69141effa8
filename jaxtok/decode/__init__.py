"""Generation: loops over the decoder's step, sampling."""

from jaxtok.decode.lookahead import Ahead, prefill_lookahead
from jaxtok.decode.loop import Generated, generate, prefill_chunked, replay
from jaxtok.decode.prefill import prefill
from jaxtok.decode.reread import prefill_reread
from jaxtok.decode.retrieve import retrieve
from jaxtok.decode.sampling import Sampler, filter_logits, sample
from jaxtok.decode.shared import PrefixGroups, prefill_shared, prefix_groups

__all__ = [
    "Ahead",
    "Generated",
    "PrefixGroups",
    "Sampler",
    "filter_logits",
    "generate",
    "prefill",
    "prefill_chunked",
    "prefill_lookahead",
    "prefill_reread",
    "prefill_shared",
    "prefix_groups",
    "replay",
    "retrieve",
    "sample",
]
