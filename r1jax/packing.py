"""Sequences of different lengths into rows of one length, with the arrays that keep them apart.

Sequence packing by best fit decreasing (arXiv 2107.02027), extended so that the completions of a group stand beside a
single copy of their prompt. All arrays are aligned to input positions: what stands at [b, t] is about the token read
there, and `targets` is the token to be predicted there, so no later code shifts anything.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Packed documents, each array [B, T]; a position is padding where `segments` is 0.

    A token reads the earlier tokens of the row that are of its own segment or of its parent segment.
    """

    tokens: np.ndarray  # int32, read at this position
    targets: np.ndarray  # int32, to be predicted there; 0 where nothing follows
    positions: np.ndarray  # int32, from 0 on in each document
    segments: np.ndarray  # int32, above 0 and different for each segment of a row
    parents: np.ndarray  # int32, the segment of the shared prompt, or the own one
    is_completion: np.ndarray  # bool, the target is to be learned


class GroupRows(NamedTuple):
    """Packed prompts and completions: the arrays of Rows, and where each position comes from."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    parents: np.ndarray
    is_completion: np.ndarray
    completion_index: np.ndarray  # int32, the completion that the target is of, -1 where it is of none
    offset: np.ndarray  # int32, the target's index in that completion, 0 where it is of none
    reader: np.ndarray  # int32, a completion in whose context this position lies, -1 in padding


# A block is a prompt (its index) with those of its completions (their indices) that share one reading of it in a row.
Block = tuple[int, list[int]]


def pack_groups(
    prompts: Sequence[np.ndarray],
    completions: Sequence[tuple[int, np.ndarray]],
    length: int,
    share_prompt: bool,
    rows_multiple: int = 1,
) -> GroupRows:
    """Packs completions with their prompts into few rows; each completion stands whole in one row.

    A completion is predicted from [last prompt token] + completion[:-1]. What comes before that in the prompt is a
    segment of its own for all completions of a block (`share_prompt`), or the beginning of each completion's segment.

    Args:
        prompts: token ids [P] of each prompt, at least one.
        completions: the index of its prompt and the token ids [C], at least one, of each completion.
        length: tokens of a row, T.
        share_prompt: whether completions in the same row share one reading of their prompt.
        rows_multiple: the number of rows, B, is padded to a multiple of this, so that compiled shapes repeat.

    Raises:
        ValueError: a completion and its prompt that are longer than a row (config.rl.row_tokens).
    """
    contexts = np.array([len(ids) - 1 for ids in prompts], int)
    families: dict[int, list[int]] = {}
    for i, (prompt, ids) in enumerate(completions):
        assert contexts[prompt] >= 0 and len(ids), "a prompt and a completion have at least one token each"
        if contexts[prompt] + len(ids) > length:
            raise ValueError(
                f"a prompt of {contexts[prompt] + 1} tokens and its completion of {len(ids)} take "
                f"{contexts[prompt] + len(ids)} places, but a row has {length}: raise config.rl.row_tokens"
            )
        families.setdefault(prompt if share_prompt else i, []).append(i)
    widths = [len(ids) for _, ids in completions]
    blocks = [(completions[members[0]][0], members) for members in families.values()]
    placed = _place_blocks(blocks, contexts, widths, length)
    n_rows = -(-max(len(placed), 1) // rows_multiple) * rows_multiple
    return _lay_out(placed, prompts, [ids for _, ids in completions], (n_rows, length), share_prompt)


def _place_blocks(blocks: list[Block], contexts: np.ndarray, widths: list[int], length: int) -> list[list[Block]]:
    """The blocks of each row: widest block first, into the tightest row that takes it whole.

    Where none does, the widest gap takes what fits of it, and the rest goes on to another row with a prompt of its own.
    """
    rows: list[list[Block]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, row), ascending
    by_width = sorted(blocks, key=lambda block: -contexts[block[0]] - sum(widths[i] for i in block[1]))
    for prompt, members in by_width:
        rest = sorted(members, key=lambda i: -widths[i])
        while rest:
            whole = contexts[prompt] + sum(widths[i] for i in rest)
            tightest = bisect.bisect_left(gaps, (whole, -1))
            if tightest < len(gaps):
                free, row = gaps.pop(tightest)
            elif gaps and gaps[-1][0] >= contexts[prompt] + widths[rest[-1]]:
                free, row = gaps.pop()
            else:
                free, row = length, len(rows)
                rows.append([])
            free -= contexts[prompt]
            taken = []
            for i in rest:
                if widths[i] <= free:
                    free -= widths[i]
                    taken.append(i)
            rows[row].append((prompt, taken))
            bisect.insort(gaps, (free, row))
            rest = [i for i in rest if i not in taken]
    return rows


def _lay_out(
    rows: list[list[Block]],
    prompts: Sequence[np.ndarray],
    completions: list[np.ndarray],
    shape: tuple[int, int],
    share_prompt: bool,
) -> GroupRows:
    out = GroupRows(*(np.zeros(shape, bool if name == "is_completion" else np.int32) for name in GroupRows._fields))
    out.completion_index[:] = out.reader[:] = -1
    for row, blocks in enumerate(rows):
        end = segment = 0
        for prompt, members in blocks:
            context, last = prompts[prompt][:-1], prompts[prompt][-1]
            start, end = end, end + len(context)
            segment += 1
            parent = segment
            here = row, slice(start, end)
            out.tokens[here] = context
            out.positions[here] = np.arange(len(context))
            out.segments[here] = out.parents[here] = segment
            out.reader[here] = members[0]
            for i in members:
                ids = completions[i]
                start, end = end, end + len(ids)
                segment += share_prompt
                here = row, slice(start, end)
                out.tokens[row, start] = last
                out.tokens[row, start + 1 : end] = ids[:-1]
                out.targets[here] = ids
                out.positions[here] = np.arange(len(context), len(context) + len(ids))
                out.segments[here] = segment
                out.parents[here] = parent
                out.is_completion[here] = True
                out.completion_index[here] = out.reader[here] = i
                out.offset[here] = np.arange(len(ids))
    return out


def place(rows: GroupRows, values: Sequence[np.ndarray], fill: float = 0) -> np.ndarray:
    """Values [C, ...] of the tokens of every completion as [B, T, ...], where each is the target; `fill` elsewhere."""
    return _gather(values, rows.completion_index, rows.offset, fill)


def place_inputs(rows: GroupRows, values: Sequence[np.ndarray], fill: float = 0) -> np.ndarray:
    """Values [P + C - 1, ...] of every token that was read for a completion as [B, T, ...], where it is read."""
    return _gather(values, rows.reader, rows.positions, fill)


def _gather(values: Sequence[np.ndarray], index: np.ndarray, offset: np.ndarray, fill: float) -> np.ndarray:
    flat = np.concatenate(values)
    starts = np.cumsum([0] + [len(v) for v in values])
    out = np.full(index.shape + flat.shape[1:], fill, flat.dtype)
    is_used = index >= 0
    out[is_used] = flat[starts[index[is_used]] + offset[is_used]]
    return out


def pack_documents(tokens: np.ndarray, lengths: np.ndarray, length: int, is_learned: np.ndarray | None = None) -> Rows:
    """Packs documents in their order into rows for next-token prediction: 20 million tokens in seconds.

    A document of n tokens takes n - 1 places and is split only where it is longer than a row. Then each piece is a
    segment that starts at position 0 and knows nothing of the piece before.

    Args:
        tokens: ids [N] of all documents, one after the other.
        lengths: tokens of each document [documents]; they add up to N.
        length: tokens of a row, T.
        is_learned: bool [N], which tokens count as targets; all of them when left out.

    Raises:
        ValueError: no document of two tokens or more.
    """
    lengths = np.asarray(lengths, np.int64)
    assert lengths.sum() == len(tokens), "documents add up to the tokens"
    reads = np.maximum(lengths - 1, 0)
    if not reads.any():
        raise ValueError("there is nothing to train on: no document has two tokens or more (config.data.source)")
    pieces = -(-reads // length)
    is_last = np.arange(pieces.sum()) == np.repeat(np.cumsum(pieces) - 1, pieces)
    sizes = np.where(is_last, np.repeat(reads - (pieces - 1) * length, pieces), length)

    # Next fit: pieces keep their order, so rows are filled by tokens in the order in which they come.
    ends = np.cumsum(sizes)
    starts = ends - sizes
    firsts = [0]
    while (piece := int(np.searchsorted(ends, starts[firsts[-1]] + length, "right"))) < len(ends):
        firsts.append(piece)
    per_row = np.diff([*firsts, len(ends)])
    is_filled = np.arange(length) < np.add.reduceat(sizes, firsts)[:, None]
    is_read = np.ones(len(tokens), bool)
    is_read[np.cumsum(lengths)[lengths > 0] - 1] = False

    def laid(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        out = np.zeros(is_filled.shape, dtype)
        out[is_filled] = values
        return out

    segments = laid(np.repeat(np.arange(len(ends)) - np.repeat(firsts, per_row) + 1, sizes))
    return Rows(
        tokens=laid(tokens[is_read]),
        targets=laid(tokens[1:][is_read[:-1]]),
        positions=laid(np.arange(ends[-1]) - np.repeat(starts, sizes)),
        segments=segments,
        parents=segments,
        is_completion=is_filled if is_learned is None else laid(is_learned[1:][is_read[:-1]], bool),
    )
