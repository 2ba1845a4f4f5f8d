"""The plan: every document once an epoch, nothing over capacity, and a pure function of lengths, seed and epoch.

The oracle of the packer is best-fit decreasing by its definition: for each item a search through all packs. The oracle
of the mix is an order without packing: shuffled documents, cut into steps by their tokens.
"""

import re
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.packing import LOOSE, WINDOW, Plan, best_fit_decreasing, bundles, pack_documents
from minisft.errors import UserError


def naive_best_fit_decreasing(lengths, capacity):
    """The room left in each pack."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def realistic(count, seq_len=2048, seed=0, median=250, sigma=0.9):
    """Lognormal lengths, as conversations have them: a long tail, none over `seq_len`."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, count)).astype(np.int64) + 4
    return lengths[lengths <= seq_len]


# (median, sigma): one-line exchanges, instructions, conversations of many turns
KINDS = pytest.mark.parametrize(("median", "sigma"), [(55, 0.4), (150, 0.85), (1000, 1.1)])


def plan_of(lengths, **settings):
    lengths = np.asarray(lengths)
    return Plan(lengths, lengths // 2, **{"seq_len": 64, "packs_per_step": 3, "epochs": 2, **settings})


def pack_epoch(lengths, *, epoch, **settings):
    """One epoch alone, for the laws of its packs."""
    return Plan(lengths, lengths, packs_per_step=1, epochs=1, **settings).epoch(epoch)


@given(st.integers(1, 40), st.data())
@settings(max_examples=150)
def test_packs_are_those_of_best_fit_decreasing(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    packs = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert len(packs) == len(lengths)
    assert set(packs) == set(range(len(set(packs))))
    assert sorted(capacity - np.bincount(packs, weights=lengths)) == naive_best_fit_decreasing(lengths, capacity)


def test_the_fullest_pack_with_room_is_chosen():
    # 6 and 5 open packs with 4 and 5 left; 4 fills the first although the second would do; 3 goes into the second
    assert best_fit_decreasing(np.array([3, 5, 4, 6]), 10).tolist() == [1, 1, 0, 0]


def test_items_of_one_length_are_placed_together():
    # 6 and 6 open packs with 4 left each; seven items of 2 fill both, and the other three go into a third
    assert best_fit_decreasing(np.array([2, 6, 2, 2, 6, 2, 2, 2, 2]), 10).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=100), st.integers(0, 30))
@settings(max_examples=100)
def test_bundles_are_those_between_two_marks(lengths, size):
    expected, end, first_behind = [], 0, {}
    for document, length in enumerate(lengths):
        if length >= size:
            expected.append(document)
            continue
        start, end = end, end + length
        single = end < LOOSE * sum(lengths)
        expected.append(document if single else first_behind.setdefault(start // size, document))
    item = bundles(np.array(lengths), size)
    assert item.tolist() == expected
    assert all(sum(n for n, i in zip(lengths, expected, strict=True) if i == first) < 2 * size
               for first in first_behind.values())


@given(st.integers(1, 64), st.data())
@settings(max_examples=100)
def test_bundles_never_cost_a_small_set_a_pack(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80)))
    packs = pack_documents(lengths, capacity)
    loads = np.bincount(packs, weights=lengths)
    assert (loads > 0).all()
    assert loads.max() <= capacity
    assert len(loads) <= len(naive_best_fit_decreasing(lengths.tolist(), capacity))


@pytest.mark.parametrize("length", [1, 130, 257, 700, 2048])
def test_documents_of_one_length_fill_packs_as_well_as_they_can(length):
    packs = pack_documents(np.full(5000, length), 2048)
    assert len(set(packs)) == -(-5000 // (2048 // length))


@KINDS
def test_steps_mix_documents_as_an_unpacked_order_does(median, sigma):
    """The spread over steps of the share of the tokens that are in shorter documents."""
    seq_len, packs_per_step = 8192, 32
    lengths = realistic(150_000 if median < 1000 else 60_000, seq_len, median=median, sigma=sigma)
    ordered = np.sort(lengths)
    typical = ordered[np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)]

    def spread(step):
        short = np.bincount(step, weights=lengths * (lengths < typical)) / np.bincount(step, weights=lengths)
        return short[:-1].std()

    random = np.random.default_rng(1)
    unpacked, order = np.empty(len(lengths), dtype=np.int64), random.permutation(len(lengths))
    unpacked[order] = (np.cumsum(lengths[order]) - 1) // (seq_len * packs_per_step)
    packs = best_fit_decreasing(lengths, seq_len)
    plain = random.permutation(packs.max() + 1)[packs] // packs_per_step
    plan = plan_of(lengths, seq_len=seq_len, packs_per_step=packs_per_step, epochs=1)
    planned = np.empty_like(unpacked)
    for step in range(plan.total_steps):
        planned[np.concatenate(plan.documents(step))] = step
    print(f"unpacked {spread(unpacked):.4f}, best fit alone {spread(plain):.4f}, plan {spread(planned):.4f}")
    if median < 1000:
        assert spread(planned) < spread(plain) / 2
    assert spread(planned) < 3 * spread(unpacked)


@KINDS
@pytest.mark.parametrize("seq_len", [2048, 4096, 8192])
def test_packs_are_as_full_as_those_of_the_definition(median, sigma, seq_len):
    lengths = realistic(4000 if median < 1000 else 1500, seq_len, median=median, sigma=sigma)
    plan = plan_of(lengths, seq_len=seq_len, epochs=1)
    naive = lengths.sum() / (seq_len * len(naive_best_fit_decreasing(lengths.tolist(), seq_len)))
    assert plan.fill() >= naive - 0.001


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(0, 2**32 - 1), st.integers(0, 5),
       st.booleans())
@settings(max_examples=60)
def test_every_document_once_an_epoch_and_no_pack_too_long(lengths, seed, epoch, shuffle):
    lengths = np.array(lengths)
    packed = pack_epoch(lengths, seq_len=64, seed=seed, epoch=epoch, shuffle=shuffle)
    packs = [packed.pack(i) for i in range(len(packed))]
    assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
    assert all(0 < lengths[pack].sum() <= 64 for pack in packs)
    again = pack_epoch(lengths, seq_len=64, seed=seed, epoch=epoch, shuffle=shuffle)
    assert [p.tolist() for p in packs] == [again.pack(i).tolist() for i in range(len(again))]


def test_epochs_and_seeds_differ_and_windows_do_not_lose_documents():
    lengths = realistic(2 * WINDOW + 100)
    orders = {(seed, epoch): pack_epoch(lengths, seq_len=2048, seed=seed, epoch=epoch).documents
              for seed, epoch in ((0, 0), (0, 1), (1, 0))}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    assert not any(np.array_equal(orders[0, 0], orders[other]) for other in ((0, 1), (1, 0)))


def test_shuffling_mixes_lengths_over_the_steps():
    """Packs leave the packer longest documents first; a step must still be a sample of all of them."""
    lengths = np.concatenate((np.full(500, 60), np.full(500, 10)))
    plan = plan_of(lengths, packs_per_step=60, epochs=1)
    long = [np.mean(lengths[np.concatenate(plan.documents(step))] == 60) for step in range(plan.total_steps - 1)]
    assert min(long) > 0
    assert max(long) < 1


def test_unshuffled_packs_follow_the_file():
    lengths = realistic(WINDOW + 500)
    packed = pack_epoch(lengths, seq_len=2048, seed=0, epoch=0, shuffle=False)
    packs = [packed.pack(i).tolist() for i in range(len(packed))]
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == sorted(packs)
    assert max(pack[-1] - pack[0] for pack in packs) < WINDOW
    assert np.array_equal(packed.documents, pack_epoch(lengths, seq_len=2048, seed=5, epoch=3, shuffle=False).documents)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 4),
       st.none() | st.integers(1, 40))
@settings(max_examples=80)
def test_steps_walk_through_the_epochs(lengths, packs_per_step, epochs, max_steps):
    plan = plan_of(lengths, packs_per_step=packs_per_step, epochs=epochs, max_steps=max_steps)
    step = counted = 0
    for epoch in range(epochs):
        packed = pack_epoch(np.array(lengths), seq_len=64, seed=0, epoch=epoch)
        packs = [packed.pack(i).tolist() for i in range(len(packed))]
        count = -(-len(packs) // packs_per_step)  # as few as can be
        counted += count
        if epoch == 0:
            assert plan.steps_per_epoch == count
        found = []
        for _ in range(min(count, plan.total_steps - step)):
            place = plan.place(step)
            found.append([pack.tolist() for pack in plan.documents(step)])
            assert (place.epoch, place.last - place.first) == (epoch, len(found[-1]))
            assert len(found[-1]) in (len(packs) // count, -(-len(packs) // count))
            step += 1
        together = [pack for step in found for pack in step]
        assert together == packs[: len(together)]
        assert len(found) < count or together == packs
    assert step == plan.total_steps == min(max_steps or counted, counted)


@pytest.mark.parametrize(("packs", "sizes"), [(97, [25, 24, 24, 24]), (65, [22, 22, 21]), (64, [32, 32]), (5, [5])])
def test_the_steps_of_an_epoch_are_of_even_size(packs, sizes):
    """A last step of what is left over would weigh its tokens many times those of the others."""
    plan = plan_of([64] * packs, packs_per_step=32, epochs=2)
    assert [len(plan.documents(step)) for step in range(plan.total_steps)] == sizes * 2
    for first in (0, len(sizes)):
        documents = np.concatenate([pack for s in range(len(sizes)) for pack in plan.documents(first + s)])
        assert sorted(documents) == list(range(packs))


@pytest.mark.parametrize(("max_steps", "total"), [(1, 1), (3, 3), (4, 4), (6, 6), (7, 6), (None, 6)])
def test_max_steps_ends_a_run_and_never_lengthens_it(max_steps, total):
    assert plan_of([64] * 7, packs_per_step=3, epochs=2, max_steps=max_steps).total_steps == total


def test_a_thousand_epochs_cost_nothing_where_max_steps_ends_the_run():
    plan = plan_of(realistic(2000), seq_len=2048, packs_per_step=8, epochs=10**6, max_steps=50)
    assert plan.total_steps == 50


@KINDS
def test_a_million_documents_are_packed_fully_and_quickly(median, sigma):
    lengths = np.resize(realistic(1_000_000, 8192, median=median, sigma=sigma), 1_000_000)
    start = time.process_time()  # not the clock: other processes may share the machine
    plan = Plan(lengths, lengths // 2, seq_len=8192, packs_per_step=32, epochs=1)
    seconds = time.process_time() - start
    print(f"{len(lengths)} documents in {seconds:.2f} s, {plan.fill():.3%} full")
    assert seconds < 5
    assert plan.fill() == pytest.approx(lengths.sum() / (len(plan.epoch(0)) * 8192))
    assert plan.fill() > 0.995


def test_packing_needs_arrays_only():
    lengths = realistic(100_000, 8192)
    tracemalloc.start()
    pack_epoch(lengths, seq_len=8192, seed=0, epoch=0)
    peak = tracemalloc.get_traced_memory()[1] / len(lengths)
    tracemalloc.stop()
    print(f"{peak:.0f} bytes a document")
    assert peak < 150


def test_weights_repeat_and_sample_documents() -> None:
    """Weight 2 comes twice, 0.5 in every other epoch on average, and always from the same draw for the same epoch."""
    lengths = np.full(2000, 10)
    weights = np.repeat([2.0, 0.5, 1.0, 1.25], 500)
    plan = Plan(lengths, lengths, seq_len=100, packs_per_step=4, epochs=2, passes=weights)
    times = np.bincount(plan.epoch(0).documents, minlength=2000).reshape(4, 500)
    assert (times[0] == 2).all()
    assert (times[2] == 1).all()
    assert set(times[1]) == {0, 1}
    assert set(times[3]) == {1, 2}
    assert times[1].mean() == pytest.approx(0.5, abs=0.08)
    assert times[3].mean() == pytest.approx(1.25, abs=0.08)
    again = Plan(lengths, lengths, seq_len=100, packs_per_step=4, epochs=2, passes=weights)
    assert np.array_equal(again.epoch(1).documents, plan.epoch(1).documents)
    assert not np.array_equal(np.bincount(plan.epoch(1).documents, minlength=2000).reshape(4, 500), times)


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights of the sources in data\.train are too small"):
        Plan(np.array([5]), np.array([5]), seq_len=10, packs_per_step=1, epochs=1, passes=np.array([1e-9]))


@pytest.mark.parametrize(("weights", "shuffle"), [(None, True), (None, False), (2.5, True), (0.3, True)])
@pytest.mark.parametrize("max_steps", [1, 40, 200, None])
def test_the_steps_are_those_of_all_epochs_packed_one_after_another(weights, shuffle, max_steps):
    lengths = realistic(150)
    options = {"seed": 3, "shuffle": shuffle, "passes": None if weights is None else np.full(len(lengths), weights)}
    plan = plan_of(lengths, seq_len=2048, packs_per_step=2, epochs=12, max_steps=max_steps, **options)
    places = [(epoch, first) for epoch in range(12)
              for first in range(0, len(pack_epoch(lengths, seq_len=2048, epoch=epoch, **options)), 2)]
    assert plan.total_steps == min(max_steps or len(places), len(places))
    for step in (plan.total_steps - 1, 0, *range(plan.total_steps)):  # the last one first, as a resumed run does
        place = plan.place(step)
        assert (place.epoch, place.first) == places[step]


def test_more_epochs_than_can_be_counted_are_refused_at_once():
    lengths = realistic(2000)
    with pytest.raises(UserError, match=r"train\.epochs = 1000000: the steps of more than 10,000 epochs are not "
                                        r"counted; lower it, or set train\.max_steps to at most (\d+)") as error:
        plan_of(lengths, seq_len=2048, packs_per_step=8, epochs=10**6)
    most = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert plan_of(lengths, seq_len=2048, packs_per_step=8, epochs=10**6, max_steps=most).total_steps == most
    with pytest.raises(UserError, match="lower it, or set"):
        plan_of(lengths, seq_len=2048, packs_per_step=8, epochs=10**6, max_steps=most + 1)
    few = plan_of([5] * 40, epochs=10**6, max_steps=50, passes=np.full(40, 0.5))
    assert few.total_steps == 50
