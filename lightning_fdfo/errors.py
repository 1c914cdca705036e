"""Four exceptions: a mistake that the user can fix; a reward failed; training diverged; a signal ends the process."""


class ConfigurationError(ValueError):
    """A setting, a prompt file, a plugin or a model folder that cannot work.

    The message says what was expected, what came, and how to fix it. On the command line it is printed in one
    line, without a traceback, and the exit code is 2.
    """


class RewardError(RuntimeError):
    """A reward raised an exception, or gave something that is no score.

    The message names the reward and the distribution that it comes from. It is never turned into a score.
    """

    row: int | None = None
    """Which image of the batch it failed on, if that is known."""


class DivergenceError(RuntimeError):
    """Velocities, images, weights, or the gradients of several updates in a row are not finite.

    The message names prompt and step, tensor, or the last checkpoint. On the command line it is printed in one line,
    without a traceback, and the exit code is 1.
    """


class StoppedError(SystemExit):
    """A signal, or another process's error, ends this one; its reason has been printed, and `code` is the exit code.

    It can rise in the middle of foreign code, a reward's say, and is no fault of that code's: whoever catches
    BaseException lets it pass.
    """
