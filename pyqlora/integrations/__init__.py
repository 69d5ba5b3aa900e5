"""Where pyqlora meets other libraries; each is imported only when its module is."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

TRAINER = "transformers.trainer"


def adopt(model: Any) -> None:
    """Let transformers' Trainer know pyqlora's PeftModel, if it is one of its own models that is adapted.

    A Trainer that is not imported yet learns of it when it is: to import it takes seconds and more than 100 MB, which a
    training loop of one's own does without.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    if TRAINER in sys.modules:
        _register()
    elif _awaited not in sys.meta_path:
        sys.meta_path.insert(0, _awaited)


def _register() -> None:
    from pyqlora.integrations import trainer

    trainer.register()


class _Awaited(MetaPathFinder):
    """Finds the Trainer's module where it is found without this, and registers once it has run."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != TRAINER:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = run_and_register
        return spec


_awaited = _Awaited()
