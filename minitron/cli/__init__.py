"""The command line: verbs, and the only place that wires the stages' parts together."""
