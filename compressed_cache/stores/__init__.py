"""Where a layer keeps its tokens, and how it reads prompts and decode steps."""
