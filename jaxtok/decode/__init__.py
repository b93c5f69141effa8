"""Generation: loops over the decoder's step, sampling."""

from jaxtok.decode.loop import Generated, generate, prefill_chunked, replay
from jaxtok.decode.sampling import Sampler, filter_logits, sample

__all__ = ["Generated", "Sampler", "filter_logits", "generate", "prefill_chunked", "replay", "sample"]
