"""One policy of each kind, told by what the cache has to do for it.

What a policy decides is compared with the reference for every one of them, and so is that padding
and compilation change nothing. How a cache is taken through turns, modes and back ends depends on
these kinds alone.
"""

KINDS = (
    "full",  # grows
    "random",  # sees nothing and draws by layer and head
    "random_prompt",  # protects the prompt
    "streaming_llm",  # has sinks
    "keydiff",  # looks at all keys together
    "h2o",  # adds up attention
    "tova",  # looks at one row, for all heads together
    "morphkv",  # keeps several rows
    "snapkv",  # looks at the last queries
    "expected_attention",  # looks at all queries of the prompt
    "rkv",  # always keeps its window
    "rpc",  # scores all heads alike, and knows the prompt
    "gkv",  # revises notes
    "vase",  # knows what is protected
    "triattention",  # brings statistics of the model
    "learned_gate",  # is shown hidden states
    "pyramidkv",  # shares out the budget among layers
)

SMALL: dict[str, dict[str, int]] = {"lagged_attention": {"window": 8}}
"""Options of the policies whose own defaults do not fit into the small budgets of tests."""

QUICK = ("full", "random", "h2o", "snapkv", "rkv", "gkv", "learned_gate")
"""What a quick test needs of these: slots that grow, and each thing that a cache can remember."""
