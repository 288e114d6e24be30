"""Bounds of packs for tests: documents made of runs, as model/batch.py makes them, and any others that rise."""

import torch
from hypothesis import strategies as st

CAUSAL, IMAGE, EMPTY = "causal", "image", "empty"


def pack_intervals(documents, tail=0, window=None):
    """kv_start and kv_end, int32 [T], of documents, each a list of (rows, kind) runs, and of a tail that nothing fills.

    CAUSAL rows see what came before in their document, at most ``window`` keys; the rows of an IMAGE also see each other. EMPTY
    rows see nothing, and what follows them is a document of its own.
    """
    start, end = [], []
    for document in documents:
        first = len(start)
        for rows, kind in document:
            low = len(start)
            for q in range(low, low + rows):
                oldest = max(first, q - window + 1) if window else first
                start.append({CAUSAL: oldest, IMAGE: min(oldest, low), EMPTY: q}[kind])
                end.append({CAUSAL: q + 1, IMAGE: low + rows, EMPTY: low}[kind])
            first = len(start) if kind == EMPTY else first
    total = len(start) + tail
    return torch.tensor(start + [total] * tail, dtype=torch.int32), torch.tensor(end + [total] * tail, dtype=torch.int32)


@st.composite
def packs(draw, rows=45, documents=5):
    """Packs of documents of no, one or many tokens, with image spans, empty rows, a window and a tail."""
    run = st.tuples(st.one_of(st.sampled_from([0, 1]), st.integers(2, rows)), st.sampled_from([CAUSAL, CAUSAL, IMAGE, IMAGE, EMPTY]))
    chosen = draw(st.lists(st.lists(run, max_size=3), max_size=documents))
    tail = draw(st.sampled_from([0, 1, 40]))
    if not any(rows for document in chosen for rows, _ in document):
        tail = max(tail, 1)
    return pack_intervals(chosen, tail, draw(st.sampled_from([None, None, 1, 5, 33])))


def rising_bounds(T, S, seed):
    """Any two non-decreasing sequences of T bounds on S keys: empty rows anywhere, keys that no row sees, no diagonal."""
    bounds = torch.randint(S + 1, (2, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int32).sort(-1).values
    return (bounds[0], bounds[1]) if seed % 2 else (bounds.amin(0), bounds.amax(0))


def chunk(kv_start, kv_end, low, high):
    """The bounds of the same rows on the keys low .. high alone."""
    return kv_start.clamp(low, high) - low, kv_end.clamp(low, high) - low


def tensors(T, S, heads, D, dtype=torch.float64, seed=0, layout="contiguous"):
    """q [T, H, D], k and v [S, K, D] and an upstream gradient like q.

    layout: contiguous; "heads": the head dim outermost in memory; "strided": the last dim not together; "packed": slices of one
    [T, (H + 2 K) D], where S is T.
    """
    generator = torch.Generator().manual_seed(seed)
    (H, K), columns = heads, 2 * D if layout == "strided" else D

    def tensor(rows, heads):
        if layout == "contiguous":
            return torch.randn(rows, heads, D, generator=generator).to(dtype)
        return torch.randn(heads, rows, columns, generator=generator).to(dtype)[..., :: columns // D].transpose(0, 1)

    if layout == "packed" and S == T:
        q, k, v = torch.randn(T, (H + 2 * K) * D, generator=generator).to(dtype).unflatten(1, (-1, D)).split([H, K, K], 1)
        return [q, k, v, torch.randn(T, H, D, generator=generator).to(dtype)]
    return [tensor(T, H), tensor(S, K), tensor(S, K), tensor(T, H)]
