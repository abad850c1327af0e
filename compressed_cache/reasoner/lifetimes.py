"""Until when each token of a solved ledger is needed: what training may hide from the model."""

from compressed_cache.reasoner.problems import PRICES, Problem


def needed_until(problem: Problem) -> list[int]:
    """For each token of ``prompt trace``, the position of the last query that has to see it.

    Facts live until their last lookup. All other tokens get their own position: how long the line
    that is being written stays in sight is the caller's business.
    """
    tokens = f"{problem.prompt} {problem.trace}".split()
    goods, order, start = tokens.index("goods"), tokens.index("order"), tokens.index("solve") + 1
    until = list(range(len(tokens)))

    entry, price, cost, tax = {}, {}, {}, 1
    for i in range(start, len(tokens)):
        if tokens[i - 1] == "good":
            entry[tokens[i]], price[tokens[i + 1]] = i, i + 1
        elif tokens[i - 1] == "step":
            entry[tokens[i]], cost[tokens[i + 1]] = i, i + 1
        elif tokens[i] == "tax":
            tax = i

    until[0] = until[1] = tax
    for i in range(goods + 1, start - 1):
        if tokens[i] in entry:
            until[i] = entry[tokens[i]]
            until[i + 1] = max(until[i], price.get(tokens[i + 1], 0) if i < order else 0)
        elif tokens[i] in PRICES:
            until[i] = price[tokens[i - 1]]
    for i in range(start, len(tokens)):
        if tokens[i] == "now":
            until[i + 1] = until[i + 2] = max(i + 2, cost.get(tokens[i + 1], 0))
    return until
