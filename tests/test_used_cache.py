"""A cache that holds a text goes on with that text and with no other."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache, decode
from compressed_cache.ops.masks import left_padded
from compressed_cache.versions import cache_argument
from tests.conftest import VOCABULARY, distinct_tokens


def _refuses(
    model: LlamaForCausalLM,
    cache: CompressedCache,
    text: torch.Tensor,
    arguments: dict[str, Any],
    message: str,
) -> None:
    """The text is refused, and the cache holds what it held."""
    before = [layer.positions.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=message):
        model.generate(text, **arguments)
    for layer, positions in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.positions, positions)


@pytest.mark.parametrize("length", [12, 20, 25])
@pytest.mark.parametrize(
    "options",
    [{}, dict(custom_generate=decode), dict(num_beams=2), dict(prefill_chunk_size=5)],
    ids=["generate", "decode", "beams", "chunks"],
)
def test_a_new_text_for_a_used_cache_is_refused(
    model: LlamaForCausalLM, options: dict[str, Any], length: int
) -> None:
    cache = CompressedCache("h2o", 64)
    arguments = dict(cache_argument(cache), max_new_tokens=6, do_sample=False, **options)
    first = model.generate(distinct_tokens(2, 20), **arguments)
    message = f"begin with the 25 tokens .* be longer, got {length}"
    _refuses(model, cache, distinct_tokens(2, length, seed=1), arguments, message)
    more = torch.cat([first, distinct_tokens(2, 3, seed=2)], dim=1)
    assert model.generate(more, **arguments).shape == (2, 35)
    cache.reset()
    fresh = dict(arguments, **cache_argument(CompressedCache("h2o", 64)))
    ids = distinct_tokens(2, length, seed=1)
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **fresh))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_file_of_a_model_with_fewer_layers_is_refused(
    model: LlamaForCausalLM,
    make_model: Callable[..., LlamaForCausalLM],
    tokens: int,
    tmp_path: Path,
) -> None:
    text, cache = distinct_tokens(1, 20 + tokens), CompressedCache("h2o", 64)
    with torch.no_grad():
        model(text[:, :20], **cache_argument(cache))
        cache.save(tmp_path / "cache.safetensors")
        loaded = CompressedCache.load(tmp_path / "cache.safetensors")
        with pytest.raises(ValueError, match="must be the one that read the prompt, got one of mo"):
            make_model(num_hidden_layers=3)(text[:, 20:], **cache_argument(loaded))


@pytest.mark.parametrize("column", [3, 22])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(custom_generate=decode),
        dict(prefill_chunk_size=5),
        dict(prompt_lookup_num_tokens=2),
    ],
    ids=["generate", "decode", "chunks", "drafts"],
)
def test_a_longer_text_with_another_token_is_refused(
    model: LlamaForCausalLM, options: dict[str, Any], column: int
) -> None:
    cache = CompressedCache("h2o", 16)
    arguments = dict(cache_argument(cache), max_new_tokens=6, do_sample=False, **options)
    first = model.generate(distinct_tokens(1, 20), **arguments)
    text = torch.cat([first, distinct_tokens(1, 3, seed=2)], dim=1)
    other = text.clone()
    other[0, column] = text[0, column] % (VOCABULARY - 1) + 1
    message = f"must begin with the 25 tokens .* another token in row 0, column {column}"
    _refuses(model, cache, other, arguments, message)
    assert model.generate(text, **arguments).shape == (1, 35)


def test_what_was_read_is_known_of_snapshots_files_and_calls_by_hand(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    text, other = distinct_tokens(1, 30), distinct_tokens(1, 30, seed=1)
    cache = CompressedCache("h2o", 16)
    with torch.no_grad():
        model(text[:, :20], **cache_argument(cache))
    cache.restore(cache.snapshot())
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    for held in (cache, loaded, copy.deepcopy(cache)):
        arguments = dict(cache_argument(held), max_new_tokens=2)
        with pytest.raises(ValueError, match="another token in row 0, column 0"):
            model.generate(other, **arguments)
        assert model.generate(text, **arguments).shape == (1, 32)
        held.reset()
        assert model.generate(other, **arguments).shape == (1, 32)


@pytest.mark.parametrize("more", [(6, 3), (2, 5)], ids=["grows", "shrinks"])
def test_a_batch_that_is_padded_anew_is_refused(
    model: LlamaForCausalLM, more: tuple[int, int]
) -> None:
    arguments = dict(cache_argument(CompressedCache("h2o", 64)), max_new_tokens=4, do_sample=False)
    tokens = distinct_tokens(2, 40).tolist()
    ids, mask = left_padded([tokens[0][:10], tokens[1][:6]])
    text = model.generate(ids, attention_mask=mask, **arguments).tolist()
    ids, mask = left_padded([text[0] + tokens[0][-more[0] :], text[1][4:] + tokens[1][-more[1] :]])
    with pytest.raises(ValueError, match="another token in row 1"):
        model.generate(ids, attention_mask=mask, **arguments)


@pytest.mark.parametrize(
    ("method", "rows", "error", "message"),
    [
        ("batch_select_indices", [], ValueError, "of one row at least, of the 3"),
        ("batch_select_indices", [0, 3], ValueError, r"of the 3 rows that are held, got \[0, 3\]"),
        ("batch_select_indices", [True, False], TypeError, r"got torch.bool \[2\]"),
        ("batch_select_indices", [0.5], TypeError, "indices must be whole numbers"),
        ("batch_select_indices", 1, TypeError, "indices must be whole numbers"),
        ("reorder_cache", [0, 1], ValueError, "one index for each of the 3 rows, got 2"),
        ("reorder_cache", [0, 1, -4], ValueError, "of the 3 rows that are held"),
    ],
)
def test_rows_that_are_not_held_are_refused_and_nothing_is_moved(
    model: LlamaForCausalLM, method: str, rows: Any, error: type[Exception], message: str
) -> None:
    text = distinct_tokens(3, 22)
    caches = [CompressedCache("h2o", 12) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(text[:, :20], **cache_argument(cache))
        with pytest.raises(error, match=message):
            getattr(caches[0], method)(torch.tensor(rows))
        logits = [model(text[:, 20:], **cache_argument(cache)).logits for cache in caches]
    assert torch.equal(*logits)


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([-1, 0]), torch.tensor([True, False, True])])
def test_rows_may_be_chosen_as_those_of_a_tensor(model: LlamaForCausalLM, rows: Any) -> None:
    text, cache = distinct_tokens(3, 20), CompressedCache("h2o", 12)
    with torch.no_grad():
        model(text, **cache_argument(cache))
    positions = cache.layers[0].positions.clone()
    cache.batch_select_indices(rows)
    assert torch.equal(cache.layers[0].positions, positions[rows])


def test_a_padding_token_may_be_another(model: LlamaForCausalLM) -> None:
    arguments = dict(cache_argument(CompressedCache("h2o", 64)), max_new_tokens=4, do_sample=False)
    ids, mask = left_padded([[5, 6, 7, 8], [9, 10]])
    text = model.generate(ids, attention_mask=mask, **arguments)
    text = torch.cat([text, distinct_tokens(2, 3)], dim=1)
    text[1, :2] = 11
    mask = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], dim=1)
    assert model.generate(text, attention_mask=mask, **arguments).shape == (2, 15)


def test_beams_go_on_where_they_hold_the_text_and_are_refused_elsewhere(
    model: LlamaForCausalLM,
) -> None:
    """At the end of a search the rows are those of beams that would go on, not of its texts."""
    outcomes = set()
    for seed in range(4):
        cache = CompressedCache("h2o", 64)
        options = dict(num_beams=3, max_new_tokens=4, do_sample=False)
        first = model.generate(
            distinct_tokens(2, 14, seed=seed), **cache_argument(cache), **options
        )
        text = torch.cat([first, distinct_tokens(2, 4, seed=9)], dim=1)
        try:
            got = model.generate(text, **cache_argument(cache), **options)
        except ValueError as error:
            assert "another token in row" in str(error)
            outcomes.add("refused")
        else:
            assert torch.equal(got, model.generate(text, **options))
            outcomes.add("right")
    assert outcomes == {"refused", "right"}


@pytest.mark.parametrize("length", [12, 20, 25])
def test_a_new_text_for_a_used_cache_is_refused_while_drafting(
    model: LlamaForCausalLM, length: int
) -> None:
    arguments = dict(cache_argument(CompressedCache("h2o", 64)), max_new_tokens=6, do_sample=False)
    first = model.generate(distinct_tokens(1, 20), **arguments)
    arguments["prompt_lookup_num_tokens"] = 2
    with pytest.raises(ValueError, match=f"begin with the 25 tokens .* be longer, got {length}"):
        model.generate(distinct_tokens(1, length, seed=1), **arguments)
    more = torch.cat([first, distinct_tokens(1, 3, seed=2)], dim=1)
    assert model.generate(more, **arguments).shape[1] == 35


def test_new_tokens_alone_go_on_where_the_mask_is_of_the_whole_text(
    model: LlamaForCausalLM,
) -> None:
    more, answers = distinct_tokens(2, 3, seed=2), []
    for alone in (False, True):
        cache = CompressedCache("h2o", 64)
        arguments = dict(cache_argument(cache), max_new_tokens=6, do_sample=False)
        text = model.generate(distinct_tokens(2, 20), **arguments)
        whole = torch.cat([text, more], dim=1)
        ids = whole[:, 25:] if alone else whole
        mask = torch.ones_like(whole)
        answers.append(model.generate(ids, attention_mask=mask, **arguments)[:, -6:])
    assert torch.equal(*answers)
