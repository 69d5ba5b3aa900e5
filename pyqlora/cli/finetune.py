"""`pyqlora finetune`: the options of the command line, and what a run shows on the terminal."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

Text = str | None
Whole = int | None
Number = float | None


def finetune(
    model: Annotated[
        Text, typer.Argument(help="Hugging Face directory or id, or a .gguf file; none: the demo.")
    ] = None,
    data: Annotated[Text, typer.Argument(help="A .jsonl, .json, .csv or .txt file.")] = None,
    out: Annotated[Text, typer.Option("-o", "--out", help="Directory to write to.")] = None,
    r: Annotated[Whole, typer.Option("--r", help="Rank of the adapter [16].")] = None,
    alpha: Annotated[Whole, typer.Option("--alpha", help="Its scale is alpha / r [32].")] = None,
    targets: Annotated[Text, typer.Option(help="Modules to adapt: names with commas, a regex, or all-linear.")] = None,
    lr: Annotated[Number, typer.Option("--lr", help="Peak learning rate [2e-4].")] = None,
    steps: Annotated[Whole, typer.Option(help="Length of the run in optimizer steps.")] = None,
    epochs: Annotated[Number, typer.Option(help="Length in passes over the data [1].")] = None,
    minutes: Annotated[Number, typer.Option(help="Length in time; the steps are timed first.")] = None,
    max_length: Annotated[Whole, typer.Option(help="Tokens of a sample at most; longer ones are cut [512].")] = None,
    batch_size: Annotated[Whole, typer.Option(help="Samples in a forward pass [4].")] = None,
    grad_accum: Annotated[Whole, typer.Option(help="Forward passes in a step [4].")] = None,
    val: Annotated[Number, typer.Option(help="Samples to hold out: a share below 1, or a number [0.05].")] = None,
    seed: Annotated[Whole, typer.Option(help="Of adapter, order and split; repeats a run bit for bit [0].")] = None,
    optim: Annotated[Text, typer.Option(help="paged_adamw_8bit, paged_adamw_32bit or adamw_torch.")] = None,
    resume: Annotated[Text, typer.Option(help="Continue the interrupted run in this directory.")] = None,
    config: Annotated[Text, typer.Option(help="YAML file of options; the command line's come first.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> int:
    """Fine-tune MODEL on DATA in 4 bits, and write a LoRA adapter; without arguments, a demo of under five minutes."""
    given = {
        name: value
        for name, value in locals().items()
        if name not in ("resume", "config", "debug") and value is not None
    }
    from pyqlora.cli.screen import RichScreen
    from pyqlora.finetune.quiet import quiet
    from pyqlora.finetune.run import finetune as run

    options = resolve(given, config, resume)
    quiet()
    screen = RichScreen()
    result = run(options, screen, resume)
    if result.interrupted:
        screen.say(f"stopped after step {result.done} of {result.steps}; a checkpoint is saved. To continue:")
        screen.command(f"pyqlora finetune --resume {shlex.quote(str(result.out))}")
        return 130
    screen.result(result)
    return 0


def resolve(given: dict, config: str | None, resume: str | None):
    """The options of a run: defaults, under a YAML file's, under the command line's; a resumed run has its own.

    Raises:
        ValueError: MODEL or DATA is missing, or options are given that a resumed run cannot change.
    """
    from pyqlora.finetune import checkpoint, demo
    from pyqlora.finetune.options import CONFIG_FILE, Options, flag, read_yaml

    if resume is not None:
        if given or config is not None:
            extra = flag(next(iter(given))) if given else "--config"
            raise ValueError(f"--resume continues a run as it was begun, so {extra} cannot be given with it")
        return Options(**read_yaml(checkpoint.find(resume) / CONFIG_FILE))
    values = read_yaml(config) if config is not None else {}
    if config is not None:
        values.pop("out", None)  # a repeated run goes elsewhere
    if {"steps", "epochs", "minutes"} & given.keys():
        values = {name: value for name, value in values.items() if name not in ("steps", "epochs", "minutes")}
    values |= given
    if "model" in values and "data" not in values:
        raise ValueError("DATA is missing: pyqlora finetune MODEL DATA -o OUT (without both, the demo)")
    if "data" not in values:
        settings = demo.SETTINGS
        if {"epochs", "minutes"} & values.keys():
            settings = {name: value for name, value in settings.items() if name != "steps"}
        values = {"model": demo.find_model(), "data": demo.NAME, **settings, **values}
    return Options(**values)
