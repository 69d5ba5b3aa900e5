"""What a run shows: the plan, a live bar (plain lines where the output is no terminal), and the result."""

from __future__ import annotations

import shlex
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pyqlora.finetune import demo
from pyqlora.finetune.evaluate import character_accuracy, perplexity
from pyqlora.finetune.load import pick_device
from pyqlora.finetune.loop import Record
from pyqlora.finetune.memory import used_bytes
from pyqlora.finetune.plan import Plan, duration, size
from pyqlora.finetune.report import GENERATIONS
from pyqlora.finetune.run import Result

PLAIN_SECONDS = 10  # between two lines where there is no bar
SHOWN_CHARACTERS = 160
SPEED_STEPS = 20  # that the time left is judged by


class RichScreen:
    """A terminal."""

    def __init__(self):
        self.console = Console(highlight=False, soft_wrap=True)
        self.device, _ = pick_device()
        self.progress: Progress | None = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(escape(text))

    def command(self, text: str) -> None:
        """A command to type."""
        self.console.print(f"  [bold]{escape(text)}[/bold]")

    def plan(self, plan: Plan) -> None:
        """The plan, with the tokens that are trained marked in one sample."""
        rows(self.console, plan.rows)
        sample = Text()
        for text, trained in plan.sample:
            plain = not self.console.is_terminal
            sample.append(f"[[{text}]]" if trained and plain else text, "bold green" if trained else "dim")
        note = "trained tokens in " + ("green" if self.console.is_terminal else "[[ ]]")
        self.console.print(f"one sample, {escape(note)}:")
        self.console.print(sample)
        for warning in plan.warnings:
            self.console.print(f"[bold yellow]warning:[/bold yellow] {escape(warning)}")
        self.console.print()

    def start(self, done: int, steps: int) -> None:
        """Open the bar."""
        self.steps, self.recent, self.printed_at = steps, [], time.monotonic()
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self.task = self.progress.add_task("", total=steps, completed=done, numbers="")
            self.progress.start()

    def step(self, record: Record) -> None:
        """Update the bar, or print a line every few seconds."""
        self.recent = [*self.recent, record][-SPEED_STEPS:]
        seconds = sum(r.seconds for r in self.recent)
        left = (self.steps - record.step) * seconds / len(self.recent)
        numbers = (
            f"loss {record.loss:.3f}  lr {record.lr:.1e}  {sum(r.tokens for r in self.recent) / seconds:,.0f} tok/s  "
            f"{size(used_bytes(self.device))}  {duration(left)} left"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=record.step, numbers=numbers)
        elif time.monotonic() - self.printed_at > PLAIN_SECONDS or record.step in (1, self.steps):
            self.printed_at = time.monotonic()
            self.say(f"step {record.step}/{self.steps}  {numbers}")

    def stop(self) -> None:
        """Close the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def result(self, result: Result) -> None:
        """Before and after, paths, and what to type next."""
        before, after, probes = result.before, result.after, result.probes
        table = Table("", "before", "after", box=None, pad_edge=False, padding=(0, 3))
        if before.loss is not None:
            table.add_row("held-out loss (nats/token)", f"{before.loss:.3f}", f"{after.loss:.3f}")
            table.add_row("held-out perplexity", f"{perplexity(before.loss):,.2f}", f"{perplexity(after.loss):,.2f}")
        if result.demo:
            exact = [score.accuracy(probes.expected) for score in (before, after)]
            count = len(probes.expected)
            table.add_row(f"exact matches of {count}", *(f"{share:.1%}" for share, _ in exact))
            table.add_row("characters right", *(f"{share:.1%}" for _, share in exact))
        self.console.print()
        self.console.print(table)
        if result.demo:
            unchanged = character_accuracy([text.translate(demo.ASCII) for text in probes.expected], probes.expected)
            self.say(f"(the ASCII texts left as they are: no exact match, {unchanged:.1%} of the characters)")
        for index in range(min(GENERATIONS, len(probes.texts))):
            self.console.print()
            rows(
                self.console,
                [
                    ("prompt", shown(probes.texts[index])),
                    ("before", shown(before.completions[index])),
                    ("after", shown(after.completions[index])),
                    ("in the data", shown(probes.expected[index])),
                ],
            )
        self.console.print()
        files = "adapter_model.safetensors, adapter_config.json, tokenizer, log.jsonl, loss.png, config.yaml"
        self.say(f"{result.out}: {files}")
        self.say(f"{duration(result.seconds)} in all, {size(result.peak_bytes)} memory at most. Try it:")
        chat = result.shape in ("chat", "sharegpt", "alpaca")
        prompt = "Who are you?" if chat else probes.texts[0].splitlines()[0][:SHOWN_CHARACTERS]
        plain = "" if chat else "--plain "
        self.command(f"pyqlora chat {shlex.quote(str(result.out))} {plain}--prompt {shlex.quote(prompt)}")


def rows(console: Console, named: list[tuple[str, str]], width: int | None = None) -> None:
    """Names in bold, and a text beside each."""
    width = width or max(len(name) for name, _ in named)
    for name, text in named:
        console.print(f"[bold]{name:{width}}[/bold]  {escape(text)}")


def shown(text: str) -> str:
    """A text on one line, and not too long a one."""
    line = text.strip().replace("\n", " ⏎ ")
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " …"
