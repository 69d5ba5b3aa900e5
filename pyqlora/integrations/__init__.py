"""Where pyqlora meets other libraries; each is imported only when its module is."""

from __future__ import annotations

import sys
from typing import Any


def adopt(model: Any) -> None:
    """Let transformers' Trainer know pyqlora's PeftModel, if it is one of its own models that is adapted."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        from pyqlora.integrations import trainer

        trainer.register()
