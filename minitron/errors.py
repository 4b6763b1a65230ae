"""Errors a user can meet: one line each, with what is wrong, the values, and what to change.

The command line prints ``error: <message>`` without a traceback for these and exits with the class's
``exit_code``. Anything else that escapes is a bug of ours and keeps its traceback (exit code 1).
"""


class MinitronError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 2


class ConfigError(MinitronError):
    """A key, a value or a combination of values in the configuration is wrong."""

    exit_code = 3


class LayoutError(ConfigError):
    """Sizes that do not divide or multiply; the message prints every factor."""

    exit_code = 3


class ModelError(MinitronError):
    """A model folder or file that cannot be read, is incomplete, or is of an unknown architecture."""

    exit_code = 4


class DataError(MinitronError):
    """Text that is missing, unreadable, or too short for what was asked."""

    exit_code = 5


class CheckpointError(MinitronError):
    """A checkpoint that is missing a tensor, has one too many, or has another shape."""

    exit_code = 6


class PruneError(MinitronError):
    """A target shape or a prune spec that does not fit the source model."""

    exit_code = 7


class ArtefactError(MinitronError):
    """A run folder or a stage's artefact that belongs to something else, or cannot be written."""

    exit_code = 8


class NumericsError(MinitronError):
    """A loss or gradient that is not finite, or an exported model that does not reproduce its source."""

    exit_code = 9


class PlatformError(MinitronError):
    """The machine or an installed package cannot do what was asked for."""

    exit_code = 10


class StoppedError(MinitronError):
    """The job was asked to stop and has: what it had is saved, and the same command goes on from there.

    Its exit code asks for another start (sysexits' EX_TEMPFAIL); a SLURM job that ends with it requeues itself.
    """

    exit_code = 75
