"""The one place where transformers' models are changed: here they meet compressed caches.

transformers hands new keys and values to ``cache.update`` and the queries to an attention function
later, so a cache never sees a query. A compressed layer therefore returns tensors that carry a
reference to it, and every attention function is wrapped once by :func:`dispatch`, which looks for
that reference. Tensors without one go straight through, so models that use another cache are not
affected, and there is no global "current cache" that threads could mix up.

Importing this package changes nothing. The first :class:`~compressed_cache.CompressedCache` that is
made or loaded wraps these, for the rest of the process; each does what it did without such a cache:

- ``AttentionInterface.get_interface``, which gives a model its attention. The registry behind it
  does not suffice: eager attention is not in it, and users add to it later.
- ``GenerationMixin._validate_model_kwargs``, ``_prefill``, ``_assisted_decoding``,
  ``prepare_inputs_for_generation`` and ``masking_utils._preprocess_mask_arguments``, which tell a
  cache of the model, the length of the text and its padding.
- ``GenerationMixin._extract_generation_mode_kwargs``, for :func:`compressed_cache.decode` and
  :func:`compressed_cache.lossless`, and ``GenerationMixin.generate_batch``, to refuse what would
  leave the cache unused.
- ``PreTrainedModel.__call__``, which keeps the compiler out of prompts.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, masking_utils
from transformers.modeling_utils import AttentionInterface

from compressed_cache.versions import CACHE

_TAG = "_compressed_layer"
_TAKES_ALL = "_takes_all_arguments"

PROMPTS = (
    "CompressedCache reads prompts eagerly. Compile the model with fullgraph=False, or let "
    "generate compile it."
)


Loop = TypeVar("Loop", bound=Callable[..., Any])


class Attending(Protocol):
    """A layer that attends for itself."""

    @property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Called like an attention function, with the model's own one as first argument."""
        ...


class Owner:
    """The layer that attends over a tensor, which does not keep it alive.

    A layer owns its tensors: were it kept by them, both would outlive the last who wants them. Of
    a copy of a tensor nobody is the owner.
    """

    def __init__(self, layer: Attending | None = None) -> None:
        self.layer = _nobody if layer is None else weakref.ref(layer)

    def tag(self, keys: Tensor) -> None:
        """Marks ``keys``, so that attention over them is left to the layer as long as it exists."""
        setattr(keys, _TAG, self)

    def __reduce__(self) -> tuple[type["Owner"], tuple[()]]:
        return Owner, ()


def _nobody() -> None:
    return None


def dispatch(
    function: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls ``function``, or the layer that owns ``key`` where there is one."""
    owner = getattr(key, _TAG, None)
    layer = None if owner is None else owner.layer()
    if layer is None:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    return layer.forward(function, module, query, key, value, attention_mask, **kwargs)


def takes_all_arguments(loop: Loop) -> Loop:
    """Marks a loop for ``generate(custom_generate=...)`` that is given what transformers' own are,
    beside the keyword arguments that it names itself.

    ``generate`` itself keeps ``streamer``, ``tokenizer``, ``assistant_model`` and ``synced_gpus``
    from a callable silently.
    """
    setattr(loop, _TAKES_ALL, True)
    return loop


def install() -> None:
    """Wraps attention, masks, calls of models and parts of ``generate``, once for all."""
    original = AttentionInterface.get_interface
    if getattr(original, _TAG, False):
        return

    @functools.wraps(original)
    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
    ) -> Callable[..., Any]:
        return functools.partial(dispatch, original(self, attn_implementation, default))

    setattr(get_interface, _TAG, True)
    AttentionInterface.get_interface = get_interface
    _announce_models()
    _announce_calls()
    _announce_prompts()
    _announce_texts()
    _refuse_batching()
    _announce_forwards()
    _hand_over_arguments()


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The compressed cache among arguments, by either name of it; None where there is none."""
    given = (arguments.get(name) for name in ("cache", "past_key_values"))
    found = next((cache for cache in given if is_compressed(cache)), None)
    if isinstance(found, type):
        raise TypeError(f"cache must be an object, got the class. Write {found.__name__}()")
    return found


def is_compressed(value: Any) -> bool:
    """Whether it is a compressed cache."""
    return hasattr(value, "expect_call")


def _accept_cache(arguments: dict[str, Any]) -> None:
    """Lets transformers before 5.24 take a compressed cache as ``cache``, as later releases do.

    Since then the older name warns, so there would be none to type under all of them.
    """
    if CACHE != "cache" and is_compressed(arguments.get("cache")):
        arguments[CACHE] = arguments.pop("cache")


def _announce_models() -> None:
    """Lets a compressed cache see the model when ``generate`` begins.

    Some models ask nothing of a cache before they complain of it in words of their own.
    """
    generation: Any = GenerationMixin
    original = generation._validate_model_kwargs

    @functools.wraps(original)
    def validate(self: Any, model_kwargs: dict[str, Any]) -> Any:
        if (cache := find_cache(model_kwargs)) is not None:
            cache.expect_model(self)
        return original(self, model_kwargs)

    generation._validate_model_kwargs = validate


def _announce_calls() -> None:
    """Lets a compressed cache see the config of a model and the mask of a call before any layer.

    What is handed to attention later says nothing of tokens that were read before.
    """
    utils: Any = masking_utils
    original = utils._preprocess_mask_arguments

    @functools.wraps(original)
    def preprocess(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.compiler.is_compiling():
            cache = find_cache({"cache": args[0]} if args else kwargs)
            if cache is not None:
                cache.expect_call(config, attention_mask, *inputs_embeds.shape[:2])
        return original(config, inputs_embeds, attention_mask, *args, **kwargs)

    utils._preprocess_mask_arguments = preprocess


def _announce_prompts() -> None:
    """Lets assisted decoding, which has a loop of its own, say how long the prompt is.

    Of a text whose beginning is held it would read all once more, where other loops read what is
    new.
    """
    generation: Any = GenerationMixin
    original = generation._assisted_decoding

    @functools.wraps(original)
    def assisted_decoding(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (cache := find_cache(kwargs)) is None:
            return original(self, input_ids, *args, **kwargs)
        tokens = input_ids.shape[1]
        width = mask_width(kwargs.get("generation_config"), kwargs)
        cache.expect_text(tokens, input_ids, kwargs.get("attention_mask"), width=width)
        with cache.assisted(tokens):
            return original(self, input_ids, *args, **kwargs)

    generation._assisted_decoding = assisted_decoding
    prepare_inputs = generation.prepare_inputs_for_generation

    @functools.wraps(prepare_inputs)
    def prepare(
        self: Any, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> Any:
        if (cache := find_cache(kwargs)) is not None:
            if next_sequence_length is None:
                next_sequence_length = cache.new_of_prompt(input_ids.shape[1])
            cache.expect_ids(input_ids, next_sequence_length)
        return prepare_inputs(self, input_ids, next_sequence_length, **kwargs)

    generation.prepare_inputs_for_generation = prepare


def _announce_texts() -> None:
    """Lets a compressed cache see how long the text is that ``generate`` was given, and when all of
    it is read."""
    generation: Any = GenerationMixin
    original = generation._prefill

    @functools.wraps(original)
    def prefill(
        self: Any, ids: Tensor, config: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if (cache := find_cache(inputs)) is None:
            return original(self, ids, config, inputs, *args, **kwargs)
        if inputs.get("use_cache") is False:
            raise ValueError("use_cache must be True where a cache is given, got False")
        embeddings = inputs.get("inputs_embeds")
        if embeddings is not None and config.prefill_chunk_size is not None:
            raise NotImplementedError(
                "prefill_chunk_size must be left out with inputs_embeds, of which transformers "
                "reads no parts. Call the model with one part after the other instead."
            )
        tokens = ids.shape[1] if embeddings is None else embeddings.shape[1]
        # transformers takes ids for the whole text only where it knows of a mask as long.
        # Where the mask is longer, only what is new was given.
        if embeddings is not None or mask_width(config, inputs) == tokens:
            known = ids if embeddings is None else None
            cache.expect_text(tokens, known, inputs.get("attention_mask"))
            tokens -= cache.get_seq_length()
        with cache.reading(tokens):
            return original(self, ids, config, inputs, *args, **kwargs)

    generation._prefill = prefill


def mask_width(config: Any, inputs: Mapping[str, Any]) -> int:
    """Columns of the mask that ``generate`` was given, -1 where there was none."""
    mask = inputs.get("attention_mask")
    # One that hides nothing is noted there and thrown away.
    return getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]


def _refuse_batching() -> None:
    """Says that continuous batching leaves out a compressed cache it is given."""
    generation: Any = GenerationMixin
    original = generation.generate_batch

    @functools.wraps(original)
    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(is_compressed(value) for value in (*args, *kwargs.values())):
            raise NotImplementedError(
                "continuous batching keeps keys and values in pages of its own, so a "
                "CompressedCache would not be used. Call generate with a padded batch instead."
            )
        return original(self, *args, **kwargs)

    generation.generate_batch = generate_batch


def _announce_forwards() -> None:
    """Lets a compressed cache see a model that is called, and keeps the compiler out of one that
    reads a prompt into it.

    A layer reads its prompt eagerly, and where a compiler meets that as late as in the layer, it
    compiles all frames around it by themselves, again for each layer, until it hits its limit and
    says so. So the outermost model it gets to see is left alone as a whole.
    """
    model: Any = PreTrainedModel

    @functools.wraps(torch.nn.Module.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _accept_cache(kwargs)
        if not torch.compiler.is_compiling():
            if (cache := find_cache(kwargs)) is not None:
                with cache.calling(self, _ids(*args, **kwargs)):
                    return torch.nn.Module.__call__(self, *args, **kwargs)
        elif _reads_prompt(*args, **kwargs):
            return _call_eagerly(self, *args, **kwargs)
        return torch.nn.Module.__call__(self, *args, **kwargs)

    model.__call__ = call


def _reads_prompt(*args: Any, **kwargs: Any) -> bool:
    cache = find_cache(kwargs)
    inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    tokens = next((one for one in inputs if isinstance(one, Tensor)), None)
    return cache is not None and tokens is not None and not cache.takes_step(tokens.shape[1])


def _ids(first: Any = None, *_: Any, **named: Any) -> Tensor | None:
    """The ids among the arguments of a call of a model, None where there are none."""
    ids = named.get("input_ids", first)
    is_text = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if is_text else None


@torch.compiler.disable(reason=PROMPTS)
def _call_eagerly(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _named_arguments(loop: Callable[..., Any]) -> set[str]:
    """The keyword arguments that only this loop has."""
    parameters = inspect.signature(loop).parameters.values()
    return {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def _hand_over_arguments() -> None:
    """Lets a loop that is marked have all arguments of ``generate``, which sorts them first."""
    generation: Any = GenerationMixin
    original = generation._extract_generation_mode_kwargs

    @functools.wraps(original)
    def extract(self: Any, custom_generate: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        _accept_cache(kwargs)
        if not getattr(custom_generate, _TAKES_ALL, False):
            return original(self, custom_generate, kwargs, *args)
        own = _named_arguments(custom_generate) & kwargs.keys()
        named = {name: kwargs.pop(name) for name in own}
        return {**original(self, None, kwargs, *args), **named}

    generation._extract_generation_mode_kwargs = extract
