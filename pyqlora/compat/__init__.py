"""Programs written for bitsandbytes and PEFT, unchanged, on pyqlora.

`install()` makes `import bitsandbytes` and `import peft` resolve to pyqlora in this process, installed or not; call it
before the program imports them, transformers or accelerate. `python -m pyqlora.compat SCRIPT [ARGS]` does it for a
script. Installed from here, a name has one object: `bitsandbytes.nn.Linear4bit is pyqlora.nn.Linear4bit`.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType

from pyqlora.compat import bitsandbytes, bitsandbytes_ops, peft
from pyqlora.compat.peft_behaviour import Overrides
from pyqlora.compat.stand_in import VersionFinder, forget_availability, module_tree

__all__ = ["install", "uninstall"]

PEERS = (bitsandbytes, peft)

_set_aside: dict[str, ModuleType] = {}
_finder = VersionFinder({peer.NAME: peer.VERSION for peer in PEERS})
_overrides = Overrides()


def install() -> None:
    """Let `import bitsandbytes` and `import peft` resolve to pyqlora, until `uninstall()`.

    Where a real one is installed or even imported already, the stand-in wins and one warning says so; modules that
    hold names of the real one keep them.
    """
    if _finder in sys.meta_path:
        return
    real = [peer.NAME for peer in PEERS if importlib.util.find_spec(peer.NAME) is not None]
    if real:
        warnings.warn(f"pyqlora.compat: {' and '.join(real)}: installed, but pyqlora answers to the name", stacklevel=2)
    for peer in PEERS:
        for name in [name for name in sys.modules if name.partition(".")[0] == peer.NAME]:
            _set_aside[name] = sys.modules.pop(name)
        sys.modules.update(module_tree(peer.NAME, peer.VERSION, peer.MODULES))
    _overrides.install()
    sys.meta_path.insert(0, _finder)
    bitsandbytes_ops.register()
    forget_availability()


def uninstall() -> None:
    """Take `install()` back: the names mean what they meant before it."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name in [name for name in sys.modules if name.partition(".")[0] in (peer.NAME for peer in PEERS)]:
        del sys.modules[name]
    sys.modules.update(_set_aside)
    _set_aside.clear()
    _overrides.uninstall()
    bitsandbytes_ops.unregister()
    forget_availability()
