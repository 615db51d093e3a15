"""Packing loses nothing, mixes nothing up, and tells where everything went."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.packing import GroupRows, pack_documents, pack_groups, place, place_inputs

LENGTH = 16


@st.composite
def groups(draw):
    """Prompts, and completions that fit a row of LENGTH with them; all token ids are different."""
    family = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 8), max_size=6))
    sizes = draw(st.lists(family, min_size=1, max_size=6))
    fresh = iter(range(1, 10_000))
    prompts = [np.array([next(fresh) for _ in range(n)]) for n, _ in sizes]
    members = [(i, width) for i, (_, widths) in enumerate(sizes) for width in widths]
    members = draw(st.permutations(members))
    return prompts, [(i, np.array([next(fresh) for _ in range(width)])) for i, width in members]


def visible(rows: GroupRows, row: int, column: int) -> list[int]:
    """The columns that a position reads, as attention masks it."""
    segments, parents = rows.segments[row], rows.parents[row]
    return [c for c in range(column + 1) if segments[c] in (segments[column], parents[column])]


@settings(max_examples=25, deadline=None)
@given(groups(), st.booleans())
def test_every_completion_token_is_predicted_once_from_its_own_context(data, share_prompt):
    prompts, completions = data
    rows = pack_groups(prompts, completions, LENGTH, share_prompt)
    predicted = set()
    for row, column in np.argwhere(rows.is_completion):
        i, k = rows.completion_index[row, column], rows.offset[row, column]
        prompt, ids = completions[i]
        assert rows.targets[row, column] == ids[k]
        read = visible(rows, row, column)
        np.testing.assert_array_equal(rows.tokens[row, read], [*prompts[prompt], *ids[:k]])
        np.testing.assert_array_equal(rows.positions[row, read], np.arange(len(read)))
        predicted.add((i, k))
    assert predicted == {(i, k) for i, (_, ids) in enumerate(completions) for k in range(len(ids))}
    assert rows.is_completion.sum() == len(predicted)


@settings(max_examples=25, deadline=None)
@given(groups(), st.booleans())
def test_places_that_hold_no_target_are_prompt_or_padding(data, share_prompt):
    prompts, completions = data
    rows = pack_groups(prompts, completions, LENGTH, share_prompt)
    rest = ~rows.is_completion
    assert (rows.completion_index[rest] == -1).all() and not rows.targets[rest].any() and not rows.offset[rest].any()
    padding = rows.segments == 0
    assert ((rows.reader == -1) == padding).all()
    assert not any(a[padding].any() for a in (rows.tokens, rows.positions, rows.parents, rows.is_completion))
    for row, column in np.argwhere(rest & ~padding):
        prompt, _ = completions[rows.reader[row, column]]
        assert rows.tokens[row, column] == prompts[prompt][rows.positions[row, column]]


def test_a_shared_prompt_is_read_once_in_each_row():
    prompts = [np.arange(1, 6), np.arange(11, 14)]
    completions = [(i % 2, np.full(3, 20 + i)) for i in range(10)]
    rows = pack_groups(prompts, completions, LENGTH, share_prompt=True)
    for row in range(len(rows.tokens)):
        prompt_tokens = rows.tokens[row][~rows.is_completion[row] & (rows.segments[row] > 0)]
        assert len(prompt_tokens) == len(set(prompt_tokens))
    assert rows.tokens.size < pack_groups(prompts, completions, LENGTH, share_prompt=False).tokens.size


@pytest.mark.parametrize("share_prompt", [True, False])
def test_what_fits_exactly_leaves_no_padding(share_prompt):
    # Three rows' worth: 10 + 6, 9 + 7, and 8 + 4 + 4 tokens; a prompt of one token adds none.
    widths = [4, 10, 7, 8, 9, 4, 6]
    rows = pack_groups([np.array([5])], [(0, np.arange(w)) for w in widths], LENGTH, share_prompt)
    assert rows.tokens.shape == (3, LENGTH) and rows.is_completion.all()


def test_the_number_of_rows_is_padded_to_a_multiple():
    completions = [(0, np.arange(1, 9)) for _ in range(3)]
    bare = pack_groups([np.array([5, 6])], completions, LENGTH, True)
    padded = pack_groups([np.array([5, 6])], completions, LENGTH, True, rows_multiple=8)
    assert padded.tokens.shape == (8, LENGTH)
    for name, array in padded._asdict().items():
        np.testing.assert_array_equal(array[: len(bare.tokens)], getattr(bare, name))
        assert (array[len(bare.tokens) :] == (-1 if name in ("completion_index", "reader") else 0)).all()


def test_nothing_to_pack_is_one_block_of_padding():
    assert pack_groups([], [], LENGTH, True, rows_multiple=4).tokens.shape == (4, LENGTH)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_completion_longer_than_a_row_names_the_key(share_prompt):
    prompts = [np.arange(7)]
    pack_groups(prompts, [(0, np.arange(10))], LENGTH, share_prompt)
    with pytest.raises(ValueError, match=r"prompt of 7 tokens .* of 11 take 17 .* has 16: raise config.rl.row_tokens"):
        pack_groups(prompts, [(0, np.arange(11))], LENGTH, share_prompt)


@settings(max_examples=15, deadline=None)
@given(groups(), st.booleans())
def test_per_token_values_land_where_the_token_is_the_target_or_is_read(data, share_prompt):
    prompts, completions = data
    if not completions:
        return
    rows = pack_groups(prompts, completions, LENGTH, share_prompt)
    np.testing.assert_array_equal(place(rows, [ids for _, ids in completions]), rows.targets)
    contexts = [np.concatenate([prompts[i], ids])[:-1] for i, ids in completions]
    wide = place_inputs(rows, [np.stack([c, c + 1], axis=-1) for c in contexts], fill=-1)
    used = rows.segments > 0
    np.testing.assert_array_equal(wide[used], np.stack([rows.tokens, rows.tokens + 1], axis=-1)[used])
    assert (wide[~used] == -1).all()


documents = st.lists(st.integers(0, 40), max_size=20).filter(lambda sizes: any(n > 1 for n in sizes))


@settings(max_examples=25, deadline=None)
@given(documents)
def test_documents_come_back_in_order_and_split_only_when_longer_than_a_row(sizes):
    tokens = np.arange(1, sum(sizes) + 1)
    is_learned = tokens % 3 > 0
    rows = pack_documents(tokens, np.array(sizes), LENGTH, is_learned)
    used = rows.segments > 0
    starts = np.cumsum(sizes) - sizes
    expected = np.concatenate([tokens[s : s + max(n - 1, 0)] for s, n in zip(starts, sizes, strict=True)])
    np.testing.assert_array_equal(rows.tokens[used], expected)
    np.testing.assert_array_equal(rows.targets[used], expected + 1)
    np.testing.assert_array_equal(rows.is_completion, used & (rows.targets % 3 > 0))
    assert not any(a[~used].any() for a in rows)
    pieces = [rows.positions[row][ids == s] for row, ids in enumerate(rows.segments) for s in range(1, ids.max() + 1)]
    assert len(pieces) == sum(-(-max(n - 1, 0) // LENGTH) for n in sizes)
    for positions in pieces:
        np.testing.assert_array_equal(positions, np.arange(len(positions)))


def test_whole_documents_fill_a_row_as_long_as_they_fit():
    rows = pack_documents(np.arange(34), np.array([7, 11, 7, 9]), LENGTH)  # 6 + 10, then 6 + 8 places
    np.testing.assert_array_equal(rows.segments, [[1] * 6 + [2] * 10, [1] * 6 + [2] * 8 + [0] * 2])


def test_documents_without_a_target_are_refused():
    with pytest.raises(ValueError, match="config.data.source"):
        pack_documents(np.arange(3), np.array([1, 0, 1, 1]), LENGTH)
