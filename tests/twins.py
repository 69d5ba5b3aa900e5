"""Equal parameters and gradients for optimizers that are compared."""

import torch

SHAPES = [(64, 128), (5, 7), (301, 77), (1,), (4096,)]


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(seed, *lists):
    """The same normal gradients of scale 0.01 for every list."""
    generator = torch.Generator().manual_seed(seed)
    for twins in zip(*lists, strict=True):
        gradient = torch.randn(twins[0].shape, generator=generator) * 0.01
        for p in twins:
            p.grad = gradient.to(p.dtype, copy=True)
