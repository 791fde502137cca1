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

import re


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


REDACTED = "***"
_URL = re.compile(r"[A-Za-z][\w+.-]*://\S+")
# Up to the last @ of the host; the secret keys of S3 may have slashes, a port may not be taken for one.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/]*@|[^\s/@:]+:(?!\d+(?:/|$))[^\s@]*@)")
# Without a scheme, as file systems write paths: `/key:secret@bucket/a`.
_KEY_PAIR = re.compile(r"[^\s/@:'\"]+:[^\s/@'\"]+@")
# Parameters of file systems that are no secrets; any other value of a URL's query may be one.
_PUBLIC_PARAMETERS = {"region", "scheme", "endpoint_override", "anonymous", "versionId"}
# Of a message around the URL.
_PUNCTUATION = "'\"`)],.:;"


def redacted(text: str) -> str:
    """Return a message with *** in place of users, passwords and query values of the URLs in it.

    >>> redacted("'https://me:word@host/a?token=x' can't be read: No such file '/key:secret@bucket/a'")
    "'https://***@host/a?token=***' can't be read: No such file '/***@bucket/a'"
    """
    return _KEY_PAIR.sub(f"{REDACTED}@", _URL.sub(_redacted_match, text))


def _redacted_match(match: re.Match[str]) -> str:
    url = match[0].rstrip(_PUNCTUATION)
    return redacted_url(url) + match[0][len(url) :]


def redacted_url(text: str) -> str:
    """Return a URL with *** in place of its user, password and query values; any other text unchanged.

    >>> redacted_url("s3://key:se/cret@bucket/a?region=eu-central-1&X-Amz-Signature=1f")
    's3://***@bucket/a?region=eu-central-1&X-Amz-Signature=***'
    """
    if "://" not in text:
        return text
    url, mark, query = _USER_INFO.sub(f"{REDACTED}@", text).partition("?")
    return url + mark + "&".join(_redacted_parameter(parameter) for parameter in query.split("&"))


def _redacted_parameter(text: str) -> str:
    name, equals, value = text.partition("=")
    if not text or (name in _PUBLIC_PARAMETERS and "@" not in value):
        return text
    return f"{name}={REDACTED}" if equals else REDACTED


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, without secrets; with its type if the message alone says nothing.

    >>> one_line(ValueError("no such file:\\n  a.npy"))
    'no such file: a.npy'
    >>> one_line(KeyError("x")), one_line(AssertionError())
    ("KeyError: 'x'", 'AssertionError')
    """
    message, name = redacted(" ".join(str(error).split())), type(error).__name__
    if isinstance(error, KeyError) and message:
        return f"{name}: {message}"
    return message or name
