"""The host's count of tokens, kept out of the compiled graphs."""


class Clock:
    """Counts tokens on the host and says whether the next decode step ranks the slots.

    A compiled decode step must not read a Python int that changes (each value would be compiled in,
    and CUDA graphs would be recorded once per value), but a cache that ranks every ``interval``
    steps has to know when. So a step only *reads* the bool :attr:`ranks` and *writes* a constant to
    :attr:`running`; the counting is done by :meth:`tick`, which transformers triggers eagerly
    between two steps when it asks for the size of the mask. Compiled code is then guarded on one
    bool: two graphs. Where nobody asks (a model compiled by hand), the cache ticks inside the step:
    correct, with two more graphs, because the int is first taken for a constant.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.reset()

    def reset(self) -> None:
        """Back to before the prompt."""
        self.prompt = 0
        self.steps = 0
        self.running = 0
        self.ranks = True

    @property
    def tokens_seen(self) -> int:
        """Tokens of the prompt and of all steps begun, padding included."""
        return self.prompt + self.steps + self.running

    def tick(self) -> None:
        """Ends the step that is running, if one is."""
        if self.running:
            self.steps += self.running
            self.running = 0
            self.ranks = self.steps % self.interval == 0

    def ranks_at(self, token: int) -> bool:
        """Whether the slots are ranked before the given token of the running step."""
        return (self.steps + token) % self.interval == 0
