"""Scores that are attention."""

import math

from tests.reference.policies.view import View, attention_row, mean, neighbours, softmax


def h2o(view: View) -> list[float]:
    """Attention a token has received from all queries so far: its own, and all later ones.

    H2O (https://arxiv.org/abs/2306.14048). Query heads that share a key are averaged, the authors'
    models had none.
    """
    return [
        math.fsum(mean([row.get(token.position, 0.0) for row in rows]) for rows in view.group_rows)
        for token in view.held
    ]


def observed_attention(view: View) -> list[float]:
    """What a token has received from each query that could see it, on average.

    kvpress (https://github.com/NVIDIA/kvpress), "observed attention": row ``t`` counts for the
    tokens up to position ``t``, so the divisor shrinks towards the end of the text.
    """
    return [
        mean(
            [
                mean([row[token.position] for row in rows])
                for rows in view.group_rows[token.position :]
            ]
        )
        for token in view.held
    ]


def tova(view: View) -> list[float]:
    """Attention of the last query, averaged over all query heads of the layer.

    TOVA (https://arxiv.org/abs/2401.06104): one decision for all heads.
    """
    return [mean([row[token.position] for row in view.layer_rows[-1]]) for token in view.held]


def pooled(votes: list[float], index: int, kernel_size: int, pool: str) -> float:
    """Votes of a token and its neighbours; a mean takes those that are missing for zeros."""
    near = neighbours(votes, index, kernel_size)
    return max(near) if pool == "max" else math.fsum(near) / kernel_size


def snapkv(
    view: View, *, window: int = 32, kernel_size: int = 5, pool: str = "mean"
) -> list[float]:
    """Attention of the last ``window`` queries, smoothed over neighbouring tokens.

    SnapKV (https://arxiv.org/abs/2404.14469). Query heads that share a key are averaged, queries of
    the window may attend to the window, whose tokens are no neighbours of the others, and every
    ranking repeats it in decode.
    """
    first = max(0, view.incoming - window)
    votes = [0.0 for _ in view.held]
    for position in range(first, view.incoming):
        visible = [token for token in view.held if token.position <= position]
        for query in view.queries[position]:
            row = attention_row(query, visible)
            for index, token in enumerate(view.held):
                votes[index] += row.get(token.position, 0.0)
    count = (view.incoming - first) * len(view.queries[-1])
    # Held tokens are in the order of their positions, so the recent ones are the last.
    num_older = sum(t.position < view.text_end - view.rules.recent for t in view.held)
    shares = [vote / count for vote in votes]
    older = shares[:num_older]
    smooth = [pooled(older, index, kernel_size, pool) for index in range(num_older)]
    return smooth + shares[num_older:]


def finch(view: View, *, window: int = 32, normalize_scores: bool = True) -> list[float]:
    """Attention of the last ``window`` queries, weighed by how many tokens each could see.

    FINCH (https://doi.org/10.1162/tacl_a_00716), with the group of query heads averaged.
    """
    totals = [0.0 for _ in view.held]
    first = max(0, view.incoming - window)
    for position in range(first, view.incoming):
        visible = [token for token in view.held if token.position <= position]
        weight = len(visible) if normalize_scores else 1
        rows = [attention_row(query, visible) for query in view.queries[position]]
        for index, token in enumerate(view.held):
            vote = mean([row.get(token.position, 0.0) for row in rows])
            totals[index] += weight * vote / (view.incoming - first)
    return totals


def rpc(
    view: View,
    *,
    window: int = 32,
    kernel_size: int = 7,
    compression: float = 0.0,
    pool: str = "mean",
) -> list[float]:
    """Attention of the last queries among the generated tokens before them, over all heads.

    Reasoning Path Compression (https://arxiv.org/abs/2505.13866). With ``compression`` no more of
    these tokens stay than one in so many generated ones.
    """
    last = view.incoming - window
    voted = [t.position for t in view.held if view.prompt_length <= t.position < last]
    votes = [0.0 for _ in voted]
    for rows in view.layer_rows[-window:]:
        for row in rows:
            # A softmax among some tokens is one among all, divided by what these have of it.
            total = math.fsum(row.get(position, 0.0) for position in voted)
            for index, position in enumerate(voted):
                if total:
                    votes[index] += row[position] / total / len(rows)
    smooth = [pooled(votes, index, kernel_size, pool) for index in range(len(votes))]
    scores = dict(zip(voted, smooth, strict=True))
    if compression:
        quota = int((view.incoming - view.prompt_length) / compression)
        best = sorted(voted, key=lambda position: (scores[position], position), reverse=True)
        scores |= dict.fromkeys(best[quota:], -math.inf)
    return [scores.get(t.position, window + 1.0 + t.position) for t in view.held]


def raas(view: View, *, share: float = 0.5) -> list[float]:
    """When a token was last among the most attended, at the earliest when it came in.

    RaaS (https://arxiv.org/abs/2502.11147): of a row, averaged over the group, the top ``share`` of
    the tokens that its query could see, rounded up, is important.
    """
    stamps = {token.position: token.position for token in view.held}
    for position, rows in enumerate(view.group_rows):
        weights = {key: mean([row[key] for row in rows]) for key in rows[0]}
        least = sorted(weights.values(), reverse=True)[math.ceil(share * len(weights)) - 1]
        for key, weight in weights.items():
            if weight >= least and key in stamps:
                stamps[key] = max(stamps[key], position)
    return [float(stamp) for stamp in stamps.values()]


def morphkv(view: View, *, window: int = 3, fuse: str = "max") -> list[float]:
    """What the last ``window`` queries attend to among all tokens older than the last ``window``.

    MorphKV (https://arxiv.org/abs/2503.00979). Each query has one row, the softmax over these
    tokens of its logits, which are added up over the group.
    """
    first = view.incoming - window
    older = [token for token in view.held if token.position < first]
    rows = []
    for queries in view.queries[-window:]:
        scale = 1 / math.sqrt(len(queries[0]))
        rows.append(softmax([scale * sum(float(q @ t.key) for q in queries) for t in older]))
    fused = [{"max": max, "sum": math.fsum}[fuse](votes) for votes in zip(*rows, strict=True)]
    return fused + [math.inf] * (len(view.held) - len(older))


def lagged_attention(view: View, *, window: int = 32, fuse: str = "max") -> list[float]:
    """Attention of the last ``window`` queries, each normalised without what was recent to it.

    A query and the ``window`` tokens before it are recent to it. The logits of a group are added
    up, which the sum of the logarithms of its probabilities is as well, but for a number that is
    the same for all tokens.
    """
    seen: dict[int, list[float]] = {token.position: [0.0] for token in view.held}
    for position, rows in list(enumerate(view.group_rows))[-window:]:
        old = [key for key in rows[0] if key < position - window]
        weights = softmax([math.fsum(math.log(row[key]) for row in rows) for key in old])
        for key, weight in zip(old, weights, strict=True):
            seen.get(key, []).append(weight)
    return [
        math.inf
        if key >= view.incoming - 1 - window
        else {"max": max, "sum": math.fsum}[fuse](weights)
        for key, weights in seen.items()
    ]
