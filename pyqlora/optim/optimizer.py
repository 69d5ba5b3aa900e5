"""The optimizers' common part: states of 32 or 8 bits, paged or not, stepped by one native call per group."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache
from itertools import compress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyqlora.ops.optim_step import RULES, optim_step
from pyqlora.ops.paged import paged_zeros
from pyqlora.ops.paged_cuda import GROUP_BYTES, Pages, in_turn, paged_by_gpu
from pyqlora.optim.manager import GlobalOptimManager
from pyqlora.optim.states import WRAPPED, WRAPPER, convert, from_checkpoint, state_specs
from pyqlora.quant_maps import create_dynamic_map

PAGED = ("state1", "state2", "absmax1", "absmax2")
Lists = tuple[list, ...]  # parallel: parameters first, then, in a step, their gradients and states


class Optimizer8bit(torch.optim.Optimizer):
    """Base of all optimizers here; its name and those of its arguments and states are bitsandbytes'.

    Args:
        optimizer_name: adam, lamb, ademamix, lion, momentum, lars, rmsprop or adagrad.
        params: float32, float16 or bfloat16 parameters, or groups of them.
        defaults: the hyperparameters of a group.
        optim_bits: 32 for float32 states; 8 for codes in blocks of 256, but for tensors below min_8bit_size elements.
        args: an object whose attributes of these names take the place of the arguments.
        is_paged: keep the states in a file-backed mapping, so that they leave RAM under memory pressure; those of
            parameters on a GPU in host memory, from where they visit the GPU during the step.
        page_dir: directory of that file; default $PYQLORA_PAGE_DIR, then the directory for temporary files.

    A gradient that would make a state non-finite leaves the parameter and the states of its element as they are.
    """

    fixed_bits: int | None = None  # of a class with one width
    paged = False  # of a class that always pages

    def __init__(
        self,
        optimizer_name: str,
        params,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        page_dir: str | os.PathLike | None = None,
    ):
        self.optimizer_name = optimizer_name
        self.is_paged = self.paged or is_paged
        self.page_dir = page_dir
        self._pages: dict[Tensor, Pages] = {}  # of states that a GPU pages
        self.args = SimpleNamespace(
            optim_bits=self.fixed_bits or getattr(args, "optim_bits", optim_bits),
            min_8bit_size=getattr(args, "min_8bit_size", min_8bit_size),
            max_unorm=getattr(args, "max_unorm", max_unorm),
            skip_zeros=getattr(args, "skip_zeros", skip_zeros),
        )
        _check_config({**vars(self.args), **defaults})
        super().__init__(params, defaults)

    @property
    def mng(self) -> GlobalOptimManager:
        """The process's overrides."""
        return GlobalOptimManager.get_instance()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that the parameters have; returns what `closure` does, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_pages: dict[Pages | None, list[tuple[dict[str, Any], Lists]]] = {None: []}
        for group_index, group in enumerate(self.param_groups):
            pairs = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
            states = [self.state[p] for p, _ in pairs]
            configs = self._configs(group_index, group, [p for p, _ in pairs], [grad for _, grad in pairs], states)
            self._add_states(
                {
                    p: config
                    for config, (params, _, states) in configs
                    for p, state in zip(params, states, strict=True)
                    if "state1" not in state
                }
            )
            for config, lists in configs:
                if self._pages:
                    for part in _split([self._pages.get(p) for p in lists[0]], lists):
                        by_pages.setdefault(self._pages.get(part[0][0]), []).append((config, part))
                else:
                    by_pages[None].append((config, lists))
        for config, lists in by_pages.pop(None):
            self._step_together(config, lists)
        for pages in in_turn(by_pages):
            for config, lists in by_pages[pages]:
                self._step_together(config, lists, pages)
        return loss

    def _step_together(self, config: dict[str, Any], lists: Lists, pages: Pages | None = None) -> None:
        """One native call, or one for each count of steps where a hyperparameter follows it."""
        for state in lists[2]:
            state["step"] += 1
        parts = [lists]
        if config.get("t_alpha") or config.get("t_beta3"):
            parts = _split([state["step"] for state in lists[2]], lists)
        for params, grads, states in parts:
            if pages is not None:
                states = [{k: pages.on_device(v) if k in PAGED else v for k, v in state.items()} for state in states]
            _step(self.optimizer_name, config, params, grads, states)

    def _configs(
        self, group_index: int, group: dict[str, Any], params: list[Tensor], *more: list
    ) -> list[tuple[dict[str, Any], Lists]]:
        """Some of the group's parameters, and lists beside them, by their configurations: the group's own, and those
        with overrides."""
        shared = {**vars(self.args), **{key: value for key, value in group.items() if key != "params"}}
        by_id, by_index = self.mng.pid2config, self.mng.index2config
        for module, name, config in self.mng.module_weight_config_triple:
            self.mng.remember(getattr(module, name), config)
        lists = (params, *more)
        if not by_id and not by_index:
            return [(shared, lists)] if params else []
        indices = {id(p): index for index, p in enumerate(group["params"])}
        plain, configs = [], []
        for i, p in enumerate(params):
            overrides = {**by_index.get((group_index, indices[id(p)]), {}), **by_id.get(id(p), {})}
            plain.append(not overrides)
            if overrides:
                configs.append(({**shared, **overrides}, tuple([own[i]] for own in lists)))
                _check_config(configs[-1][0])
        if any(plain):
            configs.insert(0, (shared, tuple(list(compress(own, plain)) for own in lists)))
        return configs

    def _add_states(self, configs: dict[Tensor, dict[str, Any]]) -> None:
        """Zero states for parameters that have none: one mapping for all of them, if they are paged."""
        specs = {p: self._specs(p, config) for p, config in configs.items()}
        for p, tensors in self._allocate(specs).items():
            self.state[p].update(self._complete(p, configs[p], {"step": 0, **tensors}))

    def _specs(self, p: Tensor, config: dict[str, Any]):
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(f"{type(self).__name__}: expected dense gradients, got one of layout {p.grad.layout}")
        bits = 32 if p.numel() < config["min_8bit_size"] else config["optim_bits"]
        return state_specs(self.optimizer_name, p, bits)

    def _allocate(self, specs: dict[Tensor, dict]) -> dict[Tensor, dict[str, Tensor]]:
        if self.is_paged and specs:
            if all(paged_by_gpu(p) for p in specs):
                return self._allocate_pages(specs)
            if all(p.device.type == "cpu" for p in specs):
                flat = iter(paged_zeros([spec for named in specs.values() for spec in named.values()], self.page_dir))
                return {p: {key: next(flat) for key in named} for p, named in specs.items()}
        return {
            p: {key: torch.zeros(shape, dtype=dtype, device=p.device) for key, (shape, dtype) in named.items()}
            for p, named in specs.items()
        }

    def _allocate_pages(self, specs: dict[Tensor, dict]) -> dict[Tensor, dict[str, Tensor]]:
        """States that a GPU pages, in groups of neighbouring parameters of one device."""
        allocated, group, size = {}, [], 0

        def allocate() -> None:
            pages = Pages([spec for p in group for spec in specs[p].values()], group[0])
            flat = iter(pages.tensors)
            for p in group:
                allocated[p] = {key: next(flat) for key in specs[p]}
                self._pages[p] = pages

        for p, named in specs.items():
            if group and (size >= GROUP_BYTES or p.device != group[0].device):
                allocate()
                group, size = [], 0
            group.append(p)
            size += sum(math.prod(shape) * dtype.itemsize for shape, dtype in named.values())
        allocate()
        return allocated

    def _complete(self, p: Tensor, config: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Add what bitsandbytes keeps beside the numbers: the maps and the place for the update's norm."""
        for key in ("absmax1", "absmax2"):
            if key in state:
                state["qmap" + key[-1]] = _dynamic_map(key == "absmax1", p.device)
        if config["max_unorm"] > 0:
            state["unorm_vec"] = torch.zeros(1, device=p.device)
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's form, the tensors of each state wrapped as bitsandbytes does to hide their shapes from FSDP."""
        for pages in set(self._pages.values()):
            pages.synchronize()
        saved = super().state_dict()
        wrapped = {}
        for index, state in saved["state"].items():
            tensors = {key: state[key] for key in WRAPPED if key in state}
            wrapped[index] = {key: value for key, value in state.items() if key not in tensors} | {WRAPPER: tensors}
        return {**saved, "state": wrapped}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Continue from a state of pyqlora, bitsandbytes or torch.optim (Adam, AdamW, SGD, RMSprop, Adagrad).

        The states take this optimizer's form: 8 or 32 bits, paged or not, on the parameters' device
        (`move_to_device` is there for bitsandbytes' sake). Equal widths load bit for bit.

        Raises:
            ValueError: the groups or the kind of optimizer differ.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        configs, states = {}, {}
        for group_index, group in enumerate(self.param_groups):
            for config, (some,) in self._configs(group_index, group, group["params"]):
                configs.update(dict.fromkeys(some, config))
        for index, p in zip(saved_ids, params, strict=True):
            if state_dict["state"].get(index):
                states[p] = from_checkpoint(state_dict["state"][index], self.optimizer_name)
        specs = {p: self._specs(p, configs[p]) for p in states}
        for p, tensors in self._allocate(specs).items():
            bits = 8 if tensors["state1"].dtype == torch.uint8 else 32
            for key, value in convert(states[p], self.optimizer_name, p, bits).items():
                tensors[key].copy_(value)
            state = self._complete(p, configs[p], {"step": states[p]["step"], **tensors})
            if "unorm_vec" in state and "unorm_vec" in states[p]:
                state["unorm_vec"].copy_(states[p]["unorm_vec"])
            self.state[p] = state

    def __getstate__(self) -> dict[str, Any]:
        for pages in set(self._pages.values()):
            pages.synchronize()
        own = ("optimizer_name", "is_paged", "page_dir", "args")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}, "_pages": {}}


class Optimizer2State(Optimizer8bit):
    """Base of the optimizers with two states: Adam, AdamW, AdEMAMix, LAMB."""

    def __init__(
        self,
        optimizer_name,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        max_unorm=0.0,
        skip_zeros=False,
        is_paged=False,
        alpha=0.0,
        t_alpha=None,
        t_beta3=None,
        *,
        page_dir=None,
    ):
        if isinstance(betas, str):  # as some command lines hand them over: "(0.9, 0.999)"
            betas = tuple(float(b) for b in betas.strip("() ").split(","))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        super().__init__(
            optimizer_name,
            params,
            defaults,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            skip_zeros,
            is_paged,
            page_dir,
        )


class Optimizer1State(Optimizer8bit):
    """Base of the optimizers with one state: Lion, SGD, RMSprop, Adagrad, LARS."""

    def __init__(
        self,
        optimizer_name,
        params,
        lr=1e-3,
        betas=(0.9, 0.0),
        eps=1e-8,
        weight_decay=0.0,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        max_unorm=0.0,
        skip_zeros=False,
        is_paged=False,
        *,
        page_dir=None,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            optimizer_name,
            params,
            defaults,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            skip_zeros,
            is_paged,
            page_dir,
        )


def _split(values: list[Any], lists: Lists) -> list[Lists]:
    """The lists' parts of equal value."""
    if not values or values.count(values[0]) == len(values):
        return [lists]
    masks = [[own == value for own in values] for value in dict.fromkeys(values)]
    return [tuple(list(compress(own, mask)) for own in lists) for mask in masks]


def _check_config(config: dict[str, Any]) -> None:
    for key in ("lr", "eps", "weight_decay"):
        if not config[key] >= 0.0:
            raise ValueError(f"{key}: expected 0 or more, got {config[key]}")
    for i, beta in enumerate(config["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, got {beta}")
    if config["optim_bits"] not in (8, 32):
        raise ValueError(f"optim_bits: expected 8 or 32, got {config['optim_bits']}")
    if config["skip_zeros"]:
        raise ValueError("skip_zeros: expected False; elements with a zero gradient are always updated")


@lru_cache
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    return create_dynamic_map(signed).to(device)


def _step(
    optimizer_name: str, config: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict]
) -> None:
    """One native call. As in bitsandbytes, 8-bit states go without the limit on the update's norm."""
    beta1, beta2, beta3 = (*config["betas"], 0.0)[:3]
    alpha, step = config.get("alpha", 0.0), states[0]["step"]
    if config.get("t_alpha"):
        alpha = min(step * alpha / config["t_alpha"], alpha)
    if config.get("t_beta3"):
        # From beta1 to beta3 so that the averages' half-lives grow linearly.
        ln1, ln3, part = math.log(beta1), math.log(beta3), step / config["t_beta3"]
        beta3 = min(math.exp(ln1 * ln3 / ((1 - part) * ln3 + part * ln1)), beta3)
    optim_step(
        RULES[optimizer_name].name,
        params,
        grads,
        states,
        lr=float(config["lr"]),
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        alpha=alpha,
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        max_unorm=config["max_unorm"],
    )
