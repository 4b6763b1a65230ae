"""The order of stages, and what it takes to run one exactly once."""

from minitron.pipeline.stage import Planned, Stage, plan_stages, run_stages

__all__ = ["Planned", "Stage", "plan_stages", "run_stages"]
