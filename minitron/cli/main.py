"""``minitron <verb> [key=value ...]``."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import minitron
from minitron.cli.turn import end_process, in_turn, report_error
from minitron.errors import ConfigError, MinitronError, StoppedError
from minitron.log import complain
from minitron.runtime.env import DistEnv, dist_env, prepare_rank
from minitron.runtime.signals import hold_stop_signal

if TYPE_CHECKING:
    from minitron.config.run import RunConfig

VERBS: dict[str, tuple[str, str]] = {
    "compress": ("the whole line, resumable: what is done is skipped", "source, data, prune, distill"),
    "import": ("a Hugging Face folder or GGUF file -> a Megatron checkpoint", "source"),
    "data": ("text -> Megatron .bin/.idx, split into train and held-out", "data"),
    "score": ("one calibration pass -> importance of every head, neuron, channel and layer", "score"),
    "prune": ("scores and a target shape -> a prune spec and a smaller checkpoint", "prune"),
    "search": (
        "a grid of shapes and a budget -> candidates pruned, distilled for a while, ranked",
        "search, prune, distill",
    ),
    "verify": (
        "finite logits on calibration text; where pruning only cut, equal to the masked teacher's",
        "prune, precision",
    ),
    "teacher-logits": (
        "the teacher's distributions, a few numbers per token, for distill without it",
        "teacher_logits",
    ),
    "distill": ("teacher and pruned student -> a distilled checkpoint", "distill"),
    "train": (
        "cross-entropy: teacher correction with correction.enabled=true, else the from-scratch control",
        "correction, distill.train",
    ),
    "ablate": ("the papers' five recipes at equal tokens, and a longer run from scratch", "ablation, distill"),
    "eval": ("held-out loss and perplexity; the unpruned teacher first", "eval"),
    "export": ("the distilled checkpoint -> a Hugging Face folder, reloaded and compared", "export"),
    "plan": (
        "memory, layout, tokens, steps, FLOPs, GPU-hours; needs no GPU and no weights",
        "plan, parallel",
    ),
    "preflight": ("check devices, links, disk and clocks of all ranks before a run", "preflight, parallel"),
    "report": ("table, plots and report.html, once everything before it is done", "report"),
}
"""Each verb: what it does, and the sections of the configuration it reads most."""

STATUS = "status"
_STATUS_TEXT = "what a run's folder shows: stages, jobs, steps, loss, time left"

_EPILOG = """\
Overrides are key=value, as in Hydra:
  experiment=demo                          a prepared run (conf/experiment/)
  source.path=/models/Llama-3.1-8B         a local Hugging Face folder, or a .gguf file
  parallel.tensor_model_parallel_size=2    the layout; the ranks are started for it
  prune.hidden_size=3072                   the target shape; what is not named is kept
  distill.train.num_tokens=2000000000      how long to retrain
  distill.teacher.source=cached            from what teacher-logits wrote; compress runs it
  launch=slurm cluster=dgx_h100            stages as jobs of a cluster; launch.dry_run=true prints the scripts
--print-config shows every key with its value.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="minitron",
        usage="minitron [-h] [--version] <verb> [key=value ...] [--print-config]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make a large language model small: prune it by importance, retrain it by distillation.",
        epilog=f"{_EPILOG}\nTry it: minitron compress experiment=demo",
    )
    parser.add_argument("--version", action="version", version=f"minitron {minitron.__version__}")
    verbs = "\n".join(f"  {name:<16}{text}" for name, (text, _sections) in VERBS.items())
    verbs += f"\n  {STATUS:<16}{_STATUS_TEXT}"
    # The list is ours: argparse's own wraps the lines, and prints a suppressed verb all the same.
    subparsers = parser.add_subparsers(
        title="verbs", description=verbs, help=argparse.SUPPRESS, dest="verb", required=True, prog="minitron"
    )
    for name, (text, sections) in VERBS.items():
        sub = subparsers.add_parser(
            name,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"minitron {name}: {text}.\nReads the sections: {sections}.",
            epilog=_EPILOG,
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
        sub.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    status = subparsers.add_parser(STATUS, description=f"minitron {STATUS}: {_STATUS_TEXT}.")
    status.add_argument("run", metavar="runs/NAME", help="the run's folder")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may stand on both sides of an option.

    Raises:
        SystemExit: It is no command of ours; what is wrong is printed.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.verb != STATUS:
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """One command.

    Returns:
        Exit code: 0, or the ``exit_code`` of the error that is printed in one line.
    """
    hold_stop_signal()
    args = parse(argv)
    env = None
    try:
        if args.verb == STATUS:
            from minitron.cli.status import show_status

            show_status(Path(args.run))
            return 0
        env = dist_env()
        if env is not None:
            prepare_rank()
        return _run(args.verb, args.overrides, env, print_config=args.print_config)
    except StoppedError as stopped:
        from minitron.cli.worker import stopped_code

        report_error(stopped, env)
        return stopped_code(env)
    except MinitronError as error:
        report_error(error, env)
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; what is done is kept, the same command goes on from there")
        return 130


def _run(verb: str, overrides: list[str], env: DistEnv | None, *, print_config: bool) -> int:
    from minitron.config.compose import compose_run, to_yaml

    if print_config:
        overrides = overrides or ["source.kind=random"]
        sys.stdout.write(to_yaml(compose_run(overrides)))
        return 0
    with in_turn(env):
        config = compose_run(overrides)
        if verb != "plan":
            _check_cluster(config, overrides)
        if verb == "eval" and config.eval.checkpoint and not Path(config.eval.checkpoint).exists():
            raise ConfigError(f"eval.checkpoint={config.eval.checkpoint} does not exist")

    if verb == "plan":
        from minitron.cli.planning import run_plan

        return run_plan(config)
    from minitron.cli.job import run_job, run_preflight

    if verb == "preflight":
        return run_preflight(config, env)
    return run_job(verb, config, env)


def _check_cluster(config: "RunConfig", overrides: list[str]) -> None:
    """Refuse what is asked of a cluster that the run is not submitted to."""
    from minitron.config.launch import LaunchKind

    given = [words for words in overrides if re.match(r"[+~]*cluster[.=]", words)]
    if given and config.launch.kind is not LaunchKind.slurm:
        raise ConfigError(f"{given[0]} is read with launch=slurm only, but launch={config.launch.kind}; leave it out")


def console() -> NoReturn:
    """The console script."""
    end_process(main)


if __name__ == "__main__":
    console()
