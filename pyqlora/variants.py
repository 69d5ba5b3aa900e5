"""LoRA's initialisers, one function each, and its variants, one class each.

An initialiser gets the layer and the adapter's name after A and B have been made; it fills them and, for those that
split the base weight (pissa, olora, loftq), leaves the rest of the weight in the base layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyqlora.config import LoraConfig

if TYPE_CHECKING:
    from pyqlora.lora_layer import LoraLayer
    from pyqlora.lora_module import LoraModule


def scaling_factor(alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / √r where the scale is to keep the update's size as the rank grows (rsLoRA)."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


# --- initialisers ----------------------------------------------------------------------------------------------------


def init_default(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """A as nn.Linear's default (Kaiming uniform, a = √5), B = 0: the update starts at zero."""
    a, b = layer.factors(name)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    _zero_b(layer, name, b)


def init_gaussian(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """A normal with standard deviation 1/r, B = 0."""
    a, b = layer.factors(name)
    nn.init.normal_(a, std=1 / layer.r[name])
    _zero_b(layer, name, b)


def init_embedding(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """A = 0 and B normal: of an embedding A holds the rows, so a token's update starts at zero in A."""
    a, b = layer.factors(name)
    nn.init.zeros_(a)
    nn.init.normal_(b)


def init_zero_b(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """B = 0 and A as made: what EVA starts from until its vectors are computed from data."""
    nn.init.zeros_(layer.factors(name)[1])


def _zero_b(layer: LoraLayer, name: str, b: Tensor) -> None:
    nn.init.zeros_(b)
    bias = getattr(layer.lora_B[name], "bias", None) if name in layer.lora_B else None
    if bias is not None:
        nn.init.zeros_(bias)


@torch.no_grad()
def init_orthogonal(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """A and B from the odd and the even rows of one random orthogonal matrix, so that B·A = 0 at the start.

    Raises:
        ValueError: an odd rank.
    """
    r = layer.r[name]
    if r % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a = torch.randn(layer.in_features, r // 2).mm(q[0::2]).t() / 10.0
    b = torch.randn(r // 2, layer.out_features).t().mm(q[1::2]) / 10.0
    layer.set_factors(name, a, b)


@torch.no_grad()
def init_pissa(layer: LoraModule, name: str, config: LoraConfig) -> None:
    """B·A = the first r singular triples of the weight, the base keeps the rest (Meng et al. 2024, arXiv:2404.02948).

    "pissa" takes the exact decomposition, "pissa_niter_<n>" a randomized one with n subspace iterations.
    """
    r = layer.r[name]
    weight = layer.splittable_weight("PiSSA")
    _, _, iterations = str(config.init_lora_weights).partition("_niter_")
    if config.init_lora_weights == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    elif iterations.isdigit():
        u, s, v = torch.svd_lowrank(weight, q=r, niter=int(iterations))
        vh = v.t()
    else:
        raise ValueError(
            "init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', "
            f"got {config.init_lora_weights} instead."
        )
    root = (s / layer.scaling[name]).sqrt()
    _split_off(layer, name, weight, root[:, None] * vh, u * root)


@torch.no_grad()
def init_olora(layer: LoraModule, name: str, config: LoraConfig) -> None:
    """B, A = the first r columns of Q and rows of R of the weight's QR (Büyükakyüz 2024, arXiv:2406.01775)."""
    r = layer.r[name]
    weight = layer.splittable_weight("OLoRA")
    q, upper = torch.linalg.qr(weight)
    _split_off(layer, name, weight, upper[:r], q[:, :r])


def _split_off(layer: LoraModule, name: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
    layer.set_factors(name, a, b)
    layer.set_weight(weight - layer.scaling[name] * (b @ a))


@torch.no_grad()
def init_loftq(layer: LoraModule, name: str, config: LoraConfig) -> None:
    """Alternate quantizing W − sB·A and taking sB·A from the error (Li et al. 2023, arXiv:2310.08659).

    The base keeps the dequantized values, so that quantizing it with NF4 in blocks of 64 loses next to nothing more.

    Raises:
        ValueError: bits other than 4.
    """
    from pyqlora.ops.quantize import dequantize_4bit, quantize_4bit

    bits, rounds = config.loftq_config.get("loftq_bits", 4), config.loftq_config.get("loftq_iter", 1)
    if bits != 4:
        raise ValueError(f"LoftQ: pyqlora quantizes to 4 bits, got loftq_bits={bits}")
    if rounds < 1:
        raise ValueError(f"LoftQ: loftq_iter must be positive, got {rounds}")
    weight = layer.splittable_weight("LoftQ")
    r, rest = layer.r[name], weight
    for _ in range(rounds):
        packed, absmax = quantize_4bit(rest, 64, "nf4")
        decoded = dequantize_4bit(packed, absmax, None, None, None, 256, 64, "nf4", list(weight.shape), torch.float32)
        u, s, vh = torch.linalg.svd(weight - decoded, full_matrices=False)
        root = (s[:r] / layer.scaling[name]).sqrt()
        a, b = root[:, None] * vh[:r], u[:, :r] * root
        rest = weight - layer.scaling[name] * (b @ a)
    layer.set_factors(name, a, b)
    layer.set_weight(decoded)


def initialise(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """Run the initialiser that `init_lora_weights` names; False leaves A and B as torch makes them.

    Raises:
        ValueError: an unknown name.
    """
    choice = config.init_lora_weights
    if choice is False:
        return
    key = choice if choice is True else str(choice).lower().partition("_niter_")[0]
    if key not in INITIALISERS:
        names = ", ".join(repr(known) for known in INITIALISERS)
        raise ValueError(f"Unknown initialization init_lora_weights={choice!r}: expected False or one of {names}")
    INITIALISERS[key](layer, name, config)


INITIALISERS: dict[Any, Any] = {
    True: init_default,
    "gaussian": init_gaussian,
    "orthogonal": init_orthogonal,
    "pissa": init_pissa,
    "olora": init_olora,
    "loftq": init_loftq,
    "eva": init_zero_b,
}


# --- variants --------------------------------------------------------------------------------------------------------


class Magnitude(nn.Module):
    """DoRA's learnt length for each output feature, under PEFT's key `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class DoraCaching:
    """Keeps the norms that DoRA divides by, instead of computing them from the weight in each forward pass.

    As a context, or called with True or False for good. In force only for layers in eval mode, which forget what they
    kept when they change mode or run without it.
    """

    enabled = False

    def __init__(self, enabled: bool = True):
        self.wanted = enabled

    def __enter__(self) -> None:
        self.before, DoraCaching.enabled = DoraCaching.enabled, self.wanted

    def __exit__(self, *exception: object) -> None:
        DoraCaching.enabled = self.before

    def __call__(self, enabled: bool = True) -> None:
        """Switch caching on or off until it is switched again."""
        DoraCaching.enabled = enabled


class Dora:
    """Weight-decomposed update: W' = m · (W + sBA) / ‖W + sBA‖, one length m and norm for each output feature.

    The norm counts as a constant for the gradient (Liu et al. 2024, arXiv:2402.09353, section 4.3).
    """

    @staticmethod
    def init(layer: LoraModule, name: str) -> None:
        """Start from the lengths that the weight has, so that nothing changes at first."""
        device, dtype = layer.factors(name)[0].device, layer.factors(name)[0].dtype
        meta = device.type == "meta"
        norm = torch.empty(layer.norm_shape(), device=device) if meta else Dora.norm(layer, name)
        layer.lora_magnitude_vector[name] = Magnitude(norm.to(dtype))

    @staticmethod
    @torch.no_grad()
    def norm(layer: LoraModule, name: str, weight: Tensor | None = None) -> Tensor:
        """‖W + sBA‖ for each output feature, in float32, in the shape of the magnitudes."""
        if weight is None:
            weight = layer.read_weight()
        adapted = weight + layer.norm_update(name)
        return layer.feature_rows(adapted).norm(dim=1).view(layer.norm_shape())

    @staticmethod
    def kept_norm(layer: LoraModule, name: str) -> Tensor:
        """The norm, from the layer's cache while caching is on."""
        if not DoraCaching.enabled or layer.training:
            layer._dora_cache.clear()
            return Dora.norm(layer, name)
        if name not in layer._dora_cache:
            layer._dora_cache[name] = Dora.norm(layer, name)
        return layer._dora_cache[name]

    @staticmethod
    def update(layer: LoraModule, name: str, x: Tensor, result: Tensor) -> Tensor:
        """The base output and the LoRA update, without the bias, rescaled by m / ‖W + sBA‖."""
        factor = layer.lora_magnitude_vector[name].weight / Dora.kept_norm(layer, name)
        bias = getattr(layer.get_base_layer(), "bias", None)
        bias = 0 if bias is None else bias.view(layer.norm_shape()).to(factor.dtype)
        wide = result.to(torch.promote_types(result.dtype, factor.dtype))
        return (factor * layer.update(name, x, wide - bias) + bias).to(result.dtype)

    @staticmethod
    @torch.no_grad()
    def factor(layer: LoraModule, name: str, weight: Tensor) -> Tensor:
        """m / ‖W + sBA‖ as one float32 value for each output feature, for merging; W without any merged adapter."""
        return (layer.lora_magnitude_vector[name].weight.float() / Dora.norm(layer, name, weight)).flatten()
