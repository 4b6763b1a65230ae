"""What a source says of its own origin: repeated in the model card of what is made from it, never guessed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Origin = dict[str, str]
"""Keys of Hugging Face's front matter: ``base_model``, ``license``, ``license_name``, ``license_link``."""

LICENSE_KEYS = ("license", "license_name", "license_link")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_URL = re.compile(rf"https://huggingface\.co/({_HUB_ID.pattern})/?")


def origin_of_folder(folder: Path, name_or_path: str | None) -> Origin:
    """Base model and licence of a Hugging Face folder.

    The base model is the folder's own name on the hub: from a hub cache's path, or from config.json where that
    name ends as the folder's does (config.json may name an ancestor). Else it is the base that README.md names.

    Args:
        folder: The model folder.
        name_or_path: ``_name_or_path`` of config.json.
    """
    card = _front_matter(folder / "README.md")
    found = {key: card[key] for key in LICENSE_KEYS if isinstance(card.get(key), str)}
    base = card.get("base_model")
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    path = folder.resolve()
    cached = next((part for part in path.parts if part.startswith("models--")), "")
    if cached.count("--") == 2 and "snapshots" in path.parts:
        base = cached.removeprefix("models--").replace("--", "/")
    elif name_or_path and _HUB_ID.fullmatch(name_or_path) and name_or_path.split("/")[1].lower() == path.name.lower():
        base = name_or_path
    return found | ({"base_model": base} if isinstance(base, str) and base else {})


def origin_of_gguf(field: Callable[[str, Any], Any]) -> Origin:
    """Base model and licence of a GGUF file.

    Args:
        field: Gives a field's value by its key, or the second argument.
    """
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    found = {name: field(key, None) for name, key in keys.items()}
    urls = ("general.source.repo_url", "general.repo_url", "general.base_model.0.repo_url")
    matches = (_HUB_URL.fullmatch(str(field(key, ""))) for key in urls)
    found["base_model"] = next((match[1] for match in matches if match), None)
    return {name: value for name, value in found.items() if isinstance(value, str) and value}


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML between the two lines of dashes that a model card starts with; empty where there is none."""
    try:
        text = readme.read_text(encoding="utf-8")
        start, block, _rest = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
        values = yaml.safe_load(block) if not start.strip() else None
    except (OSError, ValueError, yaml.YAMLError):  # a card is a courtesy: a broken one stops nothing
        return {}
    return values if isinstance(values, dict) else {}
