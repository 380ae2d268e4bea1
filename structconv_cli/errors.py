"""The exceptions that structconv raises for its users.

Every message names the layer or file, what was found, what was expected, and the remedy.
The command line prints it as one paragraph, without a traceback, and exits with status 1.
"""


class StructconvError(Exception):
    """Root of all errors that a user can act on."""


class ArchitectureError(StructconvError):
    """The model's architecture cannot be built, or does not run on the given input."""


class CheckpointError(StructconvError):
    """A checkpoint cannot be read, or does not fit its architecture."""


class DataError(StructconvError):
    """A dataset cannot be read, or does not fit the model."""


class NoValidationError(DataError):
    """A dataset has no validation part, and no fraction to split off is given."""


class TaskError(StructconvError):
    """A task does not fit the model or the data, or a hook of the user's own fails."""


class StructureError(StructconvError, ValueError):
    """A structure is impossible, or does not belong to the tensor it is applied to.

    Also a ValueError, so that reading a plan reports the place of an impossible structure.
    """


class PlanError(StructconvError):
    """A plan is malformed, or does not fit the model."""


class TrainingError(StructconvError):
    """Fine-tuning cannot go on."""


class OnnxError(StructconvError):
    """An ONNX graph cannot be exported, lowered or run."""


class RunFolderError(StructconvError):
    """A run folder is missing, incomplete, in the way, or cannot be written."""


class BenchmarkError(StructconvError):
    """A benchmark cannot be run as asked."""


def beneath(error: BaseException) -> BaseException:
    """What a user's hook failed with; any other error is itself."""
    cause = error.__cause__
    return cause if isinstance(error, TaskError) and cause is not None else error


def one_line(error: BaseException) -> str:
    """Put another library's message on one line; its class's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
