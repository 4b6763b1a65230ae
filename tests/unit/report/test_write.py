import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from minitron.errors import ArtefactError
from minitron.report.collect import collect
from minitron.report.data import load_report
from minitron.report.html import load_snippet
from minitron.report.write import write_report
from tests.unit.report import synthetic as syn

PNGS = {
    "losses",
    "importance_layer",
    "importance_hidden",
    "importance_ffn",
    "importance_head",
    "stages",
}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, links and text of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def page(folder: Path) -> Page:
    found = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert found.open == []
    return found


def test_json_has_the_numbers(report_dir: Path) -> None:
    values = json.loads((report_dir / "report.json").read_text())
    rows = {row["role"]: row for row in values["models"]}
    assert {role: row["loss"] for role, row in rows.items()} == syn.LOSSES
    assert rows["distilled"]["gap_recovered"] == pytest.approx(0.8)
    assert rows["distilled"]["num_parameters"] == syn.TARGET_PARAMETERS
    assert values["cost"]["student_flops"] == 6 * syn.TARGET_PARAMETERS * syn.NUM_TOKENS
    assert values["prune"]["dropped_layers"] == syn.DROPPED
    assert values["prune"]["target"]["hidden_size"] == 448
    assert {stage["name"]: stage["seconds"] for stage in values["stages"]} == syn.SECONDS
    assert "run_dir" not in values


def test_load_gives_back_what_was_written(report_dir: Path) -> None:
    assert load_report(report_dir) == collect(syn.as_run(report_dir.parent))


@pytest.mark.parametrize("text", [None, "{", "{}", '{"format": 0}', '{"format": 1}'])
def test_load_refuses(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtefactError, match="run `minitron report` again"):
        load_report(tmp_path)


def test_pngs_are_1800_wide_and_embedded(report_dir: Path) -> None:
    found = {path.stem: path.read_bytes() for path in report_dir.glob("*.png")}
    assert set(found) == PNGS
    embedded = [link.partition("base64,")[2] for link in page(report_dir).links if link.startswith("data:image/png")]
    assert sorted(map(base64.b64decode, embedded)) == sorted(found.values())
    for png in found.values():
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", png[16:24])
        assert width == 1800
        assert 500 < height < 1600


def test_page_shows_the_numbers(report_dir: Path) -> None:
    text = page(report_dir).text
    assert "SmolLM2-135M-Instruct: 134.5M \u2192 71.6M parameters" in text
    assert "teacher 134.5M 106.2M 3.000 20.09 100.0 %" in text
    assert "pruned 71.6M 49.6M 8.000 2,981 0.0 %" in text
    assert "pruned + distilled 71.6M 49.6M 4.000 54.60 80.0 %" in text
    assert "random init 71.6M 49.6M 6.500 665.14 30.0 %" in text
    assert "loss is 1.000 nats/token higher than the teacher's and 4.000 nats/token lower than right after" in text
    assert "It is 2.500 nats/token lower than that of the random-init control" in text
    assert "same number of tokens and the same schedule" in text
    assert "layers 30 24 80.0 % 97.3 %" in text
    assert "query heads per layer 9 6 66.7 % -" in text
    assert "query groups per layer 3 3 all -" in text
    assert "Checked: on 128 tokens of calibration text the pruned model's logits are finite, and those of" in text
    assert "Dropped layers, counted from 0: 21, 22, 23, 24, 25, 26." in text
    assert "student, forward and backward 6 N D 819.2k 3.52e14" in text  # 6 x 71.6e6 x 819200
    assert "teacher, forward 2 N t D 819.2k 2.20e14" in text  # 2 x 134.5e6 x 819200
    assert "distillation 819.2k 5.72e14" in text
    assert "train 3.28M tokens (900 documents, 12.0 MB)" in text
    assert "by at most 2.5e-05 of the largest logit" in text
    assert "torch 2.9.0" in text
    assert load_snippet(report_dir.parent / "export" / "hf").replace("\n", " ") in text


def test_page_needs_nothing_else(report_dir: Path) -> None:
    found = page(report_dir)
    outside = [link for link in found.links if not link.startswith(("data:image/png;base64,", "#"))]
    assert outside == []
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"url\(|@import", (report_dir / "report.html").read_text(encoding="utf-8"))


def test_page_escapes_what_models_write(report_dir: Path) -> None:
    html = (report_dir / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; \ufffdParis") == 4
    assert "note: &lt;b&gt;&amp;&lt;/b&gt;" in html  # the configuration
    assert "\x07" not in html


def test_prompt_is_shown_once(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo", sample=syn.PROMPT + " Paris.")
    write_report(syn.as_run(run), run / "report", {}, "")
    assert page(run / "report").text.count(syn.PROMPT) == 4


def test_without_baseline_and_scores(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo", without=("baseline", "eval_baseline", "score"))
    write_report(syn.as_run(run), tmp_path / "out", {}, "")
    text = page(tmp_path / "out").text
    assert "No random-init control was trained" in text
    assert "same schedule" not in text
    assert "random init" not in text
    assert "This run has no importance scores." in text
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"losses", "stages"}
    assert load_report(tmp_path / "out").baseline is None


def test_unlike_control_is_said(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    syn.rewrite_meta(run / "baseline", values={"distill.train.lr": 1e-3})
    write_report(syn.as_run(run), run / "report", {}, "")
    text = page(run / "report").text
    assert "differ in lr (0.0005 and 0.001): no like-for-like control." in text
    assert "same schedule" not in text


def test_short_run_that_kept_everything(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo", without=("baseline", "eval_baseline"))
    spec = {"layers": "0-29", "hidden": "0-575", "ffn": ["0-1535"] * 30, "heads": ["0-8"] * 30}
    (run / "prune" / "prune_spec.json").write_text(json.dumps(spec))
    (run / "prune" / "model.json").write_text(json.dumps(syn.SOURCE.to_dict()))
    (run / "distill" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1, "tokens": 2048}\n')
    scores = {"layer": np.zeros(30), "hidden": np.zeros(576), "ffn": np.zeros((30, 1536)), "head": np.zeros((30, 9))}
    write_report(syn.as_run(run), run / "report", scores, "")
    text = page(run / "report").text
    assert "No layer was dropped." in text
    assert "hidden channels 576 576 all" in text
    assert {path.stem for path in (run / "report").glob("*.png")} == PNGS
