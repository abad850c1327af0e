"""Names that policies of a user's own may still define, refused by what says it now."""

# What policies used to say one by one, and what says it now.
REPLACED = {
    "observes_attention": "needs = Needs(attention=True)",
    "mixes_heads": "needs = Needs(all_heads=True)",
    "prompt_queries": "needs = Needs(prompt_queries=...)",
    "num_queries": "needs = Needs(queries=...)",
    "num_rows": "needs = Needs(state_width=...)",
    "num_notes": "needs = Needs(notes=...)",
    "own_notes": "needs = Needs(notes=...)",
    "own_note": "note",
    "kept_recent": "needs = Needs(recent=...)",
    "mixes_scores": "same_for_all_heads",
    "layout": "store",
    "contiguous": "rerotates",
    "prunes_channels": "the methods of PrunesChannels suffice",
    "whole_keys": "recent_whole_keys",
    "key_constants": "needs = Needs(whole_keys=...)",
    "laziness": "lazy_layer",
}


def check_names(policy: type) -> None:
    """Raises ``TypeError`` for a class of policies that defines what is called otherwise now."""
    for name in vars(policy):
        if name in REPLACED:
            raise TypeError(
                f"{policy.__name__}.{name} is written otherwise now: {REPLACED[name]}. See "
                "CHANGELOG.md."
            )
