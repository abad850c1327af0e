"""Runs presses in the environment of kvpress and tells which positions they keep, line by line.

The first line holds the settings and is answered with versions; each further one is a case. Lines
are JSON.
"""

import contextlib
import importlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

kvpress: Any = importlib.import_module("kvpress")


class Positions:
    """The positions of what a cache holds, which it does not know itself.

    A token that stays is told by its value, or where that has changed by its key.
    """

    def __init__(self, model: Any, *, sort: bool) -> None:
        self.modules = [layer.self_attn for layer in model.model.layers]
        for module in self.modules:
            module.masked_key_indices = None
        self.sort = sort
        """Whether the cache is put in the order of positions after a cut."""
        self._held: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def kept(self) -> list[list[list[int]]]:
        """Sorted positions by layer and head, without those that attention is kept from."""
        layers = []
        for module in self.modules:
            positions = self._held[module.layer_idx].clone()
            # Of a press that shares a layer out, and shortens no cache.
            if module.masked_key_indices is not None:
                _, heads, slots = module.masked_key_indices
                positions[heads, slots] = -1
            layers.append([sorted(p for p in head if p >= 0) for head in positions.tolist()])
        return layers

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """While tokens are read; to be entered after a press, and left before it: some read the
        prompt again then."""
        handles = [
            module.register_forward_hook(hook, with_kwargs=True, prepend=is_first)
            for module in self.modules
            for hook, is_first in ((self._read, True), (self._cut, False))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, module: Any, _: Any, arguments: dict[str, Any], output: Any) -> None:
        index, layer = module.layer_idx, arguments["past_key_values"].layers[module.layer_idx]
        new = arguments["cache_position"].expand(layer.keys.shape[1], -1)
        held = self._held.get(index)
        self._held[index] = new if held is None else torch.cat([held, new], dim=1)
        self._before[index] = layer.keys, layer.values

    def _cut(self, module: Any, _: Any, arguments: dict[str, Any], output: Any) -> None:
        index, layer = module.layer_idx, arguments["past_key_values"].layers[module.layer_idx]
        keys, values = self._before.pop(index)
        if layer.keys.shape == keys.shape:
            return
        same = _equal_rows(layer.values, values)
        same |= ~same.any(dim=-1, keepdim=True) & _equal_rows(layer.keys, keys)
        if not (same.sum(dim=-1) == 1).all():
            raise LookupError("what was kept cannot be told by its values and keys")
        self._held[index] = self._held[index].gather(1, same.int().argmax(dim=-1))
        if self.sort:
            self._held[index], order = self._held[index].sort(dim=1)
            order = order[None, :, :, None].expand_as(layer.keys)
            layer.keys, layer.values = layer.keys.gather(2, order), layer.values.gather(2, order)


def _equal_rows(some: Tensor, all_: Tensor) -> Tensor:
    """Which rows of ``[1, H, n, D]`` are which of ``[1, H, S, D]``: ``[H, n, S]`` bool."""
    return (some[0][:, :, None] == all_[0][:, None]).all(dim=-1)


class Presses:
    """Presses as one would type them, with what they need of the model or the text put into them.

    Args:
        statistics: tensors by kind and layer.
    """

    def __init__(self, statistics: dict[str, list[dict[str, Tensor]]], dtype: torch.dtype) -> None:
        self.statistics, self.dtype = statistics, dtype
        made: list[Callable[..., Any]] = [
            self.QFilterPress,
            self.ExpectedAttentionStatsPress,
            self.DuoAttentionPress,
            self.FinchPress,
            self.KVzipPress,
        ]
        self.names = vars(kvpress) | {one.__name__: one for one in made}

    def make(self, press: str, ratio: float | None) -> Any:
        """One that cuts a prompt by ``ratio``, where it can be told."""
        made = eval(press, {**self.names, "ratio": ratio})
        if ratio is not None:
            # Some have ratios among their arguments.
            with contextlib.suppress(AttributeError):
                made.compression_ratio = ratio
        return made

    def QFilterPress(self) -> Any:
        press = kvpress.QFilterPress()
        press.q_filters = self._all("qfilter", "filters")
        press.post_init_from_model = lambda model: None
        return press

    def ExpectedAttentionStatsPress(self, **options: Any) -> Any:
        press = kvpress.ExpectedAttentionStatsPress(**options)
        press.mu = self._all("expected_attention", "mean").flatten(1, 2)
        press.cov = self._all("expected_attention", "covariance").flatten(1, 2)
        return press

    def DuoAttentionPress(self, *, sink_size: int, recent_size: int, **options: Any) -> Any:
        press = kvpress.DuoAttentionPress(**options)
        gates = self._all("duo_attention", "gates").numpy()
        press.load_attention_pattern = lambda model: (sink_size, recent_size, gates)
        return press

    def FinchPress(self, *, window_size: int, **options: Any) -> Any:
        press = kvpress.FinchPress(**options)
        # Found by a delimiter in the text otherwise.
        press.delimiter_token_id, press.window_size = -1, window_size
        return press

    def KVzipPress(self, **options: Any) -> Any:
        press = kvpress.KVzipPress(**options)
        mask = press._make_mask
        # In float64 the lowest number would not fit into its mask, which is in float32.
        press._make_mask = lambda weights, size: mask(weights.float(), size)
        return press

    def _all(self, kind: str, name: str) -> Tensor:
        """Of all layers, ``[layers, heads, ...]``."""
        return torch.stack([layer[name] for layer in self.statistics[kind]]).to(self.dtype)


def undo_angles(press: Any, next_position: Callable[[], int]) -> None:
    """Gives buffered queries, and those of a block, the angles of their own positions."""
    parts = [press]
    while (part := getattr(parts[-1], "base_press", getattr(parts[-1], "press", None))) is not None:
        parts.append(part)

    def angled(
        method: Callable[..., Any], end_of: Callable[[Tensor, Any], int]
    ) -> Callable[..., Any]:
        def call(module: Any, states: Tensor, keys: Tensor, values: Tensor, a: Any, kw: Any) -> Any:
            end = end_of(states, kw)
            positions = torch.arange(end - states.shape[1], end)[None]
            angles = module.rotary_emb(states, positions)
            return method(module, states, keys, values, a, {**kw, "position_embeddings": angles})

        return call

    if isinstance(press, kvpress.DecodingPress):
        press.compress = angled(press.compress, lambda states, kw: next_position())
        for part in parts:
            if hasattr(part, "apply_avg_rope"):
                average = part.apply_avg_rope
                part.apply_avg_rope = lambda module, mu, cov, _, f=average: f(
                    module, mu, cov, next_position()
                )
    elif isinstance(press, kvpress.ChunkPress):
        read = 0

        def end_of(states: Tensor, kw: Any) -> int:
            nonlocal read
            # Blocks come in order, layer by layer.
            end = read + states.shape[1]
            read = end % kw["hidden_states"].shape[1]
            return end

        press.press.score = angled(press.press.score, end_of)


def undo_layers(press: Any) -> None:
    """Gives each layer as many slots as any other."""
    if isinstance(press, kvpress.KVzipPress):
        press.layerwise = True


def undo_rounding(press: Any, prompt: int) -> None:
    """Leaves heads that share their slots as many as they would have one by one."""
    if isinstance(press, kvpress.KVzipPress):
        gone = prompt - int(prompt * (1 - press.compression_ratio))
        # It rounds down.
        press.compression_ratio = (gone + 1e-6) / prompt


def undo_ties(press: Any) -> None:
    """Breaks ties in favour of what comes later in the cache."""
    press = getattr(press, "base_press", press)
    if isinstance(press, kvpress.ScorerPress):
        score = press.score
        press.score = lambda *given: (
            score(*given).argsort(dim=-1, stable=True).argsort(dim=-1).to(given[2].dtype)
        )


class Case:
    """A text and a press.

    Args:
        model: reads the text.
        presses: makes the press.
        case: what is asked for.
    """

    def __init__(self, model: Any, presses: Presses, case: dict[str, Any]) -> None:
        model.set_attn_implementation(case["attention"])
        self.model, self.case, self.undone = model, case, case["undone"]
        self.ids, self.prompt = torch.tensor([case["ids"]]), case["prompt"]
        self.press = presses.make(case["press"], case["ratio"])
        if case["interval"] is not None:
            self.press = kvpress.DecodingPress(
                self.press, compression_interval=case["interval"], target_size=self.prompt
            )
        self.read = 0
        if "angles" in self.undone:
            undo_angles(self.press, lambda: self.read)
        if "ties" in self.undone:
            undo_ties(self.press)
        if "layers" in self.undone:
            undo_layers(self.press)
        if "rounding" in self.undone:
            undo_rounding(self.press, self.prompt)
        self.cache = DynamicCache(config=model.config)
        self.positions = Positions(model, sort="order" in self.undone)

    def kept(self) -> list[list[list[list[int]]]]:
        """What is held after each cut."""
        cuts, interval = [], self.case["interval"]
        with self.press(self.model), self.positions.noted():
            self._read(self.prompt)
            if interval is not None:
                with self._silenced():
                    for step in range(1, self.ids.shape[1] - self.prompt + 1):
                        self._read(1)
                        if step % interval == 0:
                            cuts.append(self.positions.kept())
        return cuts if interval is not None else [self.positions.kept()]

    def _read(self, count: int) -> None:
        start, self.read = self.read, self.read + count
        positions = torch.arange(start, self.read)
        self.model(
            self.ids[:, start : self.read],
            past_key_values=self.cache,
            position_ids=positions[None],
            cache_position=positions,
        )

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        """While no layer passes its attention on, if that is undone."""
        hooks = [
            module.o_proj.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
            for module in self.positions.modules
            if "passed on" in self.undone
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _statistics(path: str) -> list[dict[str, Tensor]]:
    """Tensors by layer."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        layers.setdefault(int(index), {})[name] = tensor
    return [layers[index] for index in sorted(layers)]


def main() -> None:
    """Answers case after case."""
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    # It warns of each press that is experimental, each time.
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    dtype = getattr(torch, settings["dtype"])
    model: Any = LlamaForCausalLM(LlamaConfig(**settings["config"])).to(dtype).eval()
    model.load_state_dict(load_file(settings["weights"]))
    # Where KVzipPress looks for a tokenizer.
    model.config.name_or_path = settings["tokenizer"]
    statistics = {kind: _statistics(path) for kind, path in settings["statistics"].items()}
    presses = Presses(statistics, dtype)
    names = ("kvpress", "transformers", "torch")
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        try:
            with torch.inference_mode():
                answer: dict[str, Any] = {"kept": Case(model, presses, json.loads(line)).kept()}
        # What a press asserts, and what it meets where it was not made to work.
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            answer = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
