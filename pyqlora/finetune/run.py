"""A whole run: data, model, plan, steps, checkpoints, scores, files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pyqlora.finetune import checkpoint, data, demo, report
from pyqlora.finetune.batches import Order
from pyqlora.finetune.encode import Encoded, encode
from pyqlora.finetune.files import merged_directory, write_text
from pyqlora.finetune.load import Source, add_lora, pick_device
from pyqlora.finetune.loop import Loop, Record, make_optimizer
from pyqlora.finetune.memory import estimate, peak_bytes, return_freed_memory
from pyqlora.finetune.options import CONFIG_FILE, Options
from pyqlora.finetune.plan import Plan, make_plan
from pyqlora.ops.selective_checkpointing import selective_checkpointing

CHECKPOINT_SECONDS = 600
DEFAULT_OUT = "pyqlora-out"
ADAPTER_CONFIG = "adapter_config.json"


class Screen(Protocol):
    """Where a run reports to."""

    def say(self, text: str) -> None:
        """One line about what is happening now."""

    def plan(self, plan: Plan) -> None:
        """The plan, before the first step."""

    def start(self, done: int, steps: int) -> None:
        """The steps begin; `done` were taken before an interruption."""

    def step(self, record: Record) -> None:
        """A step was taken."""

    def stop(self) -> None:
        """The steps are over, or given up."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    out: Path
    steps: int
    done: int
    before: report.Score
    after: report.Score | None
    probes: report.Probes
    shape: str
    demo: bool
    seconds: float
    peak_bytes: int

    @property
    def interrupted(self) -> bool:
        """Whether steps are left; then OUT holds a checkpoint and no adapter yet."""
        return self.done < self.steps


def finetune(options: Options, screen: Screen, resume: str | None = None) -> Result:
    """Run `pyqlora finetune`.

    Args:
        options: of the run; with `resume`, the ones read from its checkpoint.
        screen: where to report to.
        resume: directory of an interrupted run.

    Raises:
        ValueError, OSError: something about the options, the data, the model or the disk, in one line.
        RuntimeError: the training failed.
    """
    start = time.perf_counter()
    options.check()
    directory = checkpoint.find(resume) if resume else None
    saved = checkpoint.load_state(directory) if directory else None
    out = directory.parent if directory else claim_out(options.out, DEFAULT_OUT)
    options.out = str(out)
    device, dtype = pick_device()

    is_demo = options.data == demo.NAME
    shape, samples = demo.load() if is_demo else data.load(options.data)
    source = Source(options.model)
    options.max_length = min(options.max_length, source.context() or options.max_length)
    tokenizer = source.tokenizer()
    encoding = encode(samples, tokenizer, options.max_length)
    data_hash = fingerprint(encoding.samples)
    if saved and saved["data"] != data_hash:
        raise ValueError(f"{options.data} or the model's tokenizer has changed since {out} was interrupted")
    train, held_out = split(encoding.samples, options.val, options.seed)
    order = Order([len(s.ids) for s in train], options.batch_size, options.grad_accum, options.seed)

    screen.say(f"loading {options.model} in 4 bits")
    model = add_lora(source.base(device, dtype), options)
    largest = sorted(train, key=lambda s: len(s.ids))[-options.batch_size :]
    labelled = sum(sample.trained for sample in largest)
    needed = estimate(model, options, len(largest), len(largest[-1].ids), labelled, dtype)
    if needed.checkpointing != "none":
        return_freed_memory()
        how = {"context_fn": selective_checkpointing} if needed.checkpointing == "selective" else {}
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False, **how})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(options.optim, trained)
    loop = Loop(model, optimizer, train, order, 0, options.lr, tokenizer.pad_token_id)
    loop.steps = saved["steps"] if saved else count_steps(options, loop)
    options = dataclasses.replace(options, steps=loop.steps, epochs=None, minutes=None)
    screen.plan(
        make_plan(options, model, shape, encoding, train, held_out, loop.steps, needed, device, dtype, tokenizer)
    )

    probes = report.choose_probes(held_out or train, len(held_out) if is_demo else report.GENERATIONS, tokenizer)
    if saved:
        checkpoint.restore(directory, model, optimizer, saved)
        before = report.Score(**saved["before"])
    else:
        screen.say("measuring the model before training")
        before = report.score(model, held_out, probes, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CONFIG_FILE, options.to_yaml())

    def save(done: int) -> None:
        state = {"data": data_hash, "done": done, "steps": loop.steps, "before": dataclasses.asdict(before)}
        checkpoint.save(out, model, optimizer, options, state)

    log = report.Log(out / "log.jsonl", saved["done"] if saved else 0)
    try:
        done = take_steps(loop, saved["done"] if saved else 0, log, screen, save)
    finally:
        log.close()
    after = None
    if done == loop.steps:
        save_adapter(model, tokenizer, out)
        screen.say("measuring the model after training")
        after = report.score(model, held_out, probes, tokenizer)
        report.plot(out / "loss.png", log.records, before.loss, after.loss)
        shutil.rmtree(out / checkpoint.DIRECTORY, ignore_errors=True)
    seconds = time.perf_counter() - start
    return Result(out, loop.steps, done, before, after, probes, shape, is_demo, seconds, peak_bytes(device))


def claim_out(given: str | None, default: str) -> Path:
    """The directory to write to: the one given, which must not hold a run yet, or the first free default name.

    Raises:
        ValueError: the directory holds an adapter or a checkpoint already, or is no directory.
    """
    if given is None:
        out, number = Path(default), 2
        while out.exists():
            out, number = Path(f"{default}-{number}"), number + 1
        return out
    out = Path(given)
    if out.exists() and not out.is_dir():
        raise ValueError(f"-o {out}: expected a directory, but this is a file")
    if (out / checkpoint.DIRECTORY).exists():
        raise ValueError(f"-o {out}: holds an interrupted run; continue it with --resume {out}, or choose another -o")
    if any((out / name).exists() for name in (ADAPTER_CONFIG, CONFIG_FILE)):
        raise ValueError(f"-o {out}: holds a run already; choose another -o, or remove it first")
    return out


def split(samples: list[Encoded], val: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Samples to train on, and held-out ones: a share of `val` if below 1, else that many, drawn by the seed.

    A sample that occurs more than once is never held out, so none is in both.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if val == 0:
        return samples, []
    count = max(1, round(val * len(samples))) if val < 1 else round(val)
    if count >= len(samples):
        if val < 1:  # a single sample
            return samples, []
        raise ValueError(f"--val {count} leaves nothing to train on: there are {len(samples)} samples")
    times = Counter(tuple(sample.ids) for sample in samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set([i for i in order if times[tuple(samples[i].ids)] == 1][:count])
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in order if i in held]


def fingerprint(samples: list[Encoded]) -> str:
    """SHA-256 of all token ids and labels."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.ids, sample.labels)).encode())
    return digest.hexdigest()


def count_steps(options: Options, loop: Loop) -> int:
    """The length of the run in optimizer steps; for --minutes from the measured time of a step."""
    if options.steps is not None:
        return options.steps
    if options.minutes is not None:
        return max(1, int(options.minutes * 60 / loop.seconds_per_step()))
    return max(1, math.ceil((options.epochs or 1) * loop.order.steps_per_epoch))


def take_steps(loop: Loop, done: int, log: report.Log, screen: Screen, save: Callable[[int], None]) -> int:
    """Take the steps that are left, saving a checkpoint now and then and when interrupted; the number done in all."""
    screen.start(done, loop.steps)
    saved_at = time.monotonic()
    try:
        with interrupts() as interrupted:
            while done < loop.steps and not interrupted.is_set():
                record = loop.step(done + 1)
                done += 1
                log.add(record)
                screen.step(record)
                if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                    save(done)
                    saved_at = time.monotonic()
            if done < loop.steps:
                save(done)
    finally:
        screen.stop()
    return done


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM, so that the step under way ends well; a second acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def handle(kind: int, frame: Any) -> None:
        event.set()
        for other in kinds:
            signal.signal(other, before[other])

    for kind in kinds:
        signal.signal(kind, handle)
    try:
        yield event
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


def save_adapter(model: Any, tokenizer: Any, out: Path) -> None:
    """The adapter in PEFT's format, and the tokenizer with the chat template it was trained with."""
    with merged_directory(out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
