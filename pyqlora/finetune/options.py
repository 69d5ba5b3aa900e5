"""What a run is: every option, its default, its allowed values, and the YAML file that repeats it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch")
CONFIG_FILE = "config.yaml"


@dataclass
class Options:
    """The options of `pyqlora finetune`; names are the command line's with underscores.

    `val` is a share of the samples below 1 and a number of samples from 1 on. Of `steps`, `epochs` and `minutes`
    at most one is given; none means one epoch.
    """

    model: str | None = None
    data: str | None = None
    out: str | None = None
    r: int = 16
    alpha: int = 32
    targets: str = "all-linear"
    lr: float = 2e-4
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    max_length: int = 512
    batch_size: int = 4
    grad_accum: int = 4
    val: float = 0.05
    seed: int = 0
    optim: str = "paged_adamw_8bit"

    def check(self) -> None:
        """Raise ValueError for the first option whose value is not allowed."""
        for name in ("r", "alpha", "max_length", "batch_size", "grad_accum"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "steps", "epochs", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {value}")
        if self.val < 0:
            raise ValueError(f"--val must be a share of the samples below 1, or a number of samples, got {self.val}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"--optim {self.optim!r} is not known, expected one of {', '.join(OPTIMIZERS)}")
        lengths = [flag(name) for name in ("steps", "epochs", "minutes") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"give only one of --steps, --epochs and --minutes, got {' and '.join(lengths)}")

    @property
    def target_modules(self) -> str | list[str]:
        """`targets` as LoraConfig takes it: names with commas as a list; one name, a regex or "all-linear"."""
        if "," in self.targets:
            return [name.strip() for name in self.targets.split(",") if name.strip()]
        return self.targets if self.targets == "all-linear" or not self.targets.isidentifier() else [self.targets]

    def to_yaml(self) -> str:
        """The options that are set, as YAML that `read_yaml` takes back."""
        import yaml

        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


FIELDS = {field.name: field for field in dataclasses.fields(Options)}
TYPES = {"int": (int, "a whole number"), "float": (float, "a number"), "str": (str, "text")}


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return {"model": "MODEL", "data": "DATA"}.get(name, "--" + name.replace("_", "-"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options by name from a YAML file, each of its declared type.

    Raises:
        ValueError: the file is no YAML mapping, or holds an unknown option or a value of the wrong type.
        OSError: the file cannot be read.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options to values, got {type(values).__name__}")
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(f"{path}: unknown option {name!r}, expected one of {', '.join(FIELDS)}")
        kind, expected = TYPES[FIELDS[name].type.split(" ")[0]]
        try:
            values[name] = kind(value)
            exact = kind is str or values[name] == float(value)
        except (TypeError, ValueError):
            exact = False
        if not exact:
            raise ValueError(f"{path}: {name} must be {expected}, got {value!r}")
    return values
