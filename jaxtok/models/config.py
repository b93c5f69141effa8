"""The one decoder configuration: everything that distinguishes the supported families is a field."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary scaling. `kind` is "linear" (ids / factor) or "llama3" (frequency-dependent interpolation)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not supported; supported: linear, llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder-only transformer: Llama 2/3, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 (text), Phi3.

    Shape letters: c = width, h = heads, g = kv_heads, d = head_dim, f = hidden (MLP), l = layers.
    Hashable, so it is a static argument of every model function.
    """

    family: str = "llama"  # Hugging Face model_type, for saving
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int = 2048  # longest sequence it was trained for; not enforced
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # 1.0: weights are stored as w - 1 (Gemma)
    act: str = "silu"  # or "gelu_tanh"
    rope_theta: float = 10000.0
    rope_theta_local: float | None = None  # for the layers in `local` (Gemma3)
    rope_scaling: RopeScaling | None = None  # never applied to local layers
    rotary_dim: int | None = None  # rotated channels of a head; None = all
    window: int | None = None  # a query sees keys with q_pos - k_pos < window, in `local` layers
    local: tuple[bool, ...] = ()  # which layers are local; () = none
    softcap: float | None = None  # of attention logits
    logit_softcap: float | None = None  # of output logits
    qk_norm: bool = False
    qkv_bias: bool = False
    sandwich: bool = False  # norms after attention and MLP too (Gemma2, Gemma3)
    scale: float | None = None  # of q.k; None = head_dim ** -0.5
    embed_scale: float = 1.0  # Gemma: sqrt(width), rounded to the activations' dtype
    tied: bool = False  # output head = embedding
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.local and len(self.local) != self.layers:
            raise ValueError(f"local has {len(self.local)} entries for {self.layers} layers; give one a layer, or ()")
        if any(self.local) and not self.window:
            raise ValueError("local layers need window")
        if self.act not in ("silu", "gelu_tanh"):
            raise ValueError(f"act={self.act!r}; supported: silu, gelu_tanh")

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of 0-based `layer`, None for a global one."""
        return self.window if self.local and self.local[layer] else None

    def layer_theta(self, layer: int) -> float:
        """The rotary base of 0-based `layer`."""
        local = bool(self.local) and self.local[layer]
        return self.rope_theta_local if local and self.rope_theta_local is not None else self.rope_theta
