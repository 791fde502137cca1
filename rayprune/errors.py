"""The exceptions of rayprune.

    RaypruneError
    ├── ConfigError (ValueError)        a setting, argument or option that cannot work
    ├── DataError (ValueError)          data that cannot be read, or does not fit the settings
    │   └── UnreadableImage             one image that cannot be decoded
    ├── RunFolderError (ValueError)     files of a run that are damaged, in use, or another run's
    ├── ClusterError (ValueError)       no Ray cluster, or one without the resources
    ├── UsageError (RuntimeError)       calls in an order that cannot work
    ├── TrainingStopped (RuntimeError)  training ended for a reason that a restart would not change
    ├── TrainingPaused (RuntimeError)   the run was paused and has saved its state
    ├── TrainingFailed (RuntimeError)   any other error that ended training
    └── ScoringError (RuntimeError)     errors in workers and the ScoreActor; Ray restarts the workers
        ├── StaleGeneration             a call of workers that have been replaced
        ├── CheckpointPending           a restarted ScoreActor needs a checkpoint that is still being written
        ├── PlanMismatch                the stream delivered other rows than the plan
        └── ObservationsLost            observations were lost with the ScoreActor

Every message of the first five is one line that names the cause and the cure.
"""

from __future__ import annotations


class RaypruneError(Exception):
    """The base of all exceptions that rayprune raises on purpose."""


class ConfigError(RaypruneError, ValueError):
    """A setting, argument or option that cannot work."""


class DataError(RaypruneError, ValueError):
    """Data that cannot be read, or does not fit the settings."""


class UnreadableImage(DataError):
    """An image that cannot be decoded."""


class RunFolderError(RaypruneError, ValueError):
    """Files of a run, sweep or comparison that are damaged, in use, or belong to another one."""


class ClusterError(RaypruneError, ValueError):
    """No Ray cluster answers, or it cannot place the workers."""


class UsageError(RaypruneError, RuntimeError):
    """Calls in an order that cannot work."""


class TrainingStopped(RaypruneError, RuntimeError):
    """Training ended for a reason that a restart would not change.

    Args:
        message: one line with the cure.
        on_all_ranks: whether every rank raises it at the same point, so that all can leave cleanly.
    """

    def __init__(self, message: str, on_all_ranks: bool = True) -> None:
        super().__init__(message, on_all_ranks)
        self.message, self.on_all_ranks = message, on_all_ranks

    def __str__(self) -> str:
        return self.message


class TrainingPaused(RaypruneError, RuntimeError):
    """The run was paused and has saved its state; run the same command to continue."""


class TrainingFailed(RaypruneError, RuntimeError):
    """Training ended with an error that is not the configuration's; `__cause__` has the rest."""


class ScoringError(RaypruneError, RuntimeError):
    """An error in a worker or in the ScoreActor; Ray restarts the workers."""


class StaleGeneration(ScoringError):
    """A call of workers that have been replaced."""


class CheckpointPending(ScoringError):
    """A restarted ScoreActor needs a checkpoint that is still being written; call again."""


class PlanMismatch(ScoringError):
    """The stream delivered other rows than the plan."""


class ObservationsLost(ScoringError):
    """Observations were lost with the ScoreActor; the workers restart from the last checkpoint."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, with its type if the message alone says nothing.

    >>> one_line(ValueError("no such file:\\n  a.npy"))
    'no such file: a.npy'
    >>> one_line(KeyError("x")), one_line(AssertionError())
    ("KeyError: 'x'", 'AssertionError')
    """
    message, name = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, KeyError) and message:
        return f"{name}: {message}"
    return message or name
