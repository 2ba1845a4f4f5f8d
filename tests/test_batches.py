"""Batches: however many ranks and packs a pass, the same documents and targets reach a step.

The oracle is a loop over each document by itself: token i + 1 is the target after token i where its mask says so.
"""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.batches import ahead, deal, micro_batch, steps
from minisft.data.packing import Plan
from minisft.lora.adapters import token_bits


class Documents:
    """A data set of made-up documents, each token different from every other in the set."""

    def __init__(self, masks):
        self.masks = [np.array([0, *mask], dtype=np.uint8) for mask in masks]
        self.lengths = np.array([len(mask) for mask in self.masks])
        self.num_loss_tokens = np.array([int(mask.sum()) for mask in self.masks])
        starts = np.cumsum(self.lengths) - self.lengths
        self.ids = [np.arange(s, s + n, dtype=np.uint32) for s, n in zip(starts, self.lengths, strict=True)]

    def document(self, index):
        return self.ids[index], self.masks[index]

    def pairs(self, indices):
        """(token, next token) for each trained token of these documents."""
        return Counter((int(ids[i]), int(ids[i + 1])) for ids, mask in map(self.document, indices)
                       for i in range(len(ids) - 1) if mask[i + 1])


MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=15), min_size=1, max_size=40)
RANDOM = np.random.default_rng(0)
DOCUMENTS = Documents([RANDOM.integers(0, 2, RANDOM.integers(1, 15)) for _ in range(83)])
PLAN = Plan(DOCUMENTS.lengths, DOCUMENTS.num_loss_tokens, seq_len=16, packs_per_step=7, epochs=2)


def streams(step):
    return [batch for batch in step.micro_batches if batch.document_ids[0] >= 0]  # the others are padding alone


def content(batches):
    """All documents in some batches, as tuples of tokens, and all (token, target) pairs."""
    documents, pairs = Counter(), Counter()
    for batch in batches:
        documents.update(tuple(part.tolist()) for part in torch.split(batch.tokens, batch.lengths))
        pairs.update(zip(batch.tokens[batch.target_at].tolist(), batch.targets.tolist(), strict=True))
    return documents, pairs


def test_the_drawing_in_the_module():
    documents = Documents([[0, 1, 1], [1, 1]])
    batch = micro_batch(documents, [0, 1])
    assert batch.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.lengths == (4, 3)
    assert batch.target_at.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [2, 3, 5, 6]
    assert {batch.tokens.dtype, batch.targets.dtype, batch.target_at.dtype} == {torch.int64}


@given(MASKS)
@settings(max_examples=60)
def test_targets_are_those_of_each_document_alone(masks):
    documents = Documents(masks)
    batch = micro_batch(documents, list(range(len(masks))))
    assert content([batch])[1] == documents.pairs(range(len(masks)))
    assert len(batch.targets) == documents.num_loss_tokens.sum()
    owner = np.repeat(np.arange(len(masks)), documents.lengths)
    after = batch.target_at.numpy()
    assert np.array_equal(owner[after], owner[after + 1]), "a target lies in the next document"


@pytest.mark.parametrize("micro_packs", [1, 2, 3, 50])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
def test_global_batches_do_not_depend_on_ranks_and_micro_packs(ranks, micro_packs):
    runs = [list(steps(DOCUMENTS, PLAN, rank=rank, ranks=ranks, micro_packs=micro_packs)) for rank in range(ranks)]
    assert {len(run) for run in runs} == {PLAN.total_steps}
    for index, of_ranks in enumerate(zip(*runs, strict=True)):
        packs = PLAN.documents(index)
        planned = np.concatenate(packs).tolist()
        documents, pairs = content([batch for step in of_ranks for batch in streams(step)])
        assert documents == Counter(tuple(DOCUMENTS.ids[i].tolist()) for i in planned)
        assert pairs == DOCUMENTS.pairs(planned)
        most_packs = -(-len(packs) // ranks)
        assert {len(step.micro_batches) for step in of_ranks} == {-(-most_packs // micro_packs)}
        batches = [batch for step in of_ranks for batch in streams(step)]
        assert all(len(batch.tokens) <= 16 * micro_packs for batch in batches)
        for step in of_ranks:
            assert (step.index, step.epoch) == (index, PLAN.place(index).epoch)
            assert step.tokens == sum(len(batch.tokens) for batch in batches)
            assert step.target_tokens == sum(len(batch.targets) for batch in batches)


def drawn(documents, plan, *, ranks=1, micro_packs=1):
    """For each step how often each document came with which random bits."""
    found = [Counter() for _ in range(plan.total_steps)]
    for rank in range(ranks):
        for step in steps(documents, plan, rank=rank, ranks=ranks, micro_packs=micro_packs):
            for batch in streams(step):
                bits = token_bits(batch.document_ids, batch.positions, (1, 2))
                parts = zip(*(torch.split(t, batch.lengths) for t in (batch.tokens, bits)), strict=True)
                found[step.index].update((tuple(tokens.tolist()), tuple(bits.tolist())) for tokens, bits in parts)
    return found


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(2, 5), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_each_copy_of_a_document_in_a_step_draws_bits_of_its_own(weights, ranks, micro_packs, packs_per_step):
    """And the same ones on any number of ranks, and in whatever packs the copies lie."""
    documents, times = Documents([[1] * (n % 4 + 1) for n in range(len(weights) + 1)]), np.array([4.0, *weights])
    plans = [Plan(documents.lengths, documents.num_loss_tokens, seq_len=seq_len, packs_per_step=packs, epochs=1,
                  seed=seed, passes=times)
             for seq_len, packs, seed in ((8, packs_per_step, 0), (8, 10**6, 1), (40, 10**6, 2))]
    here = drawn(documents, plans[0])
    assert all(count == 1 for step in here for count in step.values())
    assert drawn(documents, plans[0], ranks=ranks, micro_packs=micro_packs) == here
    assert drawn(documents, plans[1]) == drawn(documents, plans[2])
    alone = [micro_batch(documents, [i]) for i in np.flatnonzero(times).tolist()]
    first = {tuple(token_bits(batch.document_ids, batch.positions, (1, 2)).tolist()) for batch in alone}
    assert first <= {bits for _, bits in drawn(documents, plans[1])[0]}, "the first copy's are the document's own"


def test_a_rank_without_a_pack_idles_through_the_same_rounds():
    plan = Plan(np.full(1, 16), np.full(1, 2), seq_len=16, packs_per_step=3, epochs=1)
    documents = Documents([[0] * 13 + [1, 1]])
    last = [list(steps(documents, plan, rank=rank, ranks=2, micro_packs=1))[-1] for rank in range(2)]
    assert [len(streams(step)) for step in last] == [1, 0]
    [idle] = last[1].micro_batches
    assert (idle.tokens.tolist(), idle.lengths, len(idle.targets), len(idle.target_at)) == ([0], (1,), 0, 0)
    assert [(step.tokens, step.target_tokens) for step in last] == [(16, 2)] * 2


def test_the_deal_in_the_docstring():
    assert deal(np.array([3, 5, 8, 1, 9, 6]), ranks=2) == [[4, 5, 3], [2, 1, 0]]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50), st.integers(1, 12))
@settings(max_examples=150)
def test_dealing_is_a_partition_into_equal_numbers_dearest_first(costs, ranks):
    hands = deal(np.array(costs), ranks=ranks)
    assert len(hands) == ranks
    assert sorted(pack for hand in hands for pack in hand) == list(range(len(costs)))
    sizes = [len(hand) for hand in hands]
    assert max(sizes) - min(sizes) <= 1
    assert all(costs[a] >= costs[b] for hand in hands for a, b in itertools.pairwise(hand))
    assert hands == deal(np.array(costs), ranks=ranks)


@given(st.lists(st.integers(1, 100), min_size=6, max_size=6), st.integers(2, 3))
@settings(max_examples=100)
def test_a_small_deal_is_the_best_that_gives_each_rank_one_pack_a_round(costs, ranks):
    def dearest(hands):
        return max(sum(costs[pack] for pack in hand) for hand in hands)

    ordered = np.argsort(-np.array(costs), kind="stable")
    rounds = [itertools.permutations(ordered[i : i + ranks]) for i in range(0, len(costs), ranks)]
    best = min(dearest(zip(*chosen, strict=True)) for chosen in itertools.product(*rounds))
    assert dearest(deal(np.array(costs), ranks=ranks)) == best


def conversations(median, sigma, seq_len, count=20_000):
    """Lognormal lengths, a fixed sample."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(median), sigma, count)).astype(np.int64) + 4
    return lengths[lengths <= seq_len]


@pytest.mark.parametrize("seq_len", [2048, 4096, 8192])
@pytest.mark.parametrize(("median", "sigma", "count"), [(55, 0.4, 500_000), (1000, 1.1, 30_000)])
def test_attention_costs_the_same_on_all_ranks(median, sigma, count, seq_len):
    lengths = conversations(median, sigma, seq_len, count)
    plan = Plan(lengths, lengths, seq_len=seq_len, packs_per_step=32, epochs=1)
    spreads = {"in turn": [], "dealt": []}
    epoch = plan.epoch(0)
    for first in range(0, min(len(epoch) - 31, 3200), 32):
        costs = np.array([sum(int(lengths[i]) ** 2 for i in epoch.pack(first + k)) for k in range(32)])
        hands = deal(costs, ranks=8)
        for name, dealt in (("in turn", [list(range(rank, 32, 8)) for rank in range(8)]), ("dealt", hands)):
            sums = costs[np.array(dealt)].sum(axis=1)
            spreads[name].append((sums.max() - sums.min()) / sums.mean())
        # Micro-batches that run together: no deal waits less than that of all packs by their cost.
        assert costs[np.array(hands)].max(axis=0).sum() == np.sort(costs)[::-8].sum()
    in_turn, dealt = np.median(spreads["in turn"]), np.median(spreads["dealt"])
    print(f"{len(spreads['dealt'])} steps: in turn {in_turn:.1%}, dealt {dealt:.1%}")
    assert dealt < 0.05 < in_turn


@pytest.mark.parametrize("start", [0, 1, PLAN.steps_per_epoch - 1, PLAN.steps_per_epoch, PLAN.total_steps])
def test_starting_late_is_skipping(start):
    def plain(step):
        batches = [(b.tokens.tolist(), b.lengths, b.targets.tolist(), b.target_at.tolist()) for b in step.micro_batches]
        return step.index, step.epoch, step.tokens, step.target_tokens, batches

    whole = [plain(step) for step in steps(DOCUMENTS, PLAN, rank=1, ranks=2, micro_packs=2)]
    late = [plain(step) for step in steps(DOCUMENTS, PLAN, start=start, rank=1, ranks=2, micro_packs=2)]
    assert late == whole[start:]


@given(MASKS, st.integers(0, 40))
@settings(max_examples=60)
def test_padding_changes_nothing_but_the_number_of_tokens(masks, missing):
    batch = micro_batch(Documents(masks), list(range(len(masks))))
    size = len(batch.tokens) + missing
    longer = micro_batch(Documents(masks), list(range(len(masks))), size=size, longest=16)
    assert len(longer.tokens) == len(longer.positions) == sum(longer.lengths) == size
    assert longer.lengths[: len(batch.lengths)] == batch.lengths
    assert all(1 <= length <= 16 for length in longer.lengths[len(batch.lengths) :])
    assert torch.equal(longer.tokens[: len(batch.tokens)], batch.tokens)
    assert torch.equal(longer.targets, batch.targets)
    assert torch.equal(longer.target_at, batch.target_at)
    assert longer.document_ids.tolist() == [*batch.document_ids.tolist(), *[-1] * missing]


@pytest.mark.parametrize("ranks", [1, 3, 11])
def test_fixed_steps_have_one_shape_and_the_same_targets_and_counts(ranks):
    for rank in range(ranks):
        of_rank = {"rank": rank, "ranks": ranks, "micro_packs": 2}
        free, fixed = list(steps(DOCUMENTS, PLAN, **of_rank)), list(steps(DOCUMENTS, PLAN, **of_rank, fixed=True))
        assert {len(batch.tokens) for step in fixed for batch in step.micro_batches} == {32}
        for before, after in zip(free, fixed, strict=True):
            assert (after.tokens, after.target_tokens) == (before.tokens, before.target_tokens)
            assert content(after.micro_batches)[1] == content(before.micro_batches)[1]


@given(MASKS)
@settings(max_examples=30)
def test_offsets_and_positions_are_those_of_each_document(masks):
    batch = micro_batch(Documents(masks), list(range(len(masks))))
    assert batch.cu_seqlens.tolist() == [sum(batch.lengths[:i]) for i in range(len(masks) + 1)]
    assert batch.positions.tolist() == [i for length in batch.lengths for i in range(length)]
    assert batch.longest == max(len(mask) + 1 for mask in masks)
    assert (batch.cu_seqlens.dtype, batch.positions.dtype) == (torch.int32, torch.int64)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("number", [1, 2, 7])
def test_items_come_in_order_and_no_more_are_made_than_asked_for(number):
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    came = []
    for item in ahead(items(), number):
        came.append(item)
        assert len(made) <= len(came) + number
    assert came == made == list(range(20))
    assert not threads()


def test_the_next_item_is_made_while_this_one_is_used():
    made = threading.Event()

    def items():
        yield 1
        made.set()
        yield 2

    stream = ahead(items(), 1)
    assert next(stream) == 1
    assert made.wait(10), "nobody makes the second item before it is asked for"
    stream.close()


def test_the_threads_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("the disk is gone")

    stream = ahead(items(), 3)
    assert next(stream) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not threads()


def test_a_stream_that_is_left_early_leaves_no_thread():
    stream = steps(DOCUMENTS, PLAN)
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert not threads()
