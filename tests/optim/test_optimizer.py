"""What every torch.optim.Optimizer promises, and what bitsandbytes adds to it."""

import copy
import gc
import inspect
import io

import pytest
import torch
from twins import parameters, set_gradients

import pyqlora.optim as optim
from pyqlora.ops.optim_step import optim_step
from pyqlora.quant_maps import create_dynamic_map


@pytest.fixture
def manager():
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def run(optimizer, ps, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(step, ps)
        optimizer.step()


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def equal(ps, qs):
    return all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize("name", sorted(set(optim.__all__) - {"GlobalOptimManager"}))
def test_signature_begins_like_bitsandbytes(name):
    bnb = pytest.importorskip("bitsandbytes")
    if not hasattr(bnb.optim, name):
        pytest.skip("bitsandbytes has no such class")
    ours = inspect.signature(getattr(optim, name)).parameters
    theirs = inspect.signature(getattr(bnb.optim, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[key].default for key in theirs] == [parameter.default for parameter in theirs.values()]


@pytest.mark.parametrize("target", ["AdamW8bit", "AdamW32bit", "PagedAdamW8bit", "PagedAdamW32bit"])
@pytest.mark.parametrize("source", ["AdamW8bit", "AdamW32bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_state_moves_between_forms(source, target):
    ps = parameters()
    a = getattr(optim, source)(ps, lr=1e-2)
    run(a, ps, 3)
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    b = getattr(optim, target)(qs, lr=1e-3)
    b.load_state_dict(saved(a))
    assert b.param_groups[0]["lr"] == 1e-2
    run(a, ps, 2, first=3)
    run(b, qs, 2, first=3)
    if source.removeprefix("Paged") == target.removeprefix("Paged"):
        assert equal(ps, qs)
    for p, q in zip(ps, qs, strict=True):
        assert b.state[q]["state1"].dtype == (torch.uint8 if "8" in target and q.numel() >= 4096 else torch.float32)
        torch.testing.assert_close(p, q, rtol=0, atol=2e-2)  # two steps of lr 1e-2


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit", "AdEMAMix", "AdEMAMix8bit", "LAMB"])
def test_bitsandbytes_state_loads_both_ways(name):
    bnb = pytest.importorskip("bitsandbytes")
    ps, qs = parameters(), parameters()
    a, b = getattr(optim, name)(ps, lr=1e-2), getattr(bnb.optim, name)(qs, lr=1e-2)
    run(a, ps, 3)
    run(b, qs, 3)
    a2, b2 = getattr(optim, name)(ps, lr=1e-2), getattr(bnb.optim, name)(qs, lr=1e-2)
    a2.load_state_dict(saved(b))
    b2.load_state_dict(saved(a))
    for p, q in zip(ps, qs, strict=True):
        for key in a2.state[p]:
            assert (
                torch.equal(torch.as_tensor(a2.state[p][key]), torch.as_tensor(b.state[q][key])) or key == "unorm_vec"
            )
            assert (
                torch.equal(torch.as_tensor(b2.state[q][key]), torch.as_tensor(a.state[p][key])) or key == "unorm_vec"
            )
    run(a2, ps, 1)
    run(b2, qs, 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optim.AdamW, torch.optim.AdamW),
        (lambda p, lr: optim.SGD(p, lr, 0.9), lambda p, lr: torch.optim.SGD(p, lr, 0.9)),
        (optim.RMSprop, torch.optim.RMSprop),
        (optim.Adagrad, torch.optim.Adagrad),
    ],
)
def test_torch_state_loads(ours, theirs):
    ps = parameters()
    a = theirs(ps, lr=1e-2)
    run(a, ps, 3)
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    b = ours(qs, lr=1e-2)
    b.load_state_dict(saved(a))
    run(a, ps, 3, first=3)
    run(b, qs, 3, first=3)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_state_of_another_optimizer_is_refused():
    ps = parameters()
    a = torch.optim.SGD(ps, 0.1, 0.9)
    run(a, ps, 1)
    with pytest.raises(
        ValueError, match=r"expected the state of an optimizer with the rule adam, got \['momentum_buffer'\]"
    ):
        optim.AdamW(ps).load_state_dict(a.state_dict())
    b = optim.AdamW(parameters(shapes=[(3,)] * 5))
    run(b, b.param_groups[0]["params"], 1)
    with pytest.raises(ValueError, match="state1: expected 8192 elements, got 3"):
        optim.AdamW(ps).load_state_dict(b.state_dict())


def test_another_map_is_refused():
    ps = parameters(shapes=[(4096,)])
    optimizer = optim.AdamW8bit(ps)
    run(optimizer, ps, 1)
    state = saved(optimizer)
    inner = next(iter(state["state"][0][key] for key in state["state"][0] if key.startswith("__")))
    inner["qmap1"] = torch.linspace(-1, 1, 256)
    with pytest.raises(ValueError, match="qmap1: expected the dynamic map"):
        optimizer.load_state_dict(state)


def test_groups_parameters_without_gradient_and_schedulers():
    ps, qs = parameters(), parameters()
    groups = lambda xs: [{"params": xs[:2], "lr": 1e-2}, {"params": xs[2:], "weight_decay": 0.5}]  # noqa: E731
    a, b = optim.AdamW(groups(ps), lr=1e-3), torch.optim.AdamW(groups(qs), lr=1e-3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (a, b)]
    for step in range(6):
        set_gradients(step, ps, qs)
        if step % 2:
            ps[0].grad = qs[0].grad = None
        for optimizer, schedule in zip((a, b), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=step % 3 == 0)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert a.state[ps[0]]["step"] == 3 and a.state[ps[1]]["step"] == 6


def test_closure_accumulation_clipping_and_scaler():
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = optim.AdamW8bit([p], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5000
    for _ in range(2):
        (p * p).sum().backward()
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale((p * p).sum()).backward()
    p.grad[3] = float("inf")
    before = p.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(p, before)


def test_strided_parameters_and_gradients():
    base = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    p, q = torch.nn.Parameter(base.t()), torch.nn.Parameter(base.t().contiguous())
    a, b = optim.AdamW8bit([p], lr=1e-2), optim.AdamW8bit([q], lr=1e-2)
    for step in range(3):
        set_gradients(step, [p], [q])
        p.grad = p.grad.t().contiguous().t()
        a.step()
        b.step()
    assert torch.equal(p, q) and not p.is_contiguous() and p.data_ptr() == base.data_ptr()


def test_copy_and_pickle():
    ps = parameters()
    a = optim.PagedAdamW8bit(ps, lr=1e-2)
    run(a, ps, 2)
    clone = copy.deepcopy(a)
    qs = clone.param_groups[0]["params"]
    run(a, ps, 2, first=2)
    run(clone, qs, 2, first=2)
    assert equal(ps, qs)


def test_overrides(manager):
    ps = parameters(shapes=[(4096,), (4096,), (4096,)])
    module = torch.nn.Module()
    module.weight = ps[2]
    manager.override_config(ps[0], "optim_bits", 32)
    manager.override_config(ps[1], key_value_dict={"lr": 0.0, "weight_decay": 0.0})
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    manager.register_parameters(ps)
    before = ps[1].detach().clone()
    optimizer = optim.AdamW8bit(ps, lr=1e-2)
    run(optimizer, ps, 2)
    assert [optimizer.state[p]["state1"].dtype for p in ps] == [torch.float32, torch.uint8, torch.float32]
    assert torch.equal(ps[1], before)
    assert len(manager.pid2config) == 3
    with pytest.raises(ValueError, match="either key and value, or key_value_dict"):
        manager.override_config(ps[0])
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()


def test_an_override_goes_with_its_parameter(manager):
    """Another parameter may get the id of one that is gone."""
    p = torch.nn.Parameter(torch.zeros(4096))
    manager.override_config(p, "optim_bits", 32)
    manager.override_config(p, "lr", 0.0)
    assert manager.pid2config == {id(p): {"optim_bits": 32, "lr": 0.0}}
    del p
    gc.collect()
    assert manager.pid2config == {}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: optim.AdamW(p, lr=-1.0), ValueError, "lr: expected 0 or more, got -1.0"),
        (lambda p: optim.AdamW(p, betas=(1.0, 0.9)), ValueError, r"betas\[0\]: expected 0 <= beta < 1, got 1.0"),
        (lambda p: optim.AdamW(p, eps=-1.0), ValueError, "eps: expected 0 or more"),
        (lambda p: optim.AdamW(p, optim_bits=16), ValueError, "optim_bits: expected 8 or 32, got 16"),
        (lambda p: optim.AdamW(p, amsgrad=True), ValueError, "AdamW does not support amsgrad=True"),
        (lambda p: optim.Adam8bit(p, optim_bits=8), ValueError, "Adam8bit only supports optim_bits=32"),
        (lambda p: optim.Adagrad8bit(p, optim_bits=32), ValueError, "Adagrad8bit only supports optim_bits=8"),
        (lambda p: optim.Adagrad(p, lr_decay=0.1), ValueError, "lr_decay=0"),
        (lambda p: optim.Adagrad(p, initial_accumulator_value=1), ValueError, "initial_accumulator_value=0"),
        (lambda p: optim.SGD(p, 0.1), NotImplementedError, "SGD without momentum"),
        (lambda p: optim.SGD(p, 0.1, 0.9, nesterov=True), ValueError, "nesterov=False"),
        (lambda p: optim.LARS8bit(p, 0.1), NotImplementedError, "LARS8bit without momentum"),
        (lambda p: optim.RMSprop(p, alpha=0), NotImplementedError, "alpha=0"),
        (lambda p: optim.RMSprop(p, centered=True), NotImplementedError, "centered=True"),
        (lambda p: optim.RMSprop(p, momentum=0.5), ValueError, "momentum=0, got 0.5"),
        (lambda p: optim.LAMB(p, bias_correction=False), ValueError, "bias_correction=True"),
        (lambda p: optim.LAMB(p, amsgrad=True), ValueError, "amsgrad=True"),
        (lambda p: optim.LAMB8bit(p, max_unorm=2.0), ValueError, "max_unorm=1.0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make([torch.nn.Parameter(torch.ones(2))])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"expected dense gradients, got one of layout torch\.sparse_coo"):
        optim.AdamW(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("rule", "state", "message"),
    [
        ("newton", {}, "rule: expected adam, ademamix, lion, momentum, rmsprop or adagrad, got 'newton'"),
        ("adam", {"state1": torch.zeros(300, dtype=torch.uint8)}, "state1: expected float32, got uint8"),
        (
            "adam",
            {
                "state1": torch.zeros(300, dtype=torch.uint8),
                "state2": torch.zeros(300, dtype=torch.uint8),
                "absmax1": torch.zeros(2),
                "absmax2": torch.zeros(2),
                "qmap1": torch.linspace(-1, 1, 256),
                "qmap2": create_dynamic_map(False),
            },
            "qmap1: expected the signed dynamic map",
        ),
    ],
)
def test_bad_native_arguments(rule, state, message):
    x, numbers = torch.zeros(300), ("lr", "beta1", "beta2", "beta3", "alpha", "eps", "weight_decay", "max_unorm")
    states = [{"step": 1, "state1": x, "state2": x, **state}]
    with pytest.raises(ValueError, match=message):
        optim_step(rule, [x], [x], states, **dict.fromkeys(numbers, 0.0))


def test_empty_parameters_and_no_gradients():
    ps = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = optim.PagedAdamW8bit(ps)
    optimizer.step()
    ps[0].grad = torch.zeros(0, 3)
    optimizer.step()
    assert len(optimizer.state) == 1 and torch.equal(ps[1], torch.ones(3))


def test_limit_of_the_update_is_kept_and_its_norm_restored():
    p = torch.nn.Parameter(torch.ones(8, 8))
    p.grad = torch.ones_like(p)
    optimizer = optim.LAMB([p], max_unorm=0.5)
    assert optimizer.args.max_unorm == 0.5
    optimizer.step()
    other = optim.LAMB([p], max_unorm=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[p]["unorm_vec"], optimizer.state[p]["unorm_vec"]) and other.state[p]["unorm_vec"] > 0
