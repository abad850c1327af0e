"""The host's count of tokens, kept out of the compiled graphs."""

from collections.abc import Iterator
from contextlib import contextmanager


class StepCounter:
    """Counts tokens on the host and says whether the next decode step ranks the slots.

    A compiled decode step must not read a Python int that changes (each value would be compiled in,
    and CUDA graphs would be recorded once per value), but a cache that ranks every ``interval``
    steps has to know when. So a step only *reads* the bool :attr:`ranks` and *writes* a constant to
    :attr:`running`; the counting is done by :meth:`end_step`, which transformers triggers eagerly
    between two steps when it asks for the size of the mask. Compiled code is then guarded on one
    bool: two graphs. Where nobody asks (a model compiled by hand), the cache ticks inside the step:
    correct, with two more graphs, because the int is first taken for a constant.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.in_parts = False
        """Whether a text is being read in parts, so that one of a single token is of it and no
        step; set by :meth:`~compressed_cache.hf.announced_calls.AnnouncedCalls.reading`."""
        self.reset()

    def reset(self) -> None:
        """Back to before the prompt."""
        self.prompt = 0
        self.steps = 0
        self.running = 0
        self.ranks = True
        self.is_first_prompt = True
        """Whether no token has been decoded yet, so that a further prompt is one more chunk."""
        self.drafted = 0
        """How many of the tokens of the next call are drafts, which are read as steps; set by
        :class:`~compressed_cache.drafting.Drafting`."""
        self.prompt_tokens = 0
        """How many tokens of the call that began last are read as a prompt; the others as steps."""
        self.is_read = False
        """Whether the graph of the running step has read how many tokens were seen, and the layer
        that counts them has not gone on: see :mod:`compressed_cache.hf.compile_once`."""
        self._before: dict[str, int | bool] = {}

    @property
    def tokens_seen(self) -> int:
        """Tokens of all prompts and of all steps begun, padding included."""
        return self.prompt + self.steps + self.running

    def end_step(self) -> None:
        """Ends the step that is running, if one is."""
        if self.running:
            self.steps += self.running
            self.running = 0
            self.ranks = self.steps % self.interval == 0

    def begin(self, prompt_tokens: int, steps: int) -> None:
        """Counts a call: tokens read as a prompt, then tokens read one by one.

        After a prompt the slots are ranked anew in the next step.
        """
        self.prompt_tokens = prompt_tokens
        self.drafted = 0
        self.is_read = False
        if prompt_tokens:
            self.is_first_prompt = self.is_first_prompt and self.steps == 0
            self.prompt += self.steps + prompt_tokens
            self.steps = 0
            self.ranks = True
        self.running = steps

    def expect(self) -> None:
        """Notes where it stands, before a call that is not compiled."""
        self._before = self.state()

    @property
    def is_read_now(self) -> bool:
        """Whether a layer has begun to read the call of :meth:`expect`."""
        return not self._before

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """A call that is refused while this is open was not read, and is not counted."""
        try:
            yield
        except BaseException:
            self.restore(self._before)
            raise
        # From now on a layer reads it.
        self._before = {}

    def rank_anew(self) -> None:
        """The next step ranks the slots, as after a prompt."""
        self.end_step()
        self.prompt, self.steps = self.tokens_seen, 0
        self.is_first_prompt = False
        self.ranks = True

    def ranks_at(self, token: int) -> bool:
        """Whether the slots are ranked before the given token of the running step."""
        return (self.steps + token) % self.interval == 0

    def state(self) -> dict[str, int | bool]:
        """What :meth:`restore` needs."""
        names = ("prompt", "steps", "running", "ranks", "is_first_prompt")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, int | bool]) -> None:
        """Back to the moment of :meth:`state`."""
        vars(self).update(state)
