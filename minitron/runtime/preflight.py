"""What can be wrong with the machines before a run starts, checked by all ranks together."""

import importlib.metadata
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from minitron.config.fp8 import NEEDS
from minitron.config.precision import Fp8Recipe
from minitron.config.preflight import PreflightConfig
from minitron.runtime.bandwidth import Figures, clock_offsets, measure, outliers
from minitron.runtime.device import refused_fp8

_DRIVER = Path("/proc/driver/nvidia/version")
_NO_DRIVER = "none"
_SHARED_WAIT_S = 10.0
"""Network file systems show a new file late."""
_FP8_CAPABILITY = min(need.capability for need in NEEDS.values())
"""The first compute capability with FP8 tensor cores."""


@dataclass(frozen=True)
class Asked:
    """What the run asks of the machines.

    Attributes:
        recipes: Its FP8 recipes by key, see `RunConfig.fp8_recipes`.
        prefers_gpu: Whether the device was left open (``device=auto``), so that a GPU should be used.
    """

    recipes: Mapping[str, Fp8Recipe] = field(default_factory=dict)
    prefers_gpu: bool = False


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        name: What was looked at.
        reason: What is wrong, in one line; None when nothing is.
        found: What was seen.
    """

    name: str
    found: str
    reason: str | None = None


@dataclass(frozen=True)
class Facts:
    """What one rank sees of its machine.

    Attributes:
        rank: Its number.
        host: Name of its machine.
        gpu: Name and memory of its GPU, None on a CPU.
        gpu_id: What tells two GPUs apart.
        capability: Compute capability of its GPU.
        driver: Version of NVIDIA's driver.
        versions: torch, CUDA and NCCL.
        kernels: Where each fused kernel comes from.
        transformer_engine: Its version, None when it cannot be imported.
        sees_run: Whether it reads in the run folder what rank 0 wrote there.
        free_bytes: Free space on the disk of the run folder.
        figures: What it measured.
        refused_fp8: Why its device cannot do an FP8 recipe that the run asks for, by key.
    """

    rank: int
    host: str
    gpu: str | None
    gpu_id: str
    capability: tuple[int, int] | None
    driver: str
    versions: str
    kernels: dict[str, str]
    transformer_engine: str | None
    sees_run: bool
    free_bytes: int
    figures: Figures
    refused_fp8: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How a message names the rank."""
        return f"rank {self.rank} ({self.host})"


def preflight(
    run_folder: Path,
    device: torch.device,
    settings: PreflightConfig,
    asked: Asked,
    *,
    shared_wait_s: float = _SHARED_WAIT_S,
) -> list[Check]:
    """Look at every rank's machine and at what connects them; all ranks call it together.

    Args:
        run_folder: Folder that all ranks must share; made when it is not there.
        device: This rank's device.
        settings: Limits.
        asked: What the run asks for.
        shared_wait_s: Longest wait for the others to see what rank 0 wrote.

    Returns:
        Every check, on rank 0; an empty list elsewhere.
    """
    sees_run = _sees_what_rank_0_writes(run_folder, shared_wait_s)
    free = shutil.disk_usage(run_folder).free if sees_run else 0
    figures = measure(device, num_bytes=settings.message_mb * 10**6)
    offsets = clock_offsets()
    facts = replace(
        _facts(device, sees_run=sees_run, free_bytes=free, figures=figures),
        refused_fp8=refused_fp8(asked.recipes, device),
    )
    everyone: list[Facts] = [facts] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    return judge(everyone, offsets, settings, asked) if dist.get_rank() == 0 else []


def judge(everyone: Sequence[Facts], offsets: Sequence[float], settings: PreflightConfig, asked: Asked) -> list[Check]:
    """Turn what the ranks saw into checks.

    Args:
        everyone: The facts of every rank, in order.
        offsets: Seconds by which each rank's clock is ahead of rank 0's.
        settings: Limits.
        asked: What the run asks for.
    """
    on_gpu = everyone[0].gpu is not None
    hosts = sorted({facts.host for facts in everyone})
    checks = [
        Check("ranks", f"{len(everyone)} on {hosts[0] if len(hosts) == 1 else f'{len(hosts)} hosts'}"),
        _devices(everyone, asked),
        _same("versions", ((facts.name, facts.versions) for facts in everyone)),
    ]
    if on_gpu:
        checks += [
            _own_gpu(everyone),
            _same("driver", ((facts.name, facts.driver) for facts in everyone)),
            _transformer_engine(everyone),
        ]
    if on_gpu or asked.recipes:
        checks.append(_fp8(everyone, asked))
    checks += [
        _same("fused kernels", ((f.name, ", ".join(f"{k}: {v}" for k, v in f.kernels.items())) for f in everyone)),
        _computing(everyone, settings),
        *_talking(everyone, settings),
        _shared_folder(everyone),
        _disk(everyone, settings),
        _clocks(everyone, offsets, settings),
    ]
    return checks


def _sees_what_rank_0_writes(folder: Path, wait_s: float) -> bool:
    """Rank 0 writes a file with a random word, the others look for it."""
    told: list[str | None] = [None]
    file = folder / f".preflight-{secrets.token_hex(4)}" if dist.get_rank() == 0 else None
    if file is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(16), encoding="utf-8")
            told = [f"{file.name} {file.read_text(encoding='utf-8')}"]
        except OSError:
            file = None
    dist.broadcast_object_list(told, src=0)
    name, _, word = (told[0] or "").partition(" ")
    sees = bool(name) and _finds(folder / name, word, wait_s)
    dist.barrier()
    if file is not None:
        file.unlink()
    return sees


def _finds(file: Path, word: str, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            return file.read_text(encoding="utf-8") == word
        except OSError:
            time.sleep(0.1)
    return False


def _facts(device: torch.device, *, sees_run: bool, free_bytes: int, figures: Figures) -> Facts:
    versions = f"torch {torch.__version__}"
    gpu, gpu_id, capability = None, "", None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        gpu_id = str(getattr(properties, "uuid", device.index))
        capability = (properties.major, properties.minor)
        versions += f", CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return Facts(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        gpu=gpu,
        gpu_id=gpu_id,
        capability=capability,
        driver=_driver(),
        versions=versions,
        kernels=fused_kernels(),
        transformer_engine=_transformer_engine_version(),
        sees_run=sees_run,
        free_bytes=free_bytes,
        figures=figures,
    )


def _driver() -> str:
    """NVIDIA's kernel driver, as it names itself."""
    try:
        first = _DRIVER.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return _NO_DRIVER
    return " ".join(first.removeprefix("NVRM version:").split()[:9])


def _transformer_engine_version() -> str | None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return importlib.metadata.version("transformer-engine") if HAVE_TE else None


def fused_kernels() -> dict[str, str]:
    """Package that Megatron-Core takes each fused kernel from: ``transformer_engine``, ``apex``, or ``torch``."""
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.optimizer import multi_tensor_scale_impl
    from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

    def package(module: str) -> str:
        name = module.split(".")[0]
        return {"megatron": "torch", "amp_C": "apex", "transformer_engine_torch": "transformer_engine"}.get(name, name)

    return {
        "Adam": package(Adam.__module__),
        "multi-tensor operations": package(multi_tensor_scale_impl.__module__),
        "gradient accumulation": "apex" if _grad_accum_fusion_available else "torch",
    }


def _same(name: str, values: Iterable[tuple[str, str]]) -> Check:
    """All ranks see the same."""
    named: dict[str, list[str]] = {}
    for who, value in values:
        named.setdefault(value, []).append(who)
    common = max(named, key=lambda value: len(named[value]))
    others = [f"{who}: {value}" for value, whos in named.items() if value != common for who in whos]
    reason = f"the others have {common}, but {_few(others)}" if others else None
    return Check(name, common, reason)


def _devices(everyone: Sequence[Facts], asked: Asked) -> Check:
    """All the same, and no GPU that a driver has but torch does not see."""
    check = _same("devices", ((facts.name, facts.gpu or "CPU") for facts in everyone))
    unused = [facts.name for facts in everyone if facts.gpu is None and facts.driver != _NO_DRIVER]
    if check.reason is not None or not asked.prefers_gpu or not unused:
        return check
    reason = (
        f"NVIDIA's driver is loaded, but torch sees no CUDA device on {_few(unused)}; install a torch built for the "
        "driver's CUDA, look at CUDA_VISIBLE_DEVICES, or set device=cpu"
    )
    return replace(check, reason=reason)


def _own_gpu(everyone: Sequence[Facts]) -> Check:
    seen: dict[tuple[str, str], list[str]] = {}
    for facts in everyone:
        seen.setdefault((facts.host, facts.gpu_id), []).append(facts.name)
    shared = [" and ".join(names) for names in seen.values() if len(names) > 1]
    reason = f"one GPU for {_few(shared)}; start one rank for each GPU" if shared else None
    return Check("one GPU a rank", f"{len(seen)} GPUs", reason)


def _transformer_engine(everyone: Sequence[Facts]) -> Check:
    lacking = [facts.name for facts in everyone if facts.transformer_engine is None]
    found = next((f.transformer_engine for f in everyone if f.transformer_engine), "not there")
    reason = f"it cannot be imported on {_few(lacking)}; install minitron's extra `gpu`" if lacking else None
    return Check("Transformer Engine", found, reason)


def _fp8(everyone: Sequence[Facts], asked: Asked) -> Check:
    """Says whether FP8 could be used, and fails where the run asks for a recipe that a device cannot do."""
    capability = min(facts.capability or (0, 0) for facts in everyone)
    can = "available" if capability >= _FP8_CAPABILITY else "not available"
    of = f"compute capability {capability[0]}.{capability[1]}" if any(capability) else "no GPU"
    wanted = "".join(f", {key}={recipe} asked for" for key, recipe in asked.recipes.items())
    reasons: dict[str, list[str]] = {}
    for facts in everyone:
        for reason in facts.refused_fp8.values():
            reasons.setdefault(reason, []).append(facts.name)
    refused = [f"{reason} ({_few(list(dict.fromkeys(names)))})" for reason, names in reasons.items()]
    failed = f"{_few(refused)}; choose another recipe, or precision=bf16" if refused else None
    return Check("FP8", f"{can}: {of}{wanted}", failed)


def _computing(everyone: Sequence[Facts], settings: PreflightConfig) -> Check:
    figures = {facts.name: facts.figures.tflops for facts in everyone}
    slow = outliers(figures, settings.outlier_share)
    return Check("matrix products, TFLOPs", _spread(list(figures.values())), f"slow: {_few(slow)}" if slow else None)


def _talking(everyone: Sequence[Facts], settings: PreflightConfig) -> list[Check]:
    """The all-reduces over everyone, then the links between neighbours, inside hosts and between them."""
    if len(everyone) == 1:
        return [Check("all-reduce", "one rank: nobody to talk to")]
    checks = []
    for backend in everyone[0].figures.reductions:
        seen = {facts.name: facts.figures.reductions[backend] for facts in everyone}
        slowest = min(reduction.gbs for reduction in seen.values())
        wrong = [name for name, reduction in seen.items() if not reduction.is_right]
        reason = f"the sum is wrong on {_few(wrong)}" if wrong else None
        checks.append(Check(f"all-reduce by {backend}, GB/s", f"{slowest:.3g}", reason))
    links: dict[bool, dict[str, float]] = {}
    for facts in everyone:
        for neighbour, value in facts.figures.links_gbs.items():
            other = everyone[neighbour]
            links.setdefault(facts.host == other.host, {})[f"{facts.name} to {other.name}"] = value
    for inside, figures in sorted(links.items(), reverse=True):
        slow = outliers(figures, settings.outlier_share)
        name = f"links {'inside hosts' if inside else 'between hosts'}, GB/s"
        checks.append(Check(name, _spread(list(figures.values())), f"slow: {_few(slow)}" if slow else None))
    return checks


def _shared_folder(everyone: Sequence[Facts]) -> Check:
    blind = [facts.name for facts in everyone if not facts.sees_run]
    if everyone[0].name in blind:
        return Check("run folder", "not writable", "rank 0 cannot write there; choose another runs_dir")
    reason = f"what rank 0 writes is not seen by {_few(blind)}; runs_dir must be a folder all hosts share"
    return Check("run folder", "seen by all ranks" if not blind else "not shared", reason if blind else None)


def _disk(everyone: Sequence[Facts], settings: PreflightConfig) -> Check:
    free = min((facts.free_bytes for facts in everyone if facts.sees_run), default=0)
    least = settings.min_free_gb
    reason = f"less than preflight.min_free_gb={least:g}; free some space, or choose another runs_dir"
    return Check("disk space", f"{free / 1e9:.1f} GB free", reason if free < least * 1e9 else None)


def _clocks(everyone: Sequence[Facts], offsets: Sequence[float], settings: PreflightConfig) -> Check:
    limit = settings.max_clock_skew_s
    away = [f"{f.name}: {o:+.3f} s" for f, o in zip(everyone, offsets, strict=True) if abs(o) > limit]
    reason = f"more than preflight.max_clock_skew_s={limit:g} from rank 0: {_few(away)}" if away else None
    return Check("clocks", f"within {max(map(abs, offsets)):.3f} s of rank 0's", reason)


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _few(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are: messages stay one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more
