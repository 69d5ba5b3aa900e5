"""The typer application, and the one place where errors become a line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback

import typer

from pyqlora.cli import bench, chat, doctor, estimate, finetune, merge

app = typer.Typer(
    name="pyqlora",
    help="QLoRA fine-tuning in 4 bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
COMMANDS = {  # in a line that no terminal cuts off; a command's own --help says more
    finetune.finetune: "Train a LoRA adapter for MODEL on DATA; without arguments, a demo.",
    chat.chat: "Chat with MODEL in 4 bits, under any of the adapters.",
    merge.merge: "Write MODEL with ADAPTER merged into it, as a 16-bit model.",
    estimate.estimate: "Print the memory that fine-tuning MODEL needs, and what fits.",
    bench.bench: "Time pyqlora beside bitsandbytes, PEFT and dense torch.",
    doctor.doctor: "Check this installation, or an adapter.",
}
for command, summary in COMMANDS.items():
    app.command(command.__name__, short_help=summary)(command)

INTERRUPTED = 130


def run(arguments: list[str]) -> int:
    """Run a command line; every error is one line on stderr, with --debug after its traceback."""
    try:
        return app(arguments, prog_name="pyqlora", standalone_mode=False) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except typer.Abort:
        return INTERRUPTED
    except typer.Exit as exit:
        return exit.exit_code
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: Exception) -> str:
    """The message of an error, on one line and in words."""
    if hasattr(error, "format_message"):  # typer's usage errors
        return f"{error.format_message()} (--help lists the options)"
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
        where = getattr(error, "filename", None)
        return f"the disk is full{f' while writing {where}' if where else ''}; nothing was left half-written"
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (unexpected; --debug shows where)"
