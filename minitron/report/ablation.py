"""`minitron ablate`: the recipes side by side, and what pruning with distillation saves."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from minitron.checkpoint.folder import read_model_config
from minitron.config.distill import TeacherSource
from minitron.config.run import RunConfig
from minitron.config.trainings import ABLATION, TRAININGS
from minitron.data.summary import load_summary, num_whole_sequences
from minitron.errors import ArtefactError
from minitron.models.axes import num_active_parameters
from minitron.report import figure as look
from minitron.report import format as fmt
from minitron.report.collect import read_curve, read_eval
from minitron.report.cost import TeacherCost, family_saving, six_nd, two_nd
from minitron.report.data import TrainingCurve
from minitron.runtime.artefact import RunFolder, storage_error, write_json

JSON_FILE, TABLE_FILE, PLOT_FILE = "ablation.json", "ablation.md", "ablation.png"
_BEST, _SCRATCH = "distill", "scratch_long"
_STYLES = {
    "distill": (look.BLUE, "o", "-"),
    "random_pruned_kd": (look.GREEN, "^", "-"),
    "pruned_ce": (look.RED, "v", "--"),
    "random_init_kd": (look.GREY, "D", "-"),
    "baseline": (look.ORANGE, "s", "--"),
    "scratch_long": (look.INK, ".", ":"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run of the comparison.

    Attributes:
        name: Its stage.
        label: What it is.
        num_tokens: Tokens it was trained on.
        loss: Held-out loss at the end, nats per token.
        flops: Training FLOPs of this recipe alone; where it distils, with the teacher's forward passes (one pass over
            each sequence where they are read from a cache) and the teacher's correction.
        curve: Held-out loss during training.
    """

    name: str
    label: str
    num_tokens: int
    loss: float
    flops: float
    curve: TrainingCurve


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The model that taught, and what that took besides the students' own training.

    Attributes:
        loss: Its held-out loss.
        num_parameters: Those that one of its tokens is computed with.
        forward_tokens: Tokens of its forward passes for one recipe; from a cache, each sequence of the text once.
        cached: The recipes read its distributions from a cache.
        correction_tokens: Tokens it was corrected on; 0 without correction.
    """

    loss: float
    num_parameters: int
    forward_tokens: int
    cached: bool
    correction_tokens: int

    @property
    def flops(self) -> float:
        """Of its correction and its forward passes for one recipe."""
        correction = six_nd(self.num_parameters, self.correction_tokens)
        return correction + two_nd(self.num_parameters, self.forward_tokens)

    @property
    def text(self) -> str:
        """What of it is counted, as people read it."""
        passes = "the teacher's one forward pass for the cache" if self.cached else "the teacher's forward passes"
        if not self.correction_tokens:
            return passes
        return f"{passes} and its correction on {fmt.count(self.correction_tokens)} tokens"


@dataclass(frozen=True, kw_only=True)
class TokenSaving:
    """Tokens from scratch over tokens of pruning and distillation, for one loss.

    Attributes:
        loss: Held-out loss during training that pruning and distillation ends with.
        num_tokens: Tokens it took.
        scratch_tokens: Tokens after which the run from scratch is as low, on the line between the two validations
            around it; all of its tokens if it never is.
        is_bound: The run from scratch never got there: the ratio is a lower bound.
    """

    loss: float
    num_tokens: int
    scratch_tokens: int
    is_bound: bool

    @property
    def ratio(self) -> float:
        """The saving."""
        return self.scratch_tokens / self.num_tokens

    @property
    def text(self) -> str:
        """As people read it."""
        return f"{'more than ' if self.is_bound else ''}{self.ratio:.1f}x"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The comparison.

    Attributes:
        recipes: In the order of the table.
        teaching: The teacher: the corrected one where it was corrected, that of ``distill.teacher.path`` where given.
        pruned_loss: Held-out loss of the pruned model before any retraining.
        saving: Tokens saved.
        family: Parameters of a family, the largest first.
        family_saving: FLOPs saved over the family; a lower bound where the token saving is one.
    """

    recipes: list[Recipe]
    teaching: Teaching
    pruned_loss: float
    saving: TokenSaving
    family: list[int]
    family_saving: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return {**asdict(self), "token_saving": self.saving.ratio}


def token_saving(distilled: TrainingCurve, scratch: TrainingCurve) -> TokenSaving:
    """Compare two runs by the tokens they need for the loss that the first ends with.

    Args:
        distilled: Pruning and distillation.
        scratch: A longer run from random weights, validated on the same held-out text.
    """
    loss, num_tokens = distilled.heldout_loss[-1], distilled.heldout_tokens[-1]
    points = list(zip(scratch.heldout_tokens, scratch.heldout_loss, strict=True))
    before = points[0]
    for tokens, at in points:
        if at <= loss:
            share = 1.0 if at == before[1] else (before[1] - loss) / (before[1] - at)
            reached = round(before[0] + share * (tokens - before[0]))
            return TokenSaving(loss=loss, num_tokens=num_tokens, scratch_tokens=reached, is_bound=False)
        before = (tokens, at)
    return TokenSaving(loss=loss, num_tokens=num_tokens, scratch_tokens=before[0], is_bound=True)


def collect_ablation(run: RunFolder, config: RunConfig) -> Ablation:
    """Read the finished runs.

    Args:
        run: The run's folder, with every stage of `ABLATION` and its evaluation.
        config: The run's configuration.

    Raises:
        ArtefactError: A stage is missing or cannot be read.
    """
    student = num_active_parameters(read_model_config(run.stage("prune")))
    source = num_active_parameters(read_model_config(run.stage("import")))
    _check_same_heldout(run)
    distilled = read_curve(run.stage(_BEST))
    teaching = _teaching(run, config, num_tokens=distilled.tokens[-1])
    recipes = [_recipe(run, name, student=student, teaching=teaching) for name in ABLATION]
    curves = {recipe.name: recipe.curve for recipe in recipes}
    saving = token_saving(curves[_BEST], curves[_SCRATCH])
    family = list(config.ablation.family) or [source, student]
    cost = TeacherCost(
        size=teaching.num_parameters / source,
        passes=teaching.forward_tokens / distilled.tokens[-1],
        shared=teaching.cached,
        correction=teaching.correction_tokens / distilled.tokens[-1],
    )
    return Ablation(
        recipes=recipes,
        teaching=teaching,
        pruned_loss=read_eval(run.stage("eval_pruned"))["loss"],
        saving=saving,
        family=family,
        family_saving=family_saving(family, saving.ratio, teacher=cost),
    )


def write_ablation(run: RunFolder, config: RunConfig, out: Path) -> Ablation:
    """Write the comparison: JSON, a table in Markdown, a plot.

    Args:
        run: The run's folder.
        config: The run's configuration.
        out: Where to write.

    Raises:
        ArtefactError: A stage is missing, or ``out`` cannot be written.
    """
    ablation = collect_ablation(run, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PLOT_FILE).write_bytes(look.png_bytes(plot_ablation(ablation)))
        (out / TABLE_FILE).write_text(markdown(ablation), encoding="utf-8")
        write_json(out / JSON_FILE, ablation.to_dict())
    except OSError as error:
        raise storage_error(error, out) from error
    return ablation


def rows(ablation: Ablation) -> list[tuple[str, str, str, str]]:
    """The table's cells: recipe, tokens, held-out loss, training FLOPs."""
    ranked = sorted(ablation.recipes, key=lambda recipe: recipe.loss)
    return [(r.label, fmt.count(r.num_tokens), fmt.nats(r.loss), f"{r.flops:.2e}") for r in ranked]


def summary(ablation: Ablation) -> list[str]:
    """The claim in sentences, with what it rests on."""
    saving, teaching = ablation.saving, ablation.teaching
    never = "not within" if saving.is_bound else "after"
    bound = "at least " if saving.is_bound else ""
    family = ", ".join(fmt.count(size) for size in ablation.family)
    who = "Teacher, corrected," if teaching.correction_tokens else "Teacher"
    losses = f"{who} {fmt.nats(teaching.loss)}, pruned and not retrained {fmt.nats(ablation.pruned_loss)}"
    tokens = (
        f"Token saving: {saving.text}. Pruning + distillation reaches {fmt.nats(saving.loss)} in "
        f"{fmt.count(saving.num_tokens)} tokens, the run from scratch {never} {fmt.count(saving.scratch_tokens)}."
    )
    if teaching.correction_tokens:
        tokens += f" The teacher's correction took {fmt.count(teaching.correction_tokens)} more, which are not in it."
    flops = (
        f"Training FLOPs of the family {family}, all from scratch over the smaller ones distilled: "
        f"{bound}{ablation.family_saving:.2f}x, {teaching.text} counted."
    )
    return [f"{losses} nats/token.", tokens, flops]


def markdown(ablation: Ablation) -> str:
    """The table and the claim, for a page."""
    head = "| recipe | tokens | held-out loss, nats/token | training FLOPs |\n|---|---|---|---|\n"
    body = "".join(f"| {' | '.join(row)} |\n" for row in rows(ablation))
    return head + body + "\n" + "\n".join(f"- {line}" for line in summary(ablation)) + "\n"


def print_ablation(ablation: Ablation, folder: Path, console: Console) -> None:
    """Print the table, the claim, and where the plot is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("tokens", "loss", "FLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(ablation):
        table.add_row(*row)
    console.print(table)
    for line in summary(ablation):
        console.print(line, markup=False, highlight=False)
    console.print(f"plot: {folder / PLOT_FILE}", soft_wrap=True, markup=False, highlight=False)


def plot_ablation(ablation: Ablation) -> Figure:
    """Held-out loss of every recipe against its tokens, tokens on a logarithmic axis."""
    figure = look.new_figure(5.2, "Recipes: held-out loss against tokens")
    axes = figure.subplots()
    for recipe in ablation.recipes:
        colour, marker, line = _STYLES[recipe.name]
        label = f"{recipe.label} ({fmt.nats(recipe.loss)})"
        curve = recipe.curve
        axes.plot(curve.heldout_tokens, curve.heldout_loss, line, marker=marker, color=colour, label=label)
    axes.axhline(ablation.teaching.loss, color=look.GREEN, linestyle="-.", linewidth=1.4, label="teacher")
    axes.set_xscale("log")
    look.tidy(axes, "tokens trained on", "held-out loss (nats/token)")
    look.token_axis(axes)
    look.legend(axes, columns=2)
    return figure


def _check_same_heldout(run: RunFolder) -> None:
    """The curves are comparable only over the same held-out text, which is no part of a stage's identity."""
    counts = {name: (run.meta(name) or {}).get("summary", {}).get("heldout_tokens") for name in ABLATION}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ArtefactError(
            f"the recipes were validated on different numbers of held-out tokens ({text}): run them with one "
            "distill.train.eval_tokens, under another name="
        )


def _teaching(run: RunFolder, config: RunConfig, *, num_tokens: int) -> Teaching:
    """The model that taught for so many tokens: the given one, the corrected one, or the source."""
    taught, corrected = config.distill.teacher, config.correction.enabled
    evaluated = "eval_given_teacher" if taught.path else "eval_corrected" if corrected else "eval_teacher"
    cached, forward_tokens = taught.source is TeacherSource.cached, num_tokens
    if cached:
        length = config.data.seq_length
        sequences = num_whole_sequences(load_summary(run.stage("data")).train.num_tokens, length)
        forward_tokens = min(num_tokens, sequences * length)
    folder = Path(taught.path) if taught.path else run.stage("correct" if corrected else "import")
    return Teaching(
        loss=float(read_eval(run.stage(evaluated))["loss"]),
        num_parameters=num_active_parameters(read_model_config(folder)),
        forward_tokens=forward_tokens,
        cached=cached,
        correction_tokens=read_curve(run.stage("correct")).tokens[-1] if corrected else 0,
    )


def _recipe(run: RunFolder, name: str, *, student: int, teaching: Teaching) -> Recipe:
    training, curve = TRAININGS[name], read_curve(run.stage(name))
    num_tokens = curve.tokens[-1]
    flops = six_nd(student, num_tokens) + (teaching.flops if training.distills else 0.0)
    evaluated = "eval_distilled" if name == _BEST else f"eval_{name}"
    loss = float(read_eval(run.stage(evaluated))["loss"])
    return Recipe(name=name, label=training.label, num_tokens=num_tokens, loss=loss, flops=flops, curve=curve)
