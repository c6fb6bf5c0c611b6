"""The errors a user can meet. Each message says what, where, got, wanted and the way out."""


class AsvrError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(AsvrError):
    """A setting is unknown, impossible, or does not fit another setting."""


class DataError(AsvrError):
    """A data file, sample or image is missing, corrupt or of the wrong form."""


class CheckpointError(AsvrError):
    """A checkpoint is missing, incomplete, damaged or belongs to another model."""


class ConversionError(AsvrError):
    """A conversion to or from another format would be incomplete or wrong."""


class LaunchError(AsvrError):
    """Ranks could not be started, or one of them failed."""
