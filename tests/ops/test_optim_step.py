"""optim_step on every backend: the CPU's results bit for bit, since every sum and rounding has one order."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from pyqlora import _C
from pyqlora.ops import backend as dispatch
from pyqlora.ops.optim_step import BLOCKSIZE, NORM_CHUNK, RULES, optim_step
from pyqlora.optim.states import encode, state_specs
from pyqlora.quant_maps import create_dynamic_map

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tails of the vectors of 8, the blocks of 256 and the chunks of 2048 elements; more tensors than one table takes.
SIZES = [1, 7, 8, 255, 256, 257, 2047, 2048, 2049, 4999]
HYPER = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 3.0, "eps": 1e-8, "weight_decay": 0.1,
    "max_unorm": 0.0,
}  # fmt: skip
LIMITS = {"lamb": 1.0, "lars": 0.02}


@dataclass
class Batch:
    """What one call steps: parallel lists."""

    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    states: list[dict] = field(default_factory=list)

    def each(self, key):
        """That entry of all states."""
        return [state[key] for state in self.states if key in state]


def make_batch(rule, bits, dtype, sizes, seed=0, steps=None):
    """Parameters, gradients and states in use, as a few steps would leave them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale):
        return torch.randn(shape, generator=generator) * scale

    batch = Batch()
    for i, n in enumerate(sizes):
        p, g = normal(n, 1.0).to(dtype), normal(n, 0.01).to(dtype)
        state = {"step": steps[i] if steps else 3}
        for key, (shape, _) in state_specs(rule, p, 32).items():
            values = normal(shape, 0.01)
            positive = key == "state2" or rule in ("rmsprop", "adagrad")
            state[key] = values.square() if positive else values
            if bits == 8:
                qmap = create_dynamic_map(key == "state1")
                rows = [encode(row, qmap) for row in state[key].view(-1, n)]
                state[key] = torch.stack([codes for codes, _ in rows]).view(shape)
                state["absmax" + key[-1]] = torch.stack([absmax for _, absmax in rows])
                state["qmap" + key[-1]] = qmap
        if rule in LIMITS and bits == 32:
            state["unorm_vec"] = torch.zeros(1)
        batch.params.append(p), batch.grads.append(g), batch.states.append(state)
    return batch


def tensors(batch):
    keys = ("state1", "state2", "absmax1", "absmax2", "unorm_vec")
    return batch.params + [t for key in keys for t in batch.each(key)]


def move(batch, device):
    batch.params = [t.to(device) for t in batch.params]
    batch.grads = [t.to(device) for t in batch.grads]
    for state in batch.states:
        state |= {key: value.to(device) for key, value in state.items() if key != "step"}
    return batch


def step(rule, batch, **hyper):
    hyper = {**HYPER, "max_unorm": LIMITS.get(rule, 0.0), **hyper}
    optim_step(RULES[rule].name, batch.params, batch.grads, batch.states, **hyper)


def check_against_cpu(backend, rule, make, steps=2, prepare=lambda batch: batch, **hyper):
    ours, cpu = prepare(move(make(), backend.device)), prepare(make())  # in place: a move makes tensors aligned again
    for _ in range(steps):
        step(rule, ours, **hyper)
        with dispatch.override(None):
            step(rule, cpu, **hyper)
    for got, expected in zip(tensors(ours), tensors(cpu), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_cpu_bit_for_bit(backend, rule, bits, dtype):
    sizes = SIZES if backend.name in ("cpu", "emulated", "cuda") else [2049, 7, 257]
    check_against_cpu(backend, rule, lambda: make_batch(rule, bits, dtype, sizes))


@pytest.mark.parametrize("rule", ["adam", "lars"])
def test_more_tensors_than_one_table_holds(backend, rule):
    """And steps that differ, which take a launch each."""
    sizes = [8 + i % 3 for i in range(150)]
    check_against_cpu(
        backend, rule, lambda: make_batch(rule, 32, torch.float32, sizes, steps=[1 + i % 2 for i in range(150)])
    )


@pytest.mark.parametrize("shifted", ["params", "grads"])
@pytest.mark.parametrize("bits", [8, 32])
def test_misaligned_and_empty_tensors(backend, bits, shifted):
    def prepare(batch):
        for name in ("params", "grads"):
            views = [t[1:] for t in getattr(batch, name)]  # two bytes off
            setattr(batch, name, views if name == shifted else [t.clone() for t in views])
        for p, state in zip(batch.params, batch.states, strict=True):
            for key in ("state1", "state2"):
                state[key] = torch.cat([state[key][..., 1:]], -1)  # aligned, unlike views
            for key in ("absmax1", "absmax2"):
                if key in state:
                    state[key] = state[key][..., : math.ceil(p.numel() / BLOCKSIZE)].contiguous()
        return batch

    def make():
        return make_batch("ademamix", bits, torch.bfloat16, [1 + 520, 1 + 513, 0 + 1])

    check_against_cpu(backend, "ademamix", make, prepare=prepare)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", ["adam", "ademamix", "lion", "momentum", "rmsprop", "adagrad", "lamb"])
def test_a_bad_gradient_leaves_its_element_alone(backend, rule, bits, bad):
    def make(value=bad):
        batch = make_batch(rule, bits, torch.float32, [300])
        batch.grads[0][[5, 299]] = value
        return batch

    before = make()
    after = check_against_cpu(backend, rule, make, steps=1)
    assert all(t.isfinite().all() for t in tensors(after))
    if rule not in ("lion", "momentum") or not math.isfinite(bad):
        assert torch.equal(after.params[0][[5, 299]].cpu(), before.params[0][[5, 299]])


def test_zero_and_tiny_blocks(backend):
    """All zeros, denormals below a normal reciprocal, the smallest normal number."""

    def make():
        batch = make_batch("adam", 8, torch.float32, [5 * BLOCKSIZE])
        batch.states[0]["absmax1"].zero_(), batch.states[0]["absmax2"].zero_()
        for block, value in enumerate([0.0, 1e-44, 1e-38, 2**-126]):
            batch.grads[0][block * BLOCKSIZE : (block + 1) * BLOCKSIZE] = value
        return batch

    check_against_cpu(backend, "adam", make, steps=1, eps=0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_encoding_is_to_the_nearest_entry(backend, signed):
    """Every entry, every midpoint and their neighbours, through Lion (signed) and Adam (unsigned) with b2 = 0."""
    qmap = create_dynamic_map(signed)
    middles = ((qmap[1:].double() + qmap[:-1].double()) / 2).float()
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    edges = [
        f(x, to)
        for x in (qmap, middles)
        for f, to in ((lambda x, _: x, up), (torch.nextafter, up), (torch.nextafter, down))
    ]
    wanted = torch.cat([*edges, torch.rand(509) ** 6]).clamp(-1, 1) if signed else torch.cat(edges).clamp(0, 1)
    wanted = torch.nn.functional.pad(wanted, (0, -len(wanted) % (BLOCKSIZE - 1))).view(-1, BLOCKSIZE - 1)
    wanted = torch.cat([torch.ones(len(wanted), 1), wanted], 1).flatten()  # absmax 1
    rule = "lion" if signed else "adam"
    batch = make_batch(rule, 8, torch.float32, [len(wanted)])
    batch.grads[0].copy_(wanted if signed else wanted.sqrt())
    wanted = wanted if signed else batch.grads[0] * batch.grads[0]
    batch = move(batch, backend.device)
    step(rule, batch, beta1=0.0, beta2=0.0)
    codes = batch.states[0]["state1" if signed else "state2"].cpu().flatten()
    assert torch.equal(codes, encode(wanted, qmap)[0])
    distance = (wanted.double()[:, None] - qmap.double()).abs()
    assert torch.equal(distance.gather(1, codes.long()[:, None])[:, 0], distance.min(1).values)


@pytest.fixture(params=[isa for isa in _C.cpu.supported_isas() if isa != "scalar"])
def isa(request):
    _C.cpu.set_isa(request.param)
    yield request.param
    _C.cpu.set_isa("")


@pytest.mark.parametrize("rule", RULES)
def test_instruction_sets_agree_on_every_code_and_scale(isa, rule):
    """Every code under every kind of absmax, with gradients that are none, small, large and not finite."""
    scales = torch.tensor([0.0, 1e-45, 1e-39, 2**-126, 1e-20, 1e-3, 1.0, 1e19, 3e38])
    gradients = torch.tensor([0.0, 1e-30, 1e-3, -2.0, 1e25, math.inf, math.nan])
    blocks = len(scales) * len(gradients)

    def make():
        n = blocks * BLOCKSIZE - 3  # the last one is not whole
        batch = make_batch(rule, 8, torch.float32, [n])
        codes = torch.arange(BLOCKSIZE, dtype=torch.uint8).repeat(blocks)[:n]
        for key in ("state1", "state2"):
            for t in batch.each(key):
                t.view(-1, n).copy_(codes.roll(7 if key == "state1" else 0))
        for t in batch.each("absmax1") + batch.each("absmax2"):
            t.view(-1, blocks).copy_(scales.repeat_interleave(len(gradients)))
        # Not finite in one element of a block, else in all.
        values = gradients.repeat(len(scales)).repeat_interleave(BLOCKSIZE)[:n]
        one = torch.arange(n) % BLOCKSIZE == 77
        batch.grads[0].copy_(torch.where(values.isfinite() | one, values, torch.tensor(1e-2)))
        return batch

    ours, scalar = make(), make()
    step(rule, ours)
    _C.cpu.set_isa("scalar")
    step(rule, scalar)
    for got, expected in zip(tensors(ours), tensors(scalar), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_a_bad_gradient_changes_no_neighbour(backend):
    def stepped(value):
        batch = move(make_batch("adam", 8, torch.float32, [2 * BLOCKSIZE]), backend.device)
        batch.grads[0][[5, 300]] = value
        step("adam", batch)
        return batch.params[0].cpu()

    others = torch.ones(2 * BLOCKSIZE, dtype=torch.bool)
    others[[5, 300]] = False
    assert torch.equal(stepped(math.nan)[others], stepped(0.01)[others])


@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_norms_against_float64(backend, rule):
    """|u| to the rounding of its float32 terms."""
    batch = make_batch(rule, 32, torch.float32, [33 * NORM_CHUNK + 5])  # more chunks than a warp has lanes
    p, g, m = batch.params[0].double(), batch.grads[0].double(), batch.states[0]["state1"].double()
    if rule == "lars":
        u = HYPER["beta1"] * m + g + HYPER["weight_decay"] * p
    else:
        v = HYPER["beta2"] * batch.states[0]["state2"].double() + (1 - HYPER["beta2"]) * g * g
        u = (HYPER["beta1"] * m + (1 - HYPER["beta1"]) * g) / (
            v.sqrt() + HYPER["eps"] * math.sqrt(1 - HYPER["beta2"] ** 3)
        )
    batch = move(batch, backend.device)
    step(rule, batch)
    torch.testing.assert_close(batch.states[0]["unorm_vec"].double().cpu()[0], u.norm(), rtol=8 * 2**-24, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.grads.pop(), r"grads: expected a list of 2 \(params has 2\), got 1"),
        (lambda b: b.states.pop(), r"states: expected a list of 2 \(params has 2\), got 1"),
        (lambda b: b.states.__setitem__(1, [1]), "states: expected dictionaries, got list"),
        (lambda b: b.states[1].pop("step"), r"states: expected an entry 'step', got only \['state1', 'state2'\]"),
        (lambda b: b.states[1].pop("state2"), r"states: expected an entry 'state2', got only \['step', 'state1'\]"),
        (lambda b: b.states[0].update(absmax1=torch.zeros(1)), "states: expected an entry 'qmap1', got only"),
        (lambda b: b.states[1].update(state1=b.states[1]["state1"][:9]), "state1: expected 10 elements, got 9"),
        (lambda b: b.states[1].update(state2=b.states[1]["state2"].half()), "state2: expected float32, got float16"),
        (lambda b: b.states[0].update(step=0), "steps: expected 1 or more, got 0"),
        (lambda b: b.grads.__setitem__(0, b.grads[0][:9]), "grads: expected 10 elements, got 9"),
        (lambda b: b.grads.__setitem__(0, b.grads[0].half()), "grads: expected float32, got float16"),
        (
            lambda b: b.params.__setitem__(0, b.params[0].double()),
            "params: expected float32 or float16 or bfloat16, got",
        ),
    ],
)
def test_arguments_are_checked(backend, change, message):
    batch = move(make_batch("adam", 32, torch.float32, [10, 10]), backend.device)
    before = [p.clone() for p in batch.params]
    change(batch)
    with pytest.raises(ValueError, match=f"optim_step: {message}"):
        step("adam", batch)
    assert all(torch.equal(p.to(q.dtype), q) for p, q in zip(batch.params, before, strict=True))


def test_a_limit_needs_a_place_for_the_norm(backend):
    batch = move(make_batch("adam", 32, torch.float32, [10]), backend.device)
    with pytest.raises(ValueError, match="optim_step: states: expected an entry 'unorm_vec', got only"):
        step("adam", batch, max_unorm=1.0)


def test_8_bit_states_go_without_the_limit(backend):
    limited, free = (move(make_batch("lamb", 8, torch.float32, [300]), backend.device) for _ in range(2))
    step("lamb", limited, max_unorm=1e-9)
    step("lamb", free, max_unorm=0.0)
    assert torch.equal(limited.params[0], free.params[0])


@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_unlike_tensors_in_one_call(backend, rule):
    """Of three dtypes, with states of two widths, and strided parameters and gradients between them: as one by one."""
    kinds = [(torch.float32, 8), (torch.bfloat16, 32), (torch.float32, 32), (torch.float16, 8), (torch.bfloat16, 32)]

    def make():
        batches = [make_batch(rule, bits, dtype, [300 + i], i) for i, (dtype, bits) in enumerate(kinds)]
        return [move(batch, backend.device) for batch in batches]

    def strided(t):
        return torch.stack([t, t], -1)[:, 0]

    alone, together = make(), make()
    together[1].params[0] = strided(together[1].params[0])
    together[2].grads[0] = strided(together[2].grads[0])
    for batch in alone:
        step(rule, batch)
    parts = ([x for batch in together for x in getattr(batch, name)] for name in ("params", "grads", "states"))
    step(rule, Batch(*parts))
    for one, other in zip(alone, together, strict=True):
        for got, expected in zip(tensors(other), tensors(one), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("signed", [True, False])
def test_other_maps_are_refused(signed):
    batch = make_batch("adam", 8, torch.float32, [300])
    qmap = create_dynamic_map(signed)
    qmap[200] = (qmap[200] + 3 * qmap[201]) / 4  # in order, and near enough to go unseen by a look at the ends
    batch.states[0]["qmap1" if signed else "qmap2"] = qmap
    name = "qmap1: expected the signed" if signed else "qmap2: expected the unsigned"
    with pytest.raises(ValueError, match=f"optim_step: {name} dynamic map of create_dynamic_map, got another"):
        step("adam", batch)


def test_a_maps_tables_are_not_taken_for_anothers():
    """They are kept from call to call: a refused map leaves none behind, and a copy of a map has the same."""
    first, second = (make_batch("adam", 8, torch.float32, [300]) for _ in range(2))
    step("adam", first)
    refused = make_batch("adam", 8, torch.float32, [300])
    for key in ("qmap1", "qmap2"):
        refused.states[0][key] = torch.linspace(-1, 1, 256)
    for _ in range(2):
        with pytest.raises(ValueError, match="qmap1: expected the signed dynamic map"):
            step("adam", refused)
    second.states[0]["qmap1"] = second.states[0]["qmap1"].clone()
    step("adam", second)
    assert torch.equal(first.params[0], second.params[0])
    assert torch.equal(first.states[0]["state1"], second.states[0]["state1"])


def test_workspace_is_checked():
    batch = make_batch("lamb", 32, torch.float32, [NORM_CHUNK + 1])
    workspace, numbers = torch.empty(31, dtype=torch.uint8), (1e-2, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, 1.0, 1)
    with pytest.raises(ValueError, match="optim_step: workspace: expected 32 elements or more, got 31"):
        _C.cpu.optim_step("adam", batch.params, batch.grads, batch.states, workspace, *numbers)
