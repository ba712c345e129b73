"""The command line: fastinterp train | eval | attack | explain | report | info."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 or 2 for an error, 130 after Ctrl-C."""
    from fastinterp.cli import attack, explain, info, report, train
    from fastinterp.cli import eval as eval_command
    from fastinterp.training.distributed import RankFailed, World

    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": train,
        "eval": eval_command,
        "attack": attack,
        "explain": explain,
        "report": report,
        "info": info,
    }
    parser = ArgumentParser(prog="fastinterp", description=__doc__)
    subparsers = parser.add_subcommands(dest="command")
    try:
        for name, command in commands.items():
            subparsers.add_subcommand(name, command.parser(argv), help=command.HELP)
        arguments = parser.parse_args(argv)
        return commands[arguments.command].run(arguments[arguments.command])
    except KeyboardInterrupt:
        print("fastinterp: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if "--traceback" in argv:
            raise
        if World.from_environment().rank == 0 or isinstance(error, RankFailed):
            print(f"fastinterp: error: {error}", file=sys.stderr)
        return 1


def add_common(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        type=str | None,
        default=None,
        help="folder of the data files (default: $FASTINTERP_DATA, else a cache folder)",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch missing data files with torchvision"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads; 0: torch's choice, of which train takes as many as are fastest",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def set_up_device(device: str, threads: int):
    """The torch device named on the command line, with the thread count set."""
    import torch

    if threads < 0:
        raise ValueError(f"--threads must be >= 0, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return chosen
