"""What ``lm_eval --model hf`` gains: caches from ``kv_`` arguments, and a record of each reply.

lm_eval's class is changed in place, so that all its aliases and subclasses have it. Without ``kv_``
arguments every method does what it did.
"""

import functools
import hashlib
import importlib.metadata
import linecache
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from compressed_cache.integrations.harness.arguments import PressArguments, take_press
from compressed_cache.tasks.record import Reply

OLDEST, TOO_NEW = (0, 4, 13), (0, 5)

_log = logging.getLogger("lm_eval.compressed_cache")


class Session:
    """The compressed cache of one model object of the harness."""

    def __init__(self, press: PressArguments, arguments: Mapping[str, Any]) -> None:
        from compressed_cache.hf.draft_length import DraftStatistics
        from compressed_cache.integrations.harness.meter import Meter

        self.press = press
        self.drafts = DraftStatistics() if press.lossless else None
        self.arguments = arguments
        self.meter = Meter()
        self.sampling: dict[str, float] = {}
        self.notified = False
        self._batches_seen: dict[bytes, int] = {}

    def occurrence(self, content: bytes) -> int:
        """How often a batch of this content was generated before."""
        times = self._batches_seen.get(content, 0)
        self._batches_seen[content] = times + 1
        return times


def patch(model_class: Any) -> None:
    """Teaches lm_eval's ``HFLM`` the ``kv_`` arguments, once."""
    if hasattr(model_class, "compressed_cache"):
        return
    model_class.compressed_cache = None
    wrappers = (
        _init,
        _create_model,
        _model_generate,
        generate_until,
        _loglikelihood_tokens,
        get_model_info,
    )
    for wrapper in wrappers:
        name = "__init__" if wrapper is _init else wrapper.__name__
        setattr(model_class, name, _wrap(getattr(model_class, name), wrapper))
    _patch_response_cache()


def change_press(model: Any, press: PressArguments) -> None:
    """Gives another press to a loaded model that has one, and a record that begins anew.

    Raises:
        ValueError: a press that cannot serve this model.
        NotImplementedError: likewise.
    """
    import torch

    press.make_cache(config=model.config)
    before = model.compressed_cache
    if press != before.press:
        # Each takes graphs of its own, and torch makes only a few of one function.
        torch._dynamo.reset()
    model.compressed_cache = Session(press, before.arguments)


def is_refusal(error: BaseException) -> bool:
    """Whether this package raised an error itself, so that its message says all."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    # What PyTorch raises has its last frame here, too.
    code = linecache.getline(frame.f_code.co_filename, line).strip()
    return frame.f_globals["__name__"].startswith("compressed_cache.") and code.startswith("raise ")


def _wrap(original: Any, wrapper: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    # How a subclass's own method is told apart.
    method.compressed_cache = wrapper  # pyright: ignore[reportAttributeAccessIssue]
    return method


def _init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    press = take_press(kwargs)
    if press is None:
        return original(self, *args, **kwargs)
    _check_version()
    _check_class(type(self))
    self.compressed_cache = Session(press, kwargs)
    original(self, *args, **kwargs)
    press.make_cache(config=self.config)
    _share_between_cpu_processes(self)


def _create_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    session: Session | None = self.compressed_cache
    if session is not None:
        from compressed_cache.integrations.harness.preflight import check_tasks, running_evaluation

        # The config and the tokenizer are there, the weights are not: the moment for all refusals.
        session.press.make_cache(config=self.config)
        check_tasks(self, session.arguments, running_evaluation())
    return original(self, *args, **kwargs)


def generate_until(original: Any, self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
    session: Session | None = self.compressed_cache
    if session is None:
        return original(self, requests, *args, **kwargs)
    hook = self.cache_hook
    self.cache_hook = session.meter.listen(hook)
    refused, texts = None, []
    try:
        texts = original(self, requests, *args, **kwargs)
    except Exception as error:
        if not is_refusal(error):
            raise
        # Its frames hold the harness's progress bar, whose last state would stand below it.
        refused = error.with_traceback(None)
    finally:
        self.cache_hook = hook
    if refused is not None:
        raise refused
    replies = session.meter.replies(requests, texts)
    if session.drafts is None:
        _warn_without_eviction(session.press, requests, replies)
    return replies


def _model_generate(
    original: Any, self: Any, context: Any, max_length: int, stop: Any, **kwargs: Any
) -> Any:
    session: Session | None = self.compressed_cache
    if session is None:
        return original(self, context, max_length, stop, **kwargs)
    from compressed_cache.integrations.harness.meter import batch_records
    from compressed_cache.versions import cache_argument

    if kwargs.get("do_sample"):
        _fill_in_sampling(session, self.model.generation_config, kwargs)
    started = time.perf_counter()
    cache = session.press.make_cache(config=self.config)
    if session.drafts is not None:
        from compressed_cache import lossless

        kwargs |= {"custom_generate": lossless, "statistics": session.drafts}
    with _seeded(session, context):
        output = original(self, context, max_length, stop, **cache_argument(cache), **kwargs)
    ends = self.model.generation_config.eos_token_id
    records = batch_records(
        cache,
        kwargs["attention_mask"],
        output[:, context.shape[1] :],
        limit=max_length - context.shape[1],
        ends={self.eot_token_id, *(ends if isinstance(ends, list) else [ends])},
        padding=self.tokenizer.pad_token_id,
        full_bytes=None if session.drafts is None else session.drafts.full_bytes,
    )
    # The ids were read just now, so the device has finished.
    session.meter.measure(records, seconds=time.perf_counter() - started)
    return output


def _loglikelihood_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    session: Session | None = self.compressed_cache
    if session is not None and not session.notified:
        session.notified = True
        _log.warning(
            "log-likelihood requests are answered with the full cache: nothing is decoded in them, "
            "so kv_ arguments change nothing"
        )
    return original(self, *args, **kwargs)


def get_model_info(original: Any, self: Any) -> dict[str, Any]:
    info = original(self)
    session: Session | None = self.compressed_cache
    if session is None:
        return info
    import compressed_cache

    records = session.meter.records
    summary: dict[str, Any] = {
        "version": compressed_cache.__version__,
        **session.press.describe(),
        "loglikelihood_with_full_cache": session.notified,
        "replies": len(records),
    }
    if session.sampling:
        summary["sampling"] = session.sampling
    if records:
        summary |= {
            "tokens": _mean(record.tokens for record in records),
            "truncated": _mean(record.truncated for record in records),
            "evicted_tokens": _mean(record.evicted_tokens for record in records),
            "held_tokens": _mean(record.held_tokens for record in records),
            "cache_bytes": _mean(record.cache_bytes for record in records),
        }
    if session.drafts is not None:
        summary |= session.drafts.to_json()
    return info | {"compressed_cache": summary}


def _mean(values: Iterator[float]) -> float:
    values_ = list(values)
    return sum(values_) / len(values_)


def _check_version() -> None:
    from packaging.version import Version

    found = importlib.metadata.version("lm_eval")
    if not OLDEST <= Version(found).release < TOO_NEW:
        raise RuntimeError(
            f"kv_ arguments work with lm_eval 0.4.13 to 0.4.x, found {found}: "
            "pip install 'lm-eval>=0.4.13,<0.5'"
        )


def _check_class(model_class: Any) -> None:
    # A subclass that generates in its own way would silently keep a full cache.
    generates = getattr(model_class._model_generate, "compressed_cache", None) is _model_generate
    if not generates or hasattr(model_class, "_model_multimodal_generate"):
        raise NotImplementedError(
            f"kv_ arguments work with --model hf. {model_class.__name__} generates in its own way."
        )


def _share_between_cpu_processes(self: Any) -> None:
    # lm_eval shares documents between the processes of `accelerate launch` only where each has a
    # GPU; on CPUs every process would answer everything.
    accelerator = getattr(self, "accelerator", None)
    if accelerator is not None and accelerator.device.type == "cpu" and self._world_size == 1:
        self._rank = accelerator.process_index
        self._world_size = accelerator.num_processes


def _fill_in_sampling(session: Session, makers: Any, arguments: dict[str, Any]) -> None:
    # The harness means greedy by 0.0, which generate refuses to sample at.
    if not arguments.get("temperature"):
        if not makers.temperature or not makers.do_sample:
            raise ValueError(
                "do_sample=True needs a temperature, because the model's generation_config.json "
                "recommends none: --gen_kwargs do_sample=True,temperature=0.6,top_p=0.95"
            )
        arguments["temperature"] = makers.temperature
    # The command line reads temperature=1 as an int, which transformers refuses.
    arguments["temperature"] = float(arguments["temperature"])
    for name in ("temperature", "top_p", "top_k"):
        value = arguments.get(name, getattr(makers, name, None))
        if value is not None:
            session.sampling[name] = value


@contextmanager
def _seeded(session: Session, context: Any) -> Iterator[None]:
    """Draws that depend on ``--seed``, the prompts, and how often these were repeated.

    Not on what ran before, so that a run cut short or resumed samples the same replies.
    """
    import torch

    content = context.cpu().numpy().tobytes()
    parts = f"{torch.initial_seed()} {session.occurrence(content)} ".encode() + content
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(hashlib.sha256(parts).digest()[:8], "big") >> 1)
        yield


def _warn_without_eviction(press: PressArguments, requests: Any, replies: list[Reply]) -> None:
    if not press.make_cache().policy.evicts:
        return
    records: dict[str, list[Any]] = {}
    for request, reply in zip(requests, replies, strict=True):
        records.setdefault(request.task_name, []).append(reply.record)
    for task, group in records.items():
        if not any(record.evicted_tokens for record in group):
            _log.warning(
                "%s: evicted_tokens = 0. None of %d replies outgrew the budget of %d (the longest "
                "had %d tokens, prompt included), so this measured a full cache.",
                task,
                len(group),
                press.describe()["budget"],
                max(record.seen_tokens for record in group),
            )


def _patch_response_cache() -> None:
    """One response-cache file per press: its keys are the prompt and the generation arguments."""
    from lm_eval.api.model import CachingLM

    original = CachingLM.__init__

    @functools.wraps(original)
    def init(self: Any, lm: Any, cache_db: str) -> None:
        session: Session | None = getattr(lm, "compressed_cache", None)
        if session is not None:
            cache_db = f"{cache_db.removesuffix('.db')}.{_digest(session.press)}.db"
            _log.info("responses under this press are cached in %s", cache_db)
        original(self, lm, cache_db)

    CachingLM.__init__ = init


def _digest(press: PressArguments) -> str:
    import compressed_cache

    described = {"version": compressed_cache.__version__, **press.describe()}
    digest = hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()
    return f"{described['policy']}-{described['budget']}-{digest[:12]}"
