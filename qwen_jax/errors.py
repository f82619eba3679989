"""The one exception a user's mistake raises: the command line prints it as a single line and exits with 2."""


class QwenJaxError(ValueError):
    """What was wrong, where, and what to do about it, in one line."""


class CheckpointError(QwenJaxError):
    """A checkpoint folder that cannot be read as what it claims to be."""


class ConfigError(CheckpointError):
    """A config.json that is broken, of another model, or asks for something this code does not do."""
