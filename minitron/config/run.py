"""The root of the configuration: one `RunConfig` holds every section of every verb."""

import math
import re
import sys
from dataclasses import dataclass, field
from enum import StrEnum

from minitron.config.data import DataConfig
from minitron.config.depth import depth_plan
from minitron.config.distill import DistillConfig
from minitron.config.gpus import Gpu
from minitron.config.launch import ClusterConfig, LaunchConfig
from minitron.config.line import AblationConfig, ChainStepConfig, CorrectionConfig
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.plan import PlanConfig
from minitron.config.precision import Dtype, Fp8Recipe, PrecisionConfig
from minitron.config.preflight import PreflightConfig
from minitron.config.prune import PruneConfig
from minitron.config.scale import ScaleConfig
from minitron.config.score import ScoreConfig
from minitron.config.search import SearchConfig
from minitron.config.teacher_logits import TeacherLogitsConfig
from minitron.errors import ConfigError


class Device(StrEnum):
    """Where tensors live. ``auto`` takes CUDA when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class SourceDtype(StrEnum):
    """Number format of the imported weights."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class OnChange(StrEnum):
    """What to do with a finished stage whose inputs have changed."""

    error = "error"
    rerun = "rerun"


class SourceKind(StrEnum):
    """Where the model comes from."""

    path = "path"
    random = "random"


@dataclass(kw_only=True)
class RandomModelConfig:
    """A tiny model with random weights and a byte tokenizer, for tests and dry runs."""

    architecture: Architecture = Architecture.llama
    num_layers: int = 4
    hidden_size: int = 64
    ffn_hidden_size: int = 128
    num_attention_heads: int = 8
    num_query_groups: int = 4
    kv_channels: int | None = None
    """Size of a head; null is hidden_size / num_attention_heads."""
    rotary_percent: float = 1.0
    max_position_embeddings: int = 256
    share_embeddings_and_output_weights: bool = True
    seed: int = 0


@dataclass(kw_only=True)
class SourceConfig:
    """The model to compress."""

    kind: SourceKind = SourceKind.path
    """``path`` reads a Hugging Face folder or a GGUF file; ``random`` makes a tiny random model."""
    path: str | None = None
    """A Hugging Face folder (config.json, safetensors, tokenizer) or a .gguf file."""
    model: ModelConfig | None = None
    """Published shape of the model at ``path`` (the group ``model=``): `minitron plan` takes it where the path is not
    on this machine, and a path with another shape is refused."""
    dtype: SourceDtype = SourceDtype.auto
    """Number format of the checkpoint that import writes: ``auto`` is bf16 where the source is, else fp32."""
    random: RandomModelConfig = field(default_factory=RandomModelConfig)
    """Shape of the random model."""


@dataclass(kw_only=True)
class BaselineConfig:
    """The control: a random-init student of the same shape, same tokens and schedule, cross-entropy."""

    enabled: bool = True
    """Train and evaluate it as a stage of `compress`."""


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out loss and perplexity."""

    num_tokens: int = 16_384
    """Held-out tokens to evaluate on; the whole held-out split if it is shorter."""
    micro_batch_size: int = 4
    """Sequences in one forward pass."""
    checkpoint: str | None = None
    """For `minitron eval`: a checkpoint folder or a Hugging Face folder to evaluate beside the teacher."""


@dataclass(kw_only=True)
class ExportConfig:
    """The Hugging Face folder at the end."""

    dtype: Dtype = Dtype.bf16
    """Number format of the exported weights."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes."""
    max_logit_error: float = 1e-3
    """Largest difference allowed between our logits and the reloaded model's, relative to the largest logit."""


@dataclass(kw_only=True)
class ReportConfig:
    """The report at the end."""

    prompt: str = "The capital of France is"
    """Continued by teacher and student."""
    sample_tokens: int = 40
    """Tokens of each sample."""


@dataclass(kw_only=True)
class TrackingConfig:
    """Where metrics go besides the metrics.jsonl that is always written."""

    wandb: bool = False
    """Log to Weights & Biases; offline when no account is configured (`wandb sync <stage>/wandb/offline-run-*`)."""
    wandb_project: str = "minitron"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run needs. Each verb reads its own sections."""

    name: str = "unnamed"
    """Name of the run; its artefacts go to <runs_dir>/<name>/."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    seed: int = 1234
    """Seed of data order, calibration sample and random initialisation."""
    device: Device = Device.auto
    """auto, cpu or cuda."""
    on_change: OnChange = OnChange.error
    """A finished stage with other inputs: stop with an error, or run it again (the old result is set aside)."""
    source: SourceConfig = field(default_factory=SourceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    teacher_logits: TeacherLogitsConfig = field(default_factory=TeacherLogitsConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    chain: list[ChainStepConfig] = field(default_factory=list)
    """Steps down, each from the model of the one before; empty is the one step that ``prune`` describes."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        """Check what concerns no other section."""
        if not re.fullmatch(r"\w[\w.+=-]*", self.name):
            raise ConfigError(f"name={self.name!r} must be a plain folder name: letters, digits and ._+=-")

    @property
    def planned_gpu(self) -> Gpu:
        """The kind of GPU that `minitron plan` counts with."""
        return self.plan.gpu or self.cluster.gpu or Gpu.h100

    @property
    def fp8_recipes(self) -> dict[str, Fp8Recipe]:
        """The FP8 recipes that the run asks for, by their key; without FP8 none."""
        found: dict[str, Fp8Recipe] = {}
        if self.precision.fp8 is not None:
            found["precision.fp8_recipe"] = self.precision.fp8_recipe
        if self.distill.teacher.fp8_recipe is not None:
            found["distill.teacher.fp8_recipe"] = self.distill.teacher.fp8_recipe
        return found

    @property
    def least_train_sequences(self) -> int:
        """Sequences of ``data.seq_length`` of training text without which no run can start.

        As many as one global batch, the calibration samples, or the samples to fit on.
        """
        fitted = self.prune.reconstruct.num_samples if self.prune.reconstruct.enabled else 0
        without_layers = depth_plan(self.score, self.prune, num_layers=sys.maxsize).on_text  # of any model
        measured = self.score.depth.num_samples if without_layers else 0
        scored = max(self.score.num_samples, measured) * (self.score.seq_length or self.data.seq_length)
        return max(self.distill.train.global_batch_size, fitted, math.ceil(scored / self.data.seq_length))
