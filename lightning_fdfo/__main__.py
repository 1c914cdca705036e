"""The command `lightning-fdfo`, also `python -m lightning_fdfo`: imports what its first word needs, and no more."""

import os
import sys
from collections.abc import Callable, Sequence

from lightning_fdfo import exit_code


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; an error that can be mended ends in one line, see exit_code.py.

    Args:
        arguments: of the command line; None takes the process's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path and not sys.flags.safe_path:  # as `python -m`: a reward's module may lie here
        sys.path.insert(0, os.getcwd())
    command = COMMANDS.get(words[0]) if words else None
    if command is not None:
        raise SystemExit(exit_code.run(lambda: command(words[1:])))
    sys.argv = [sys.argv[0], *words]  # Lightning starts the processes of other devices from it
    exit_code.run(_lightning)


def _lightning() -> None:
    from lightning_fdfo import cli

    cli.main()


def _rewards(words: Sequence[str]) -> int:
    from lightning_fdfo import reward_commands

    return reward_commands.main(words)


def _report(words: Sequence[str]) -> int:
    from lightning_fdfo.report import command

    command.main(words)
    return 0


def _export(words: Sequence[str]) -> int:
    from lightning_fdfo.export import command

    command.main(words)
    return 0


def _serve_reward(words: Sequence[str]) -> int:
    from lightning_fdfo.remote import serve_command

    return serve_command.main(words)


def _doctor(words: Sequence[str]) -> int:
    from lightning_fdfo import cli, doctor

    code: int = cli.main(lambda: doctor.main(words))
    return code


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": _doctor,
    "export": _export,
    "report": _report,
    "rewards": _rewards,
    "serve-reward": _serve_reward,
}
"""Those that are not Lightning's."""


if __name__ == "__main__":
    main()
