import numpy as np
import pytest

from numina_finetune.data.loader import NO_LOSS, Loader, supervised_tokens
from numina_finetune.data.token_index import TokenIndex
from numina_finetune.errors import DataError

PAD = 0


def make_index(count=60, sources=1, data_key="ab" * 32, longest=16):
    """Samples of random lengths; sample n is made of tokens 1000·(n+1), 1000·(n+1)+1, …"""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest + 1, count)
    ids = np.concatenate([1000 * (n + 1) + np.arange(length) for n, length in enumerate(lengths)])
    mask = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    return TokenIndex(
        input_ids=ids.astype(np.int32),
        loss_mask=mask,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source_of=np.sort(np.arange(count) % sources).astype(np.int16),
        members=np.arange(count),
        data_key=data_key,
        report={},
    )


def make_loader(index=None, **changes):
    options = {"seq_len": 32, "packing": True, "seed": 0, "pad_id": PAD} | changes
    return Loader(index or make_index(), **options)


def samples_of(batch):
    """The tokens of each segment, in order."""
    return [
        tuple(ids[segments == number].tolist())
        for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True)
        for number in range(1, segments.max() + 1)
    ]


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_each_sample_once(packing):
    index = make_index()
    loader = make_loader(index, packing=packing)
    seen = samples_of(loader.batch(0, loader.rows_per_epoch))
    assert sorted(seen) == sorted(tuple(index.sample(n)[0].tolist()) for n in range(len(index)))
    assert packing == (loader.rows_per_epoch < len(index))


def test_batches_are_int32_of_one_shape_with_labels_shifted_inside_segments():
    index = make_index()
    loader = make_loader(index)
    batch = loader.batch(0, loader.rows_per_epoch)
    assert all(array.dtype == np.int32 and array.shape == (loader.rows_per_epoch, 32) for array in batch)
    for row in range(loader.rows_per_epoch):
        ids, labels, segments, positions = (array[row] for array in batch)
        for place in range(32):
            if segments[place] == 0:
                assert (ids[place], labels[place], positions[place]) == (PAD, NO_LOSS, 0)
                continue
            sample = ids[place] // 1000 - 1
            tokens, mask = index.sample(sample)
            position = positions[place]
            assert ids[place] == tokens[position]
            learns = position + 1 < len(tokens) and mask[position + 1]
            assert labels[place] == (tokens[position + 1] if learns else NO_LOSS)


def test_supervised_tokens_of_an_epoch_are_those_of_the_samples():
    index = make_index()
    loader = make_loader(index)
    expected = sum(int(index.sample(n)[1][1:].sum()) for n in range(len(index)))
    assert supervised_tokens(loader.batch(0, loader.rows_per_epoch)) == expected


@pytest.mark.parametrize("weights", [None, [2, 1]])
def test_seeking_gives_the_same_rows_as_walking(weights):
    index = make_index(sources=2)
    walked = make_loader(index, weights=weights).batch(0, 200)
    for first in (0, 7, 93, 150):
        sought = make_loader(index, weights=weights).batch(first, 50)
        assert equal([array[first : first + 50] for array in walked], sought)


def test_hosts_that_take_slices_together_have_the_whole_batch():
    loader = make_loader()
    whole = loader.batch(8, 8)
    halves = [make_loader().batch(8, 4), make_loader().batch(12, 4)]
    assert equal(whole, [np.concatenate(parts) for parts in zip(*halves, strict=True)])


def test_order_depends_on_seed_epoch_and_data():
    loader = make_loader()
    rows = loader.rows_per_epoch
    first = loader.batch(0, rows)
    assert not equal(first, loader.batch(rows, rows))
    assert not equal(first, make_loader(seed=1).batch(0, rows))
    assert not equal(first, make_loader(make_index(data_key="cd" * 32)).batch(0, rows))


def test_without_shuffling_every_epoch_is_the_same_and_unpacked_samples_keep_their_order():
    index = make_index()
    loader = make_loader(index, packing=False, shuffle=False)
    assert samples_of(loader.batch(0, 60)) == [tuple(index.sample(n)[0].tolist()) for n in range(60)]
    assert equal(loader.batch(0, 60), loader.batch(60, 60))


def test_rows_from_the_end_on_are_empty():
    loader = make_loader()
    batch, whole = loader.batch(4, 4, end_row=6), loader.batch(4, 4)
    assert equal([array[:2] for array in batch], [array[:2] for array in whole])
    assert (batch.input_ids[2:] == PAD).all() and (batch.labels[2:] == NO_LOSS).all()
    assert not batch.segment_ids[2:].any() and not batch.position_ids[2:].any()
    assert supervised_tokens(loader.batch(10, 4, end_row=6)) == 0


def test_rows_for_epochs_counts_fractions_and_repeats():
    loader = make_loader(packing=False)
    assert [loader.rows_for_epochs(epochs) for epochs in (0.5, 1, 3)] == [30, 60, 180]


def test_weighted_run_ends_when_the_first_source_has_finished_its_epochs():
    loader = make_loader(make_index(sources=2), packing=False, weights=[3, 1])
    rows = loader.rows_for_epochs(2)
    first, second = loader.progress(rows)["sources"]
    assert first == {"cursor": 60, "rows_per_epoch": 30, "epoch": 2}
    assert second["cursor"] < 60
    assert loader.progress(rows - 1)["sources"][0]["cursor"] == 59


def test_weighted_sources_each_show_all_their_samples_in_an_epoch():
    index = make_index(sources=2)
    loader = make_loader(index, packing=False, weights=[1, 1])
    batch = loader.batch(0, loader.rows_for_epochs(1))
    seen = [tokens[0] // 1000 - 1 for tokens in samples_of(batch)]
    cursors = [source["cursor"] for source in loader.progress(len(seen))["sources"]]
    for source, cursor in enumerate(cursors):
        mine = [sample for sample in seen if index.sources[sample] == source]
        assert len(mine) == len(set(mine)) == cursor
    assert max(cursors) == 30


def test_progress_without_weights_is_one_sequence():
    loader = make_loader(packing=False)
    assert loader.progress(70) == {"rows": 70, "sources": [{"cursor": 70, "rows_per_epoch": 60, "epoch": 1}]}


def test_sample_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="16 tokens"):
        make_loader(seq_len=8)


def test_weighted_source_without_samples_is_refused():
    with pytest.raises(DataError, match="dataset 2"):
        make_loader(make_index(sources=1), weights=[1, 1])


def test_members_choose_the_samples():
    index = make_index()
    part = TokenIndex(**{**vars(index), "members": np.array([5, 9, 11])})
    loader = make_loader(part, packing=False)
    assert sorted(tokens[0] // 1000 - 1 for tokens in samples_of(loader.batch(0, 3))) == [5, 9, 11]
