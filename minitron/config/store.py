"""Registers the dataclasses as schemas in Hydra's ConfigStore."""

from hydra.core.config_store import ConfigStore

from minitron.config.data import DataConfig
from minitron.config.distill import DistillConfig
from minitron.config.launch import ClusterConfig, LaunchConfig
from minitron.config.line import AblationConfig, CorrectionConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.plan import PlanConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.preflight import PreflightConfig
from minitron.config.prune import PruneConfig
from minitron.config.run import (
    BaselineConfig,
    EvalConfig,
    ExportConfig,
    ReportConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
)
from minitron.config.scale import ScaleConfig
from minitron.config.score import ScoreConfig
from minitron.config.search import SearchConfig
from minitron.config.teacher_logits import TeacherLogitsConfig

GROUPS: dict[str, type] = {
    "source": SourceConfig,
    "parallel": ParallelConfig,
    "precision": PrecisionConfig,
    "data": DataConfig,
    "score": ScoreConfig,
    "prune": PruneConfig,
    "search": SearchConfig,
    "teacher_logits": TeacherLogitsConfig,
    "distill": DistillConfig,
    "baseline": BaselineConfig,
    "correction": CorrectionConfig,
    "ablation": AblationConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "tracking": TrackingConfig,
    "scale": ScaleConfig,
    "plan": PlanConfig,
    "preflight": PreflightConfig,
    "launch": LaunchConfig,
    "cluster": ClusterConfig,
}
"""Group folders in ``conf/`` whose files start from a schema of the same name."""


def register() -> None:
    """Make the schemas known to Hydra: ``run_schema`` for the root and ``<group>/schema`` for each group."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, schema in GROUPS.items():
        store.store(group=group, name="schema", node=schema)
