"""The exceptions. Each is a `TQError` and the built-in exception of its kind."""


class TQError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(TQError, ValueError):
    """A shape that does not fit: a block that does not divide, a rank too large, an array of the wrong dimensions."""


class NonFiniteError(TQError, ValueError):
    """A weight that holds NaN or an infinity, or a factor beyond the range of float32."""


class MomentError(TQError, ValueError):
    """An invalid second moment: not symmetric, with a negative diagonal, or over no tokens."""


class LabelError(TQError, ValueError):
    """A label that is neither in the vocabulary nor the ignored index."""


class DtypeError(TQError, TypeError):
    """An unsupported dtype."""


class ConfigError(TQError, ValueError):
    """An invalid argument or configuration: an unknown key, a pattern without a match, a newer format."""


class CheckpointError(TQError, ValueError):
    """An unreadable checkpoint: truncated, a wrong header, a missing tensor, not safetensors."""


class DestinationError(TQError, FileExistsError):
    """An output folder that exists and is not empty, or that another run is writing."""


class StorageError(TQError, OSError):
    """An error of the operating system; `errno` and `filename` have its code and the path."""


class ReadOnlyError(TQError, RuntimeError):
    """An attempt to write the dense weight of a compressed module, which is the product of its factors."""

    module: object = None
    """The compressed module."""


class ConvergenceError(TQError, ArithmeticError):
    """A numerical routine that did not converge."""


class TextError(TQError, ValueError):
    """An invalid text: empty, too short, not UTF-8, a file name in place of a text, a passage without a last word."""


class MissingDependencyError(TQError, ImportError):
    """A missing optional package; the message has the command that installs it."""
