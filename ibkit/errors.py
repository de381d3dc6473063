"""Errors a user can do something about. Each message is one sentence: what is wrong, where, what to do."""


class IbkitError(Exception):
    """Base of all of them; the command line prints it without a traceback and exits with 2."""


class ParameterError(IbkitError):
    """A parameter is unknown, of the wrong type, or out of its range."""


class ArtifactError(IbkitError):
    """A run folder, or a file in it, is in use, incomplete, altered, or cannot be written."""


class PhotoError(IbkitError):
    """A photo, or a folder of photos, cannot be used."""


class ModelError(IbkitError):
    """A model cannot be found, loaded, or used for what was asked."""


class ScoreError(IbkitError):
    """A score cannot be computed, or is not a finite number."""


class TrainingError(IbkitError):
    """Training cannot go on: a loss, a gradient or a reward is not a finite number."""


class StudyError(IbkitError):
    """Items, ratings or votes of a human study cannot be used."""
