from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pyqlora.finetune.batches import Order, collate
from pyqlora.finetune.encode import IGNORED, Encoded


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=70),
    batch_size=st.integers(1, 5),
    grad_accum=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_every_sample_once(lengths, batch_size, grad_accum, seed):
    order = Order(lengths, batch_size, grad_accum, seed)
    steps = [order.step(i) for i in range(order.steps_per_epoch)]
    assert sorted(i for step in steps for batch in step for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for step in steps for batch in step)
    assert all(1 <= len(step) <= grad_accum for step in steps)


def test_a_step_depends_on_seed_and_number_alone():
    lengths = list(range(2, 60))
    there = [Order(lengths, 3, 2, 7).step(i) for i in range(30)]
    back = [Order(lengths, 3, 2, 7).step(i) for i in reversed(range(30))]
    assert there == back[::-1]
    assert there[:10] != there[10:20]  # another epoch
    assert there != [Order(lengths, 3, 2, 8).step(i) for i in range(30)]


def test_batches_hold_similar_lengths():
    lengths = [2, 100] * 16
    order = Order(lengths, 4, 1, 0)
    assert all(len({lengths[i] for i in order.step(s)[0]}) == 1 for s in range(order.steps_per_epoch))


def test_collate_pads_on_the_right_and_shifts_the_labels():
    samples = [Encoded([5, 6, 7], [IGNORED, IGNORED, 7]), Encoded([8, 9], [IGNORED, 9])]
    ids, mask, labels = collate(samples, 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[IGNORED, 7], [9, IGNORED]]
