"""The exceptions: every one is a `TQError`, and also the built-in exception that a caller would expect."""


class TQError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(TQError, ValueError):
    """A shape that does not fit: a block that does not divide, a rank too large, an array of the wrong dimensions."""


class NonFiniteError(TQError, ValueError):
    """A weight that holds NaN or an infinity."""


class MomentError(TQError, ValueError):
    """A second moment that is none: not symmetric, with a negative diagonal, of no tokens."""


class LabelError(TQError, ValueError):
    """A label that is neither in the vocabulary nor the ignored index."""


class DtypeError(TQError, TypeError):
    """A dtype that is not handled."""


class ConfigError(TQError, ValueError):
    """A configuration that cannot be followed: unknown keys, a pattern that matches nothing, a newer format."""


class CheckpointError(TQError, ValueError):
    """A checkpoint that cannot be read: truncated, a lying header, a missing tensor, not safetensors."""


class DestinationError(TQError, FileExistsError):
    """A destination that exists and is not empty."""


class StorageError(TQError, OSError):
    """The operating system refused: `errno` and `filename` say what and where."""


class ConvergenceError(TQError, ArithmeticError):
    """A numerical routine that did not converge."""


class TextError(TQError, ValueError):
    """A text that cannot be evaluated: empty, too short, not UTF-8, a passage without a last word."""


class MissingDependencyError(TQError, ImportError):
    """An optional package that the called function needs is not installed: the message says how to get it."""
