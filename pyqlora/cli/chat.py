"""`pyqlora chat`: talk to a model in 4 bits, and swap the adapters on it while talking."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = """\
/adapter NAME  answer with that adapter from now on; without a name: which there are
/base          answer the last message once more without an adapter, to compare
/clear         forget the conversation
/quit          leave (as Ctrl-D does); Ctrl-C stops an answer"""
COMMANDS = ("/adapter", "/base", "/clear", "/help", "/quit")


def chat(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory or id, a .gguf file, or an adapter's directory for its base.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Directory of an adapter, or NAME=DIRECTORY; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and leave.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Complete text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Chat with MODEL in 4 bits, under any of the adapters; /help lists what can be typed beside messages."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if prompt is not None and not prompt.strip():
        raise ValueError("--prompt is empty; leave it out to chat")
    from pyqlora.cli.conversation import Conversation
    from pyqlora.finetune.quiet import quiet

    quiet()
    loaded, tokenizer, names = load(model, adapter or [])
    talk = Conversation(loaded, tokenizer, names, plain, max_new_tokens, temperature, top_p, seed)
    if prompt is not None:
        speed = talk.answer(prompt, write)
        print()
        print(speed, file=sys.stderr)
        return
    interact(talk)


def load(model: str, adapters: list[str]) -> tuple[Any, Any, list[str]]:
    """The model with its adapters, the tokenizer, and the adapters' names.

    Raises:
        ValueError, FileNotFoundError: no model, no adapter, one that does not fit, or a name that occurs twice.
    """
    from pyqlora.cli.merge import tokenizer_of
    from pyqlora.finetune.load import Source, load_lora, pick_device

    config = Path(model) / "adapter_config.json"
    if config.is_file():
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{config}: names no base model; give it: pyqlora chat MODEL --adapter {model}")
        model, adapters = base, [model, *adapters]
    paths: dict[str, str] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = Path(given).resolve().name.replace(".", "_"), given
        if name in paths or name == "base":
            raise ValueError(f"--adapter {given}: the name {name!r} is taken; give another: NAME={path}")
        paths[name] = path
    source = Source(model)
    tokenizer = tokenizer_of(next(iter(paths.values())), source) if paths else source.tokenizer()
    loaded = source.base(*pick_device())
    for name, path in paths.items():
        loaded = load_lora(loaded, path, name)
    return loaded, tokenizer, list(paths)


def interact(talk: Any) -> None:
    """Read lines until the end: messages and commands."""
    terminal = sys.stdin.isatty()
    if terminal:
        edit_lines(talk)
        print(f"{described(talk)}; /help lists the commands")
    while True:
        try:
            line = input(f"{talk.active or 'base'}> ") if terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if not line and not terminal:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            handle(talk, line.strip())


def handle(talk: Any, line: str) -> None:
    """Run a command, or answer a message; a mistake is one line."""
    command, _, argument = line.partition(" ")
    try:
        if not line.startswith("/"):
            print(f"\n{dim(talk.answer(line, write))}")
        elif command == "/adapter":
            if argument.strip():
                talk.use(argument.strip())
            print(described(talk))
        elif command == "/base":
            print(f"\n{dim(talk.answer_as_base(write))}")
        elif command == "/clear":
            talk.clear()
        elif command == "/help":
            print(HELP)
        else:
            raise ValueError(f"{command}: no such command, expected one of {', '.join(COMMANDS)}")
    except KeyboardInterrupt:
        print("\n(stopped)")
    except ValueError as error:
        print(f"error: {error}")


def described(talk: Any) -> str:
    """Which adapters there are, the one in use in brackets."""
    names = [f"[{name}]" if name == (talk.active or "base") else name for name in (*talk.names, "base")]
    return f"adapters: {', '.join(names)}"


def write(text: str) -> None:
    """Show a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def dim(text: str) -> str:
    """The text in the terminal's faint style."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def edit_lines(talk: Any) -> None:
    """History and editing of the input line; Tab completes commands and adapters."""
    with contextlib.suppress(ImportError):  # Python can be built without it
        import readline

        def complete(text: str, index: int) -> str | None:
            line = readline.get_line_buffer()
            words = (*talk.names, "base") if line.startswith("/adapter ") else COMMANDS if line.startswith("/") else ()
            fitting = [word for word in words if word.startswith(text)]
            return fitting[index] if index < len(fitting) else None

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")
