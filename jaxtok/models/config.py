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
    mrope: tuple[int, ...] = ()  # frequencies that follow a row's first, second, third rotary id (time, row, column); () = there is one id
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
        pairs = (self.head_dim if self.rotary_dim is None else self.rotary_dim) // 2
        if self.mrope and (len(self.mrope) != 3 or min(self.mrope) < 0 or sum(self.mrope) != pairs):
            raise ValueError(f"mrope={self.mrope} must share out the {pairs} frequencies of a head among three rotary axes")

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The rotary axis that each frequency follows; None = there is one axis."""
        return tuple(axis for axis, n in enumerate(self.mrope) for _ in range(n)) or None

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of 0-based `layer`, None for a global one."""
        return self.window if self.local and self.local[layer] else None

    def layer_theta(self, layer: int) -> float:
        """The rotary base of 0-based `layer`."""
        local = bool(self.local) and self.local[layer]
        return self.rope_theta_local if local and self.rope_theta_local is not None else self.rope_theta


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A bidirectional transformer over patches or tokens: ViT, DeiT, CLIP (both towers), SigLIP, DINOv2, audio spectrogram transformers.

    Shape letters: c = width, h = heads (each c / h wide), f = hidden (MLP), l = layers. Hashable, so a static argument.
    """

    family: str = "vit"  # Hugging Face model_type
    width: int
    layers: int
    heads: int
    hidden: int
    inner: int | None = None  # channels of all heads together; None = width
    image: tuple[int, int] | None = (224, 224)  # height, width that the positions were learned for; None = a text tower, or `rope_theta`
    patch: tuple[int, int] = (16, 16)  # what an image leaves over at the right and the bottom is not seen
    antialias: bool = False  # of positions resampled to another size (DINOv2 with registers)
    channels: int = 3
    vocab: int | None = None  # of a text tower
    context: int = 77  # of a text tower: positions there are
    causal: bool = False  # CLIP's text tower
    cls: bool = True  # a class token, first
    distilled: bool = False  # a distillation token after it (DeiT)
    registers: int = 0  # register tokens after these, without positions (DINOv2)
    act: str = "gelu"  # gelu (erf), gelu_tanh, quick_gelu, relu, silu
    gated: bool = False  # down(act(gate(y)) * up(y)) (DINOv2 giant)
    norm_eps: float = 1e-6
    stem_norm: bool = False  # a norm between embedding and first layer (CLIP)
    post: bool = False  # norms after the residual sums, not before the blocks
    final_norm: bool = True
    layer_scale: bool = False  # DINOv2
    qkv_bias: bool = True
    patch_bias: bool = True
    pool: str = "cls"  # what the head reads: cls, cls_dist (two heads, averaged), cls_mean (side by side), mean, map, eos (last live row)
    norm_mean: bool = False  # the final norm acts on the mean of the rows, not on the rows
    out: int | None = None  # classes, or channels of a projection; None = no head
    out_bias: bool = True
    bos: int | None = None
    eos: int | None = None  # where rows of ids end (CLIP); None = with the last live one, -1 = with the largest id (CLIP before 2023)
    # towers of any picture size (Qwen2.5-VL)
    rms: bool = False  # norms divide by the root mean square and have no bias
    rope_theta: float | None = None  # no learned positions: half of a head's frequencies follow a patch's row, half its column
    window: int | None = None  # patches a side of the windows that a layer attends within, unless it is one of `whole`
    whole: tuple[int, ...] = ()  # 0-based layers
    frames: int = 1  # pictures in a patch (a still one stands in all of them)
    merge: int = 1  # what is behind the tower joins merge x merge patches to a row

    def __post_init__(self):
        if (self.inner or self.width) % self.heads:
            raise ValueError(f"width={self.width}, inner={self.inner}: what all heads share must be a multiple of heads={self.heads}")
        if self.rope_theta is not None and (self.image is not None or self.vocab is not None or self.prefix or self.head_dim % 4):
            raise ValueError(
                f"rope_theta={self.rope_theta}: a tower of any picture size has image=None, vocab=None, cls=False and head_dim={self.head_dim} a multiple of 4"
            )
        if self.window is not None and (self.rope_theta is None or self.window < 1 or self.window % self.merge):
            raise ValueError(f"window={self.window} needs rope_theta and must be a multiple of merge={self.merge}")
        if self.rope_theta is None and (self.image is None) == (self.vocab is None):
            raise ValueError(f"an encoder has an image size or a vocabulary, got image={self.image}, vocab={self.vocab}")
        if self.image is not None and (self.image[0] < self.patch[0] or self.image[1] < self.patch[1] or min(self.patch) < 1):
            raise ValueError(f"image={self.image} must have room for a patch of {self.patch}")
        if self.act not in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
            raise ValueError(f"act={self.act!r}; supported: gelu, gelu_tanh, quick_gelu, relu, silu")
        if self.pool not in ("cls", "cls_dist", "cls_mean", "mean", "map", "eos"):
            raise ValueError(f"pool={self.pool!r}; supported: cls, cls_dist, cls_mean, mean, map, eos")

    @property
    def head_dim(self) -> int:
        return (self.inner or self.width) // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the size the positions were learned for."""
        if self.image is None:
            raise ValueError("a text tower has no grid of patches")
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def prefix(self) -> int:
        """Rows before the patches."""
        return self.cls + self.distilled + self.registers
