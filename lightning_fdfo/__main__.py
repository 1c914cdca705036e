"""The command `lightning-fdfo`, also `python -m lightning_fdfo`: imports what its first word needs, and no more."""

import sys
from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: of the command line; None takes the process's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["rewards"]:
        from lightning_fdfo import reward_commands

        raise SystemExit(reward_commands.main(words[1:]))
    if words[:1] == ["report"]:
        from lightning_fdfo.report import command

        raise SystemExit(_in_one_line(command.main, words[1:]))
    if words[:1] == ["export"]:
        from lightning_fdfo.export import command as export_command

        raise SystemExit(_in_one_line(export_command.main, words[1:]))
    if words[:1] == ["serve-reward"]:
        raise SystemExit(_serve_reward(words[1:]))
    if words[:1] == ["doctor"]:
        from lightning_fdfo import cli, doctor

        raise SystemExit(cli.main(lambda: doctor.main(words[1:])))
    sys.argv = [sys.argv[0], *words]  # Lightning starts the processes of other devices from it
    from lightning_fdfo import cli

    cli.main()


def _in_one_line(command: Callable[[Sequence[str]], None], words: Sequence[str]) -> int:
    """Runs a command; what the user can mend ends in one line on standard error, and exit code 2."""
    from lightning_fdfo.errors import ConfigurationError

    try:
        command(words)
    except ConfigurationError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _serve_reward(words: Sequence[str]) -> int:
    from lightning_fdfo.errors import ConfigurationError

    try:
        from lightning_fdfo.remote import serve_command
    except ConfigurationError as error:  # the extra is not installed
        print(f"error: {error}", file=sys.stderr)
        return 2
    return serve_command.main(words)


if __name__ == "__main__":
    main()
