"""Base model and licence: found where they are named, nowhere else, and valid front matter in the card."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.config.run import RandomModelConfig
from minitron.models.model_card import model_card
from minitron.models.origin import Origin, origin_of_folder, origin_of_gguf
from minitron.models.random_source import random_model

CARD = """---
license: other
license_name: llama3.1
license_link: https://example.org/LICENSE
base_model:
- meta-llama/Llama-3.1-8B
---
# A model
---
license: not this
"""


def _folder(tmp_path: Path, place: str, card: str | None) -> Path:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_what_the_readme_names(tmp_path: Path) -> None:
    assert origin_of_folder(_folder(tmp_path, "mine", CARD), None) == {
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "https://example.org/LICENSE",
        "base_model": "meta-llama/Llama-3.1-8B",
    }


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# A model\n",
        "text\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\n[broken: {\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense:\n  - mit\nbase_model: [a/b, c/d]\n---\n",
    ],
)
def test_nothing_is_guessed(tmp_path: Path, card: str | None) -> None:
    assert origin_of_folder(_folder(tmp_path, "mine", card), None) == {}


@pytest.mark.parametrize(
    ("place", "name_or_path", "base"),
    [
        ("hub/models--org--Some-8B/snapshots/0a1b", None, "org/Some-8B"),
        ("Some-8B", "org/some-8b", "org/some-8b"),
        ("Some-8B-tuned", "org/Some-8B", None),  # config.json names the model that it was tuned from
        ("Some-8B", "/data/org/Some-8B", None),
        ("Some-8B", "Some-8B", None),
    ],
)
def test_the_sources_own_name(tmp_path: Path, place: str, name_or_path: str | None, base: str | None) -> None:
    origin = origin_of_folder(_folder(tmp_path, place, None), name_or_path)
    assert origin == ({} if base is None else {"base_model": base})


def test_what_a_gguf_file_names() -> None:
    fields: dict[str, Any] = {
        "general.license": "apache-2.0",
        "general.source.repo_url": "https://example.org/a/b",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Base",
    }
    assert origin_of_gguf(fields.get) == {"license": "apache-2.0", "base_model": "org/Base"}
    fields["general.source.repo_url"] = "https://huggingface.co/org/Self/"
    assert origin_of_gguf(fields.get)["base_model"] == "org/Self"
    assert origin_of_gguf({}.get) == {}


@pytest.mark.parametrize("origin", [{}, {"license": "other", "license_name": "a: b", "base_model": "org/Some-8B"}])
def test_front_matter_of_the_card(origin: Origin) -> None:
    model = random_model(RandomModelConfig())
    card = model_card(
        name="run",
        source="Some",
        origin=origin | {"parameters": "1"},  # what else the import's summary holds
        before=model,
        after=model,
        figures={},
        distill_tokens=1,
        environment={},
    )
    _, front, body = card.split("---\n", maxsplit=2)
    values = yaml.safe_load(front)
    assert values.pop("library_name") == "transformers"
    assert {key: value for key, value in values.items() if key not in ("tags", "pipeline_tag")} == origin
    assert body.lstrip().startswith("# run")
