"""The stages of the whole line, in order, as the tests expect them."""

LINE = [
    "import",
    "data",
    "eval_teacher",
    "score",
    "prune",
    "verify",
    "eval_pruned",
    "distill",
    "eval_distilled",
    "baseline",
    "eval_baseline",
    "export",
    "report",
]
