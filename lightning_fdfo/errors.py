"""The one exception that means: the user can mend this."""


class ConfigurationError(ValueError):
    """A setting, a prompt file, a plugin or a model folder that cannot work.

    The message says what was expected, what came, and how to mend it. On the command line it is printed in one
    line, without a traceback, and the exit code is 2.
    """
