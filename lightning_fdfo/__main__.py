"""The command `lightning-fdfo`, also `python -m lightning_fdfo`: imports what its first word needs, and no more."""

import sys
from collections.abc import Sequence


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

        raise SystemExit(command.main(words[1:]))
    if words[:1] == ["doctor"]:
        from lightning_fdfo import cli, doctor

        raise SystemExit(cli.main(lambda: doctor.main(words[1:])))
    sys.argv = [sys.argv[0], *words]  # Lightning starts the processes of other devices from it
    from lightning_fdfo import cli

    cli.main()


if __name__ == "__main__":
    main()
