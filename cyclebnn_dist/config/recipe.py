"""The recipe: every setting of a run, as frozen dataclasses whose field docstrings are the reference.

Standard library only: a login node reads recipes without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal[
    "none",
    "bnn",
    "xnor",
    "bireal",
    "bireal_released",
    "irnet",
    "irnet_released",
    "reactnet",
    "reactnet_released",
    "recu",
    "adabin",
    "adabin_released",
    "bnext",
    "cyclebnn",
    "cyclebnn_released",
]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it is repeated, logged and saved."""

    dir: str = "runs/default"
    """Folder of the run: resolved recipe, checkpoints, metrics, logs. Starting again in the same folder resumes."""
    seed: int = 0
    """Seed of weights, data order, augmentation and quantized communication."""
    deterministic: bool = False
    """Use deterministic kernels only; a resumed run then equals the undisturbed one bit for bit."""
    log_every: int = 10
    """Steps between two progress lines and two rows of metrics.jsonl."""
    health_every: int = 100
    """Steps between two rows about the binary layers: sign flips, saturated inputs, latent magnitude; 0 means never."""
    save_every: int = 500
    """Steps between two checkpoints, written while training goes on; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest complete checkpoints stay on disk (at least 1)."""
    keep_every: int = 0
    """Steps between two checkpoints that are written in any case and stay on disk for good; 0 means none."""
    keep_best: bool = True
    """Write a checkpoint at an evaluation better than all before, and keep the best one beside the newest."""
    extend_epochs: bool = False
    """Allow a resumed run more train.epochs than it began with, although that changes every schedule."""
    collective_timeout_seconds: float = 1800.0
    """A collective operation that takes longer than this ends the run."""
    progress_timeout_seconds: float = 2400.0
    """A rank that finishes no step, evaluation batch or checkpoint for this long ends, with its stacks in its log; 0: never."""


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, before layers are swapped."""

    name: str = "resnet18"
    """Name of a timm model, e.g. resnet18, mobilenetv3_small_100, vit_tiny_patch16_224, or of one drawn for binary layers:
    bnext_t, bnext_s, bnext_m, bnext_l, bnext_18, reactnet_a, reactnet_18."""
    num_classes: int = 1000
    """Number of classes; must equal the number of class folders in the training data."""
    pretrained: bool = False
    """Start from timm's published real-valued weights (from the hub's local cache or the network)."""
    weights: str = ""
    """Start from this file instead: a .safetensors state dict, or a checkpoint folder of this project."""
    small_stem: bool = False
    """Begin a ResNet, BNext or ReActNet with a 3x3 convolution of stride 1 and no pooling, as papers do at 32 pixels."""
    channels_last: bool = False
    """Keep images and convolution weights in channels_last memory layout."""
    compile: bool = False
    """Compile the model with torch.compile."""
    sync_bn: bool = False
    """Share batch-normalization statistics between ranks (GPU only)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of timm.create_model, e.g. drop_path_rate: 0.05."""


@dataclass(frozen=True)
class BinaryConfig:
    """Which layers become binary, and by which published method."""

    method: Method = "cyclebnn"
    """Binarization method; none leaves the model real-valued; *_released is what the authors' code does instead."""
    methods: dict[str, Method] = field(default_factory=dict)
    """Methods of some layers by glob of their names, e.g. {layer4.*: bireal}; the first match counts, none is real."""
    activation: Literal["keep", "hardtanh", "prelu", "rprelu", "maxout", "identity"] = "hardtanh"
    """What replaces ReLU-like activations, behind which every sign is +1; rprelu is ReActNet's, maxout AdaBin's."""
    shortcut: Literal["block", "convolution"] = "block"
    """block: the model's own shortcuts; convolution: one around each of a ResNet block's two instead (Bi-Real Net)."""
    stem_pool: Literal["keep", "average", "none"] = "keep"
    """What to do with the max-pool behind a ResNet's stem: keep it, average instead, or leave it out."""
    recompute: bool = False
    """Compute products of binary layers, normalizations and activations once more in the backward pass instead of
    keeping what they give: half the activation memory or less in ResNets, for a quarter to a half more time."""
    keep_stem: bool = True
    """Leave the first convolution real-valued."""
    keep_deep_stem: bool = False
    """Leave all layers of the stem real-valued, where it has several; needs keep_stem."""
    keep_classifier: bool = True
    """Leave the classifier real-valued."""
    keep_downsample: bool = True
    """Leave 1x1 convolutions on shortcuts real-valued."""
    keep_depthwise: bool = True
    """Leave depthwise convolutions real-valued."""
    keep_squeeze_excite: bool = True
    """Leave squeeze-and-excitation and other gating layers real-valued."""
    edge_bits: Literal[8, 32] = 32
    """Bits of weights and inputs of stem, classifier and gates where these are real: 8 rounds both, in training and in
    evaluation, as BNext's published operations assume; 32 does not."""
    include: tuple[str, ...] = ("*",)
    """Glob patterns of qualified layer names that may be swapped."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of qualified layer names that stay real-valued."""
    pattern: str = ""
    """JSON file that says which layers are binary and which stay real, as `cyclebnn search mixbin` writes it. It is read
    when a recipe is loaded, and what it says goes into layers."""
    layers: dict[str, Literal["real", "binary"]] = field(default_factory=dict)
    """What becomes of layers of these full names: usually what pattern said; the rules above decide about others."""


@dataclass(frozen=True)
class DataConfig:
    """Images in folders, WebDataset shards or CIFAR's files, read through NVIDIA DALI."""

    path: str = "sample_data"
    """Folder with train/<class>/* and val/<class>/*, or train/*.tar and val/*.tar, or CIFAR's binary files."""
    format: Literal["auto", "folder", "webdataset", "cifar10", "cifar100"] = "auto"
    """How images lie there; auto: as found."""
    shuffle_shards: int = 0
    """Shards whose images are shuffled together, so that only these are read at a time; 0: all images together."""
    image_size: int = 224
    """Side of the square network input, in pixels."""
    threads: int = 2
    """DALI decoding threads per rank."""
    prefetch: int = 2
    """Batches DALI prepares ahead, per rank."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random resized crop, as a fraction of the image."""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect ratio of the random resized crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    augment: Literal["none", "randaugment", "randaugment_timm", "trivialaugment", "autoaugment"] = "none"
    """Further augmentation, from DALI's own library; randaugment_timm chooses among timm's operations ("inc1"), which
    invert and solarize too; autoaugment is the policy for ImageNet."""
    randaugment_num_ops: int = 2
    """Operations RandAugment applies to an image."""
    randaugment_magnitude: int = 9
    """Strength of RandAugment's operations, 0 to 30; timm's goes to 10, so its m7 is 21 here."""
    randaugment_std: float = 0.0
    """Standard deviation of that strength, drawn for each operation; timm's mstd0.5 is 1.5 here."""
    randaugment_prob: float = 1.0
    """Probability that each of RandAugment's operations is done at all; timm's default is 0.5."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Ranges of brightness, contrast, saturation and hue, as torchvision's ColorJitter has them; 0 means off.
    timm's default 0.4 is [0.4, 0.4, 0.4, 0]. Beside augment both are done, this one last."""
    erasing: float = 0.0
    """Probability that a rectangle of 0.02 to 1/3 of the image's area is erased (random erasing, as timm's)."""
    erasing_mode: Literal["const", "pixel"] = "const"
    """What an erased rectangle becomes: the mean colour, or normal noise at every pixel."""
    mixup: float = 0.0
    """Mixup, alpha of its Beta distribution; 0 means off. Batches of a rank must then be even."""
    cutmix: float = 0.0
    """CutMix, alpha of its Beta distribution; 0 means off. Beside mixup each batch gets one of the two."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, where both are on."""
    skip_list: str = ""
    """File of images to leave out, one <split>/<class>/<file> a line, or <split>/<shard>/<key>, # for comments;
    cyclebnn data check --out writes one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the images given to the model; bf16 and fp16 need the same train.amp, and spare it a conversion."""
    crop_pct: float = 0.875
    """Evaluation: side of the centre crop as a fraction of the resized shorter side (timm's crop_pct)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of every resize."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation images in [0, 1] are divided by."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and arithmetic of training."""

    epochs: float = 90.0
    """Passes over the training set; may be fractional. Steps per epoch = images // global_batch_size."""
    global_batch_size: int = 256
    """Images per optimizer step over all ranks: ranks x accumulation x per-rank batch must give it exactly."""
    accumulation: int = 1
    """Forward and backward passes per optimizer step; may follow the number of ranks when a run is resumed."""
    amp: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass (torch.autocast); fp16 with loss scaling, on GPUs only."""
    clip_norm: float = 0.0
    """Clip the global gradient norm to this value; 0 means off."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, 0 to 1."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated too; 0 means off."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row with a non-finite gradient."""


@dataclass(frozen=True)
class LossConfig:
    """Terms of the loss beside the cross-entropy."""

    kurtosis_weight: float = 0.0
    """Weight of BD-BNN's penalty on the kurtosis of latent binary weights; 0 means off, 1 is the authors' value."""
    kurtosis_target: float = 1.8
    """Kurtosis the penalty drives the weights to: 1.8 is that of a uniform distribution, 1 of two points."""


@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation: learning what teachers say about the images, beside or instead of the labels."""

    teacher: str = ""
    """timm model that teaches over the whole run, e.g. efficientnet_b2.ra_in1k; empty: no distillation."""
    assistants: tuple[str, ...] = ()
    """timm models that teach beside it, one after the other, each for an equal part of the run (BNext)."""
    weights: dict[str, str] = field(default_factory=dict)
    """Weights of some teachers by name: a .safetensors file, or a checkpoint folder of this project, which also tells how
    the model is built; of those not named here the published ones, from the hub's cache or the network."""
    label_loss: float = 0.0
    """Weight of the cross-entropy with the labels beside the teachers' loss, whose weight is 1; BNext has none."""
    temperature: float = 1.0
    """What logits of teachers and model are divided by; the loss is then multiplied by its square."""
    weighting: Literal["per_sample", "released", "equal"] = "per_sample"
    """Of several teachers. per_sample: more to the one an image agrees less with (BNext); released: as its code does,
    with means over a rank's images of one pass (another number of ranks or train.accumulation then trains otherwise), and
    one half for a single teacher; equal: alike."""
    amp: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the teachers' forward passes (torch.autocast)."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["sgd", "adam", "adamw", "lamb"] = "adamw"
    """Optimizer, as timm names it."""
    lr: float = 1e-3
    """Peak learning rate, for the whole global batch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's momentum in SGD, as in IR-Net's settings; false for plain momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay rates of Adam, AdamW and LAMB."""
    weight_decay: float = 1e-5
    """Weight decay of real-valued weights."""
    binary_weight_decay: float = 1e-5
    """Weight decay of the latent weights of binary layers."""
    other_weight_decay: float = 0.0
    """Weight decay of the rest: norms, biases, scales, thresholds, position embeddings."""
    weight_decay_of: dict[str, float] = field(default_factory=dict)
    """Weight decay of some parameters by glob of their names, e.g. {conv1.*: 1e-8}; the first match counts."""
    binary_lr_scale: float = 1.0
    """Learning rate of latent binary weights, as a multiple of lr."""
    other_lr_scale: float = 1.0
    """Learning rate of the rest, as a multiple of lr."""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_lr: float | None = None
    """Learning rate that the warm-up starts at; null: one step's share of lr."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine or linear schedule."""
    milestones: tuple[float, ...] = (30.0, 60.0, 80.0)
    """Epochs at which the step schedule multiplies the learning rate by gamma."""
    gamma: float = 0.1
    """Factor of the step schedule."""


@dataclass(frozen=True)
class FirstPhaseConfig:
    """A first phase of training with binary inputs and real weights (ReActNet's step 1), in the same run."""

    epochs: float = 0.0
    """Epochs, of train.epochs, in which binary layers multiply signs with their real latent weights; 0: no such phase.
    The learning rate's schedule, warm-up included, runs once in each phase; widths and the averaged weights just go on."""
    lr: float | None = None
    """Peak learning rate of the first phase; null: optim.lr."""
    weight_decay: float | None = None
    """Weight decay of real-valued weights in the first phase; null: optim.weight_decay."""
    binary_weight_decay: float | None = None
    """Weight decay of the latent weights of binary layers in the first phase; null: optim.binary_weight_decay."""
    other_weight_decay: float | None = None
    """Weight decay of the rest in the first phase; null: optim.other_weight_decay."""
    weight_decay_of: dict[str, float] = field(default_factory=dict)
    """Weight decay of some parameters in the first phase, by glob of their names, before optim.weight_decay_of."""
    restart_optimizer: bool = True
    """Begin the second phase with a new optimizer, as the authors do: its moments start from zero."""


@dataclass(frozen=True)
class WidthConfig:
    """One scheduled width in bits: a pure function of the global step."""

    schedule: Literal["cosine", "linear", "exponential", "demon", "constant", "piecewise"] = "cosine"
    """How a cycle rises: cosine is CPT's; exponential at once, demon late (2403.02243). constant: always high."""
    low: int = 2
    """Lowest width, where a cycle starts: 2 to 16 or 32 bits; for communication 1 to 8, 16 or 32."""
    high: int = 8
    """Highest width, where a cycle ends, and that of a constant one; cycles stay within 2 to 16, or 1 to 8."""
    cycles: int = 8
    """Number of cycles over the whole run, after warm-up; fewer, with a warning, where there are too few steps."""
    shape: Literal["repeated", "triangular", "reversed"] = "repeated"
    """repeated: every cycle rises; triangular: they fall and rise in turn, the last one rises; reversed: all fall."""
    mirror: Literal["vertical", "horizontal"] = "vertical"
    """What a falling cycle is: vertical swaps high and low, horizontal runs backwards; alike for cosine and linear."""
    pieces: tuple[tuple[float, int], ...] = ()
    """Of a piecewise schedule: [epoch, bits] pairs, e.g. [[0, 8], [30, 4]]: 8 bits, and 4 from epoch 30 on."""
    warmup_epochs: float = 0.0
    """Epochs at the beginning that stay at high: early aggressive quantization does lasting damage (2403.02243)."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Widths of the forward pass, the backward pass and the gradient all-reduce; 32 means not quantized."""

    forward: WidthConfig = field(default_factory=lambda: WidthConfig(low=2, high=6))
    """Width of weights and activations before their sign is taken (CycleBNN)."""
    backward: WidthConfig = field(default_factory=lambda: WidthConfig(schedule="constant", low=8, high=8))
    """Width of the output gradient of binary layers."""
    communication: WidthConfig = field(default_factory=lambda: WidthConfig(low=2, high=8))
    """Width of the gradient all-reduce."""


@dataclass(frozen=True)
class CommConfig:
    """How gradients are averaged over ranks."""

    mode: Literal["auto", "quantized", "bf16", "fp32"] = "auto"
    """quantized: at the schedule's width; bf16, fp32: at that width always; auto: the fastest of them, as measured at start."""
    codec: Literal["hadamard", "absmax", "minmax"] = "hadamard"
    """hadamard: randomized block rotation with Lloyd-Max levels; absmax, minmax: plain uniform levels per block."""
    block_size: int = 256
    """Elements that share one scale; a power of two."""
    small_bits: Literal[16, 32] = 32
    """Width of tensors too small to quantize (see small_numel)."""
    small_numel: int = 1024
    """Tensors with fewer elements, and all 1-D ones, travel at small_bits."""
    hierarchical: bool = False
    """Average within nodes first, at 16 bits; the schedule's width is then used between nodes only."""
    second_phase_extra_bits: int = 0
    """Bits by which averaged gradients are wider than the schedule's width, up to 8 in all. See the README for when it pays."""
    error_feedback: bool = False
    """Add what quantization lost at this step to the gradient of the next one."""
    check_every: int = 100
    """Steps between two comparisons of all parameters across ranks; 0 means never."""


@dataclass(frozen=True)
class EngineConfig:
    """What drives the parallel step."""

    name: Literal["ddp", "deepspeed"] = "ddp"
    """ddp: torch DistributedDataParallel; deepspeed: ZeRO, at stage zero_stage."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """Of DeepSpeed: what ranks share out among them; 0: nothing, 1: optimizer state, 2: also averaged gradients."""
    reduce_scatter: bool = True
    """At zero_stage 1 and 2: send a rank the gradients of its own part alone; false: all, as DDP, to the last bit."""
    bucket_mb: float = 25.0
    """Size of a gradient bucket in MiB."""
    find_unused_parameters: bool = False
    """Tolerate parameters that take no part in the loss."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """For experts: further settings as in DeepSpeed's own configuration, e.g. {wall_clock_breakdown: true}."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation images."""

    every_epochs: float = 1.0
    """Epochs between two evaluations; one is always done at the end."""
    batch_size: int = 64
    """Images per forward pass and rank."""
    forward_bits: int = 0
    """Forward width of evaluation, EMA, best and export; 0 means precision.forward.high."""


@dataclass(frozen=True)
class SearchConfig:
    """Which layers are to stay real within a budget; read by `cyclebnn search` alone."""

    dir: str = ""
    """Folder of the search: scores, weights, pattern.json, pattern.png; empty: run.dir with -mixbin behind it."""
    budget: float = 0.25
    """Most that the network may cost: operations, of 64 binary ones each counts as one, over those of the real network."""
    strategy: Literal["grow", "shrink", "iterative", "sensitivity", "random", "first", "last"] = "shrink"
    """shrink: from all real, make layers binary until the budget allows; grow: from all binary, make layers real while it
    does. Others are baselines: shrink by plain score; one round of scores; any, the first or the last layers real."""
    score: Literal["accuracy", "loss"] = "accuracy"
    """What a candidate's change per cost is measured in, on images held out of the training set; the other breaks ties."""
    pretrain_steps: int = 1000
    """Steps that train the network the search starts from; 0: it starts from model.weights or model.pretrained as they are."""
    steps: int = 100
    """Steps that train a candidate, before it is scored."""
    finetune_steps: int = 100
    """Steps that train the network with each chosen layer, before the next ones are tried."""
    batch_size: int = 128
    """Images of a step: a candidate is trained by one rank alone."""
    peak_lr: float = 0.0
    """Highest learning rate of each of these trainings, which warm up and fall to 0 along a cosine; 0 means optim.lr."""
    eval_images: int = 2000
    """Training images that are held out to score candidates with; the validation images are not looked at."""
    random_seed: int = 0
    """Which layers strategy random takes; all else follows run.seed."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, written by rank 0."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE, else online where an API key is present, else offline."""
    project: str = "cyclebnn_dist"
    """Project of the run."""
    entity: str = ""
    """Team or user; empty means the account's default."""
    group: str = ""
    """Group of the run."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    binary: BinaryConfig = field(default_factory=BinaryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    first_phase: FirstPhaseConfig = field(default_factory=FirstPhaseConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
