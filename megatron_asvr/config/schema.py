"""Every setting of a run, as frozen dataclasses; the field comments are the reference manual.

Sizes are never hard-coded elsewhere: what a checkpoint, an encoder or a tokenizer brings is read
from these classes. ``load.py`` fills them (preset < YAML < ``a.b=c``), ``check.py`` refuses what
cannot work.
"""

from dataclasses import dataclass, field
from typing import Literal

PARTS = ("vision_encoder", "projector", "language_model", "visual_head")
Part = Literal["vision_encoder", "projector", "language_model", "visual_head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScalingConfig:
    """Rotary frequencies for more positions than the model was first trained on.

    The keys are those of a Hugging Face ``config.json`` (``rope_scaling``, ``rope_parameters``).
    """

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"  # default: no scaling
    factor: float = 1.0  # frequencies are divided by it; llama3 and yarn: the low ones only
    original_max_position_embeddings: int | None = None  # positions trained on; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3: turns below which a frequency counts as low
    high_freq_factor: float = 4.0  # llama3: turns above which it is kept
    beta_fast: float = 32.0  # yarn: turns above which a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which it counts as low
    attention_factor: float | None = None  # yarn, queries and keys; default: 0.1 ln factor + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """The language model, in Hugging Face's terms."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"] = "llama"
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None  # default: num_heads
    head_dim: int | None = None  # default: hidden_size / num_heads
    ffn_hidden_size: int = 11008
    vocab_size: int = 32000
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    sliding_window: int | None = None  # positions a token sees, itself included
    init_std: float = 0.02
    num_experts: int | None = None  # of every layer; families mixtral and qwen3_moe only
    experts_per_token: int = 2
    expert_ffn_hidden_size: int | None = None  # default: ffn_hidden_size
    norm_topk_prob: bool = True  # a token's expert weights sum to 1 (mixtral: always)
    router_aux_loss_coef: float = 0.0  # load balancing; above 0 every step counts tokens first

    @property
    def kv_heads(self) -> int:
        """Key/value heads (grouped-query attention)."""
        return self.num_kv_heads or self.num_heads

    @property
    def width_per_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections have a bias (Qwen2 only)."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head (Qwen3 and Qwen3-MoE)."""
        return self.family in ("qwen3", "qwen3_moe")

    @property
    def is_mixture(self) -> bool:
        """Whether every layer's feed-forward part is a mixture of experts."""
        return self.family in ("mixtral", "qwen3_moe")

    @property
    def expert_ffn(self) -> int:
        """Inner width of one expert."""
        return self.expert_ffn_hidden_size or self.ffn_hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """A SigLIP / SigLIP2 vision encoder."""

    hidden_size: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    ffn_hidden_size: int = 4304
    image_size: int = 384  # pixels, square
    patch_size: int = 14  # pixels, square
    norm_eps: float = 1e-6
    feature_layer: int = -2  # index into HF hidden_states; -2: last layer but one
    init_std: float = 0.02

    @property
    def grid(self) -> int:
        """Patches along one side (the border that does not fill a patch is dropped)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid**2

    @property
    def num_feature_layers(self) -> int:
        """Transformer layers that must run to produce the selected feature."""
        index = self.feature_layer
        return index if index >= 0 else self.num_layers + 1 + index


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """From encoder features to the language model's width."""

    kind: Literal["mlp2x_gelu"] = "mlp2x_gelu"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionConfig:
    """How much of an image the encoder sees; see docs/images.md.

    ``single``: the whole image at the encoder's own size. ``anyres``: that, and the tiles of the
    grid that fits the image best, each an image of its own for the encoder and the tokenizer.
    ``s2``: the whole image at several scales, whose features are joined; as many positions as
    ``single``.
    """

    mode: Literal["single", "anyres", "s2"] = "single"  # what the encoder gets of an image
    grids: tuple[tuple[int, ...], ...] = (
        (1, 2),
        (2, 1),
        (2, 2),
        (1, 3),
        (3, 1),
    )  # anyres: rows and columns of tiles, to choose from
    newline: bool = False  # anyres: a learned vector after every row of the grid's patches
    unpad: bool = False  # anyres: leave out rows and columns of patches that show padding only
    scales: tuple[int, ...] = (1, 2, 3)  # s2: sides of the image in sides of the encoder

    @property
    def num_scales(self) -> int:
        """Features that are joined for one patch."""
        return len(self.scales) if self.mode == "s2" else 1

    @property
    def num_crops(self) -> int:
        """Encoder images of one view: all scales together, cut to the encoder's size."""
        return sum(scale**2 for scale in self.scales) if self.mode == "s2" else 1

    @property
    def most_views(self) -> int:
        """Views of one picture, at most; each has positions of its own in the sequence."""
        if self.mode == "anyres":
            return 1 + max(rows * columns for rows, columns in self.grids)
        return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualHeadConfig:
    """The autoregressive head that predicts an image position's codes, depth by depth."""

    width: int = 2048
    num_layers: int = 3
    num_heads: int | None = None  # default: width / 128, at least 1
    norm_eps: float = 1e-6
    init_std: float = 0.02

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.num_heads or max(1, self.width // 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The whole model."""

    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)
    visual_head: VisualHeadConfig = field(default_factory=VisualHeadConfig)
    text_tokenizer: str | None = None  # SentencePiece model, tokenizer.json, or a folder of one
    visual_tokenizer: str | None = None  # folder written by `asvr tokenizer fit`


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Where each part's weights come from; a part without a source is initialised from the seed.

    A source is a Hugging Face folder, a folder written by `asvr convert import`, an `asvr` run
    folder or one of its checkpoints.
    """

    all: str | None = None  # default source of every part
    vision_encoder: str | None = None
    projector: str | None = None
    language_model: str | None = None
    visual_head: str | None = None
    allow_missing: tuple[
        str, ...
    ] = ()  # weights a source may lack (`visual_head.*`): from the seed

    def source(self, part: str) -> str | None:
        """Folder that ``part`` starts from, or None."""
        return getattr(self, part) or self.all


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The joint objective: L = L_text + visual_weight * L_visual."""

    mode: Literal["exact", "official"] = "exact"
    visual_weight: float = 1.0  # 0 is the text-only baseline: head and codes are not built
    target_shift: Literal[0, 1] = 0  # 0: a position predicts its own patch; 1: the next one
    visual_positions: float = 1.0  # share of an image's positions that train the visual loss


TEMPLATES = ("vicuna_v1", "vicuna_short", "plain", "mistral", "llama3", "chatml")
SourceFormat = Literal["json", "jsonl", "webdataset", "parquet", "images"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of samples: files, a folder of images, or a URL that fsspec knows."""

    path: str  # a file, a folder of images without captions, or `shard-{000..127}.tar`, `*.parquet`
    images: str | None = None  # folder of a JSON file's images; default: the file's own
    format: SourceFormat | None = None  # default: what the path's ending says
    name: str | None = None  # in reports; default: the path
    weight: float | None = None  # share of an epoch's samples, relative to the others'; all or none
    epochs: float = 1.0  # times that an epoch of the blend takes the source (without weights)
    max_samples: int | None = None  # at most so many in an epoch of the blend


BadSample = Literal["replace", "drop", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes of training images; off by default. They need ``data.codes=online``."""

    flip: float = 0.0  # probability of mirroring; text and "left of" are then wrong
    min_crop: float = 1.0  # smallest share of the area that a random crop keeps
    colour: float = 0.0  # brightness, contrast and saturation change by at most this share

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self != AugmentConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is trained and evaluated on, and how samples become tokens."""

    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()
    template: str = "vicuna_v1"  # a known one, `tokenizer` (its folder's), or a .jinja file
    max_length: int = 2048  # positions of one sample, image patches included
    on_overlong: Literal["drop", "cut_text"] = "cut_text"  # counted; no image is ever cut
    packing: bool = False  # several samples in one sequence; micro_batch then counts sequences
    pack_length: int | None = None  # positions of a packed sequence; default: max_length
    image_fit: Literal["square", "pad"] = "square"  # resize, or pad with the mean colour first
    blank_images: bool = False  # every image becomes the mean colour (the blind control)
    on_bad_sample: BadSample = "replace"  # by a placeholder without loss; drop: from the order
    max_bad_share: float = 0.1  # of a split's records; more bad ones stop the run
    pil_kinds: tuple[str, ...] = ()  # kinds of images that PIL decodes, not DALI: `jpeg_cmyk`
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    parity_max_flip: tuple[float, ...] = ()  # share of codes DALI may flip, of all depths or each
    on_parity: Literal["refuse", "pil"] = "refuse"  # pil: PIL decodes kinds beyond parity_max_flip
    max_image_pixels: int = 50_000_000  # larger images are refused from their header
    codes: Literal["cache", "online"] = "cache"  # the tokenizer's codes: from disk, or every step
    features: Literal["online", "cache"] = "online"  # a frozen encoder's: every step, or from disk
    cache_dir: str | None = None  # default: <run.dir>/../codes
    encode_missing: bool = True  # what a cache lacks: computed before training, or an error
    codes_verify_fraction: float = 0.001  # of a step's images: what is cached is computed again
    codes_max_flip: tuple[float, ...] = (0.02,)  # share that may differ: of all depths, or of each
    decode_threads: int = 1
    prefetch_batches: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with warm-up and a cosine."""

    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_fraction: float = 0.03  # of all steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0  # global norm, 0 turns clipping off
    distributed: bool = True  # shard optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = False  # sum gradients while the backward pass goes on


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """When a run ends itself, to be started again, and what it warns of; see docs/watchdogs.md."""

    hang_s: float = 300.0  # longest step, but never less than 10 usual ones; 0: no limit
    slow_share: float = 0.2  # ranks that need so much more time than the usual are named; 0: none


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyConfig:
    """What becomes of a step whose numbers cannot be right; see docs/watchdogs.md.

    ``skip``: its samples are left out. ``rollback``: all samples since the last checkpoint are, and
    the run goes on from there.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # loss or gradient norm
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"  # of the loss
    spike_window: int = 100  # steps whose losses a spike is compared with
    spike_mads: float = 20.0  # deviations from their median (1.48 median absolute ones each)
    max_events: int = 10  # steps of the whole run that may be acted on; one more stops it


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training stage."""

    trainable: tuple[Part, ...] = ("projector", "visual_head", "language_model")
    steps: int | None = None  # give steps or epochs, not both
    epochs: float | None = None
    global_batch: int = 256  # samples of one optimizer step
    micro_batch: int = 1  # samples of one forward pass on one data-parallel rank
    precision: Literal["fp32", "bf16"] = "bf16"
    optim: OptimConfig = field(default_factory=OptimConfig)
    recompute: Literal["none", "selective", "full"] = "none"  # of the language model's layers
    recompute_visual_head: bool = False
    compile: bool = False  # torch.compile layers of encoder and visual head; no effect on the CPU
    cuda_graphs: bool = False  # record a frozen encoder as CUDA graphs; no effect on the CPU
    deterministic: bool = False  # the same bits from every start, also on GPUs; slower there
    threads_per_rank: int = 1  # CPU threads; part of a run's identity (it changes rounding)
    eval_every_steps: int = 0  # 0: only at the end, when data.eval is given
    save_every_steps: int = 500
    keep_checkpoints: int = 2  # the newest ones
    keep_every_steps: int = 0  # also keep every checkpoint of a multiple of it; 0 is none
    async_save: bool = False  # write copies of weights and optimizer while the run goes on
    log_every_steps: int = 10
    cosine_every_steps: int = 0  # gradient cosine of the two losses; 0 is never
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Config:
    """Matrix products in 8 bits; see docs/fp8.md."""

    recipe: Literal["none", "delayed", "current", "block", "mxfp8"] = "none"  # how to scale
    format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: gradients in E5M2, all else in E4M3
    emulate: bool = False  # round to 8 bits here and multiply in full; slow, needs no GPU
    exclude: tuple[
        str, ...
    ] = ()  # modules in train.precision: `language_model.decoder.layers.-1.*`, `*.heads.*`
    weights: bool = False  # keep weights of the language model's layers in 8 bits, and gather so
    margin: int = 0  # delayed: the largest value is put 2**margin below the format's largest
    history: int = 1024  # delayed: steps (Transformer Engine: uses) whose largest values count
    amax: Literal["max", "most_recent"] = "max"  # delayed: which of the history decides
    guard_every_steps: int = 0  # compare 8 bits with train.precision every so often; 0 is never
    guard_min_cosine: float = 0.95  # a module whose results agree less goes to train.precision


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Which implementation computes the layers, and in how many bits they multiply."""

    backend: Literal["auto", "te", "local"] = "auto"  # te: Transformer Engine, on CUDA only
    kernels: bool = True  # C++ kernels on the CPU where a compiler is found; false: torch's own
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Model-parallel degrees; the data-parallel degree is what remains of the world size."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None  # model chunks of each pipeline stage; default: one
    stages: tuple[int, ...] | None = None  # layers of each stage or chunk; default: even cost
    head_alone: bool | None = None  # visual head alone in the last stage; default: where cheaper
    cp: int = 1
    sp: bool = False
    ep: int = 1  # ranks that share the experts of a mixture, among the tp x cp x dp of a stage


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str = "runs/default"
    seed: int = 0
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "megatron_asvr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run: everything `asvr train` needs."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
