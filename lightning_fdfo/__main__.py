"""The command `lightning-fdfo`, also `python -m lightning_fdfo`: imports only what the command that was named needs."""

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from lightning_fdfo.commands import exit_code, kept_help
from lightning_fdfo.errors import ConfigurationError

SUMMARIES = {
    "fit": "train a model: --config FILE",
    "validate": "score the validation prompts, by the base model or by --ckpt_path",
    "test": "compare a trained model with its base: means, win rates, diversity",
    "predict": "generate images of prompts",
    "doctor": "try all that a configuration needs, before hours are spent",
    "rewards": "list the installed rewards; score a folder of images; check a plugin",
    "report": "write one HTML page about a run",
    "export": "put what a run has trained into a folder or on the hub",
    "serve-reward": "serve a reward to other environments or machines",
}
"""All commands, in the order in which they are listed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; an error that can be fixed ends in one line, see commands/exit_code.py.

    Args:
        arguments: of the command line; None takes the process's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path and not sys.flags.safe_path:  # a reward's module may lie here,
        sys.path.append(os.getcwd())  # and must not take a library's place
    if not words or words[0] in ("-h", "--help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"lightning-fdfo {version('lightning-fdfo')}")
        raise SystemExit(0)
    exit_code.run(lambda: _check_command(words[0]))
    command = COMMANDS.get(words[0])
    if command is not None:
        raise SystemExit(exit_code.run(lambda: command(words[1:])))
    sys.argv = [sys.argv[0], *words]  # Lightning starts the processes of other devices from it
    exit_code.run(_lightning)


def overview() -> str:
    """All commands, a line each."""
    width = max(map(len, SUMMARIES)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in SUMMARIES.items()]
    head = "usage: lightning-fdfo COMMAND …\n\nPost-trains text-to-image flow models with rewards.\n\ncommands:"
    foot = "lightning-fdfo COMMAND --help explains a command's options; --version prints the version."
    return "\n".join([head, *lines, "", foot])


def _check_command(word: str) -> None:
    """Raises ConfigurationError for a command that there is not; options may come first, as Lightning has it."""
    if word in SUMMARIES or word.startswith("-"):
        return
    near = get_close_matches(word, SUMMARIES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(SUMMARIES)}"
    raise ConfigurationError(f"unknown command {word!r}: {hint}")


def _lightning() -> None:
    text = kept_help.find(sys.argv[1:])
    if text is not None:
        print(text, end="")
        raise SystemExit(0)
    from lightning_fdfo.commands import cli

    cli.main()


def _rewards(words: Sequence[str]) -> int:
    from lightning_fdfo.commands import rewards as reward_commands

    return reward_commands.main(words)


def _report(words: Sequence[str]) -> int:
    from lightning_fdfo.commands import report as command

    command.main(words)
    return 0


def _export(words: Sequence[str]) -> int:
    from lightning_fdfo.commands import export as command

    command.main(words)
    return 0


def _serve_reward(words: Sequence[str]) -> int:
    from lightning_fdfo.commands import serve_reward as serve_command

    return serve_command.main(words)


def _doctor(words: Sequence[str]) -> int:
    from lightning_fdfo.commands import cli, doctor

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
