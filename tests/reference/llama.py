"""A Llama that reads one token of one row at a time and keeps its cache in plain lists.

The prompt is read token by token with nothing evicted, which is full causal attention. Then every
key/value head chooses what it keeps, and from there each step evicts first, then stores the new
token, then attends.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from tests.reference.policies import (
    Layout,
    Row,
    Rules,
    Score,
    Token,
    Vector,
    View,
    attention_row,
    layout_of,
    least_channels,
    merge,
    rank,
    without_criticalkv,
)

Kept = list[list[tuple[int, ...]]]
"""``kept[layer][head]``: positions a key/value head holds, in ascending order."""


@dataclass
class Trace:
    """What one row did.

    Attributes:
        tokens: The tokens after the prompt, fed or chosen.
        logits: ``logits[c]`` is ``[vocabulary]``, from which ``tokens[c]`` is chosen.
        kept: ``kept[c]`` is the cache at that moment: ``kept[0]`` right after the prompt.
        gap: Smallest relative difference between two scores whose order decided something. Where it
            is near the precision of float32, a comparison with the library is a matter of luck.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[Vector] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    gap: float = math.inf


class ReferenceLlama:
    """The weights of a transformers model, computed with in float64."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        # Half of its fields are optional for the type checker, and set by the time a model exists.
        config: Any = model.config
        rope = config.rope_parameters
        assert rope["rope_type"] == "default" and not config.attention_bias and not config.mlp_bias
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_key_value_heads
        self.group_size: int = config.num_attention_heads // config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.theta: float = rope["rope_theta"]
        self.epsilon: float = config.rms_norm_eps
        self.weights: dict[str, Vector] = {
            name: weight.detach().double().numpy() for name, weight in model.state_dict().items()
        }

    def generate(
        self,
        prompt: Sequence[int],
        num_new_tokens: int,
        *,
        score: Score,
        rules: Rules,
        forced: Sequence[int] | None = None,
        floor: float | None = None,
    ) -> Trace:
        """Continue a prompt under a policy.

        Args:
            prompt: Token ids.
            num_new_tokens: How many tokens to choose. The last one is not fed back, as in
                transformers.
            score: The policy.
            rules: Budget, interval and protection.
            forced: Tokens to feed in place of the most likely ones.
            floor: The heads of a layer share their slots, and each keeps this part of the budget.
                None: each head has its own slots.
        """
        trace = Trace()
        layout = layout_of(score)
        row = _Row(self, layout) if floor is None else _SharingRow(self, layout, floor)
        logits = [row.read(token) for token in prompt][-1]
        row.compress_prompt(score, rules, trace)
        for step in range(num_new_tokens):
            trace.logits.append(logits)
            trace.kept.append(row.kept())
            trace.tokens.append(int(np.argmax(logits)) if forced is None else forced[step])
            if step + 1 < num_new_tokens:
                row.make_room(step, score, rules, trace)
                logits = row.read(trace.tokens[-1])
        return trace

    def projections(self, layer: int, head: int) -> list[Vector]:
        """What follows attention, ``[hidden, D]`` for each query head that shares a key head."""
        weight = self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
        first = head * self.group_size
        return [
            weight[:, query * self.head_dim : (query + 1) * self.head_dim]
            for query in range(first, first + self.group_size)
        ]

    def norm(self, hidden: Vector, name: str) -> Vector:
        """RMSNorm of ``hidden`` ``[hidden]`` (https://arxiv.org/abs/1910.07467)."""
        return hidden / math.sqrt(hidden @ hidden / len(hidden) + self.epsilon) * self.weights[name]

    def rotate(self, vector: Vector, position: int) -> Vector:
        """Turn a query or key ``[D]`` to its position.

        RoPE (https://arxiv.org/abs/2104.09864); channel ``i`` is paired with channel ``i + D / 2``.
        """
        cos, sin = _cos_and_sin(position, self.head_dim, self.theta)
        half = self.head_dim // 2
        first, second = vector[:half], vector[half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    def mlp(self, hidden: Vector, prefix: str) -> Vector:
        """Gated linear unit with SiLU, ``[hidden]`` to ``[hidden]``."""
        gate = self.weights[f"{prefix}.gate_proj.weight"] @ hidden
        up = self.weights[f"{prefix}.up_proj.weight"] @ hidden
        return self.weights[f"{prefix}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)


class _Row:
    """One text: what every layer and head holds, and everything it has ever seen."""

    def __init__(self, model: ReferenceLlama, layout: Layout) -> None:
        layers, heads = range(model.num_layers), range(model.num_heads)
        self.model = model
        self.layout = layout
        self.num_read = 0
        self.prompt_length = 0
        self.held: list[list[list[Token]]] = [[[] for _ in heads] for _ in layers]
        self.unrotated: list[list[list[Vector]]] = [[[] for _ in heads] for _ in layers]
        self.lost: list[list[list[int]]] = [[[] for _ in heads] for _ in layers]
        self.queries: list[list[list[Vector]]] = [[[] for _ in heads] for _ in layers]
        self.rows: list[list[list[Row]]] = [[] for _ in layers]
        self.hidden: list[list[Vector]] = [[] for _ in layers]
        self.memory: list[list[dict[int, float]]] = [[{} for _ in heads] for _ in layers]
        self.victims: list[list[list[int | None]]] = [[[] for _ in heads] for _ in layers]

    def read(self, token: int) -> Vector:
        """Store a token, attend over everything held, return the logits ``[vocabulary]``."""
        model, position = self.model, self.num_read
        hidden = model.weights["model.embed_tokens.weight"][token]
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            hidden = hidden + self.attend(
                model.norm(hidden, f"{prefix}.input_layernorm.weight"), layer, position
            )
            hidden = hidden + model.mlp(
                model.norm(hidden, f"{prefix}.post_attention_layernorm.weight"), f"{prefix}.mlp"
            )
        self.num_read += 1
        return model.weights["lm_head.weight"] @ model.norm(hidden, "model.norm.weight")

    def attend(self, hidden: Vector, layer: int, position: int) -> Vector:
        """Grouped-query attention of one token, ``[hidden]`` to ``[hidden]``."""
        model = self.model
        prefix = f"model.layers.{layer}.self_attn"
        queries = (model.weights[f"{prefix}.q_proj.weight"] @ hidden).reshape(-1, model.head_dim)
        keys = (model.weights[f"{prefix}.k_proj.weight"] @ hidden).reshape(-1, model.head_dim)
        values = (model.weights[f"{prefix}.v_proj.weight"] @ hidden).reshape(-1, model.head_dim)
        self.hidden[layer].append(hidden)
        rows: list[Row] = []
        outputs: list[Vector] = []
        for head in range(model.num_heads):
            held = self.held[layer][head]
            held.append(Token(position, model.rotate(keys[head], position), values[head]))
            group = [
                model.rotate(queries[head * model.group_size + member], position)
                for member in range(model.group_size)
            ]
            self.queries[layer][head].append(np.stack(group))
            self.unrotated[layer][head].append(keys[head])
            seen = held
            if self.layout.contiguous:
                seen = [
                    token._replace(
                        key=model.rotate(self.unrotated[layer][head][token.position], place)
                    )
                    for place, token in enumerate(held)
                ]
                group = [
                    model.rotate(queries[head * model.group_size + member], len(held) - 1)
                    for member in range(model.group_size)
                ]
            lost, whole = self.lost[layer][head], self.layout.whole
            seen = [
                token
                if token.position > position - whole
                else token._replace(key=without(token.key, lost))
                for token in seen
            ]
            for query in group:
                row = attention_row(query, seen)
                rows.append(row)
                outputs.append(
                    sum(
                        (row[token.position] * token.value for token in held),
                        np.zeros(model.head_dim),
                    )
                )
        self.rows[layer].append(rows)
        return model.weights[f"{prefix}.o_proj.weight"] @ np.concatenate(outputs)

    def views(self, layer: int, rules: Rules) -> list[View]:
        """What a policy sees of each head of a layer, before any of them gives up a token."""
        heads = [self.view(layer, head, rules) for head in range(self.model.num_heads)]
        return [replace(view, layer_views=heads) for view in heads]

    def view(self, layer: int, head: int, rules: Rules) -> View:
        """The same of one head."""
        first = head * self.model.group_size
        lost = self.lost[layer][head]
        return View(
            layer=layer,
            head=head,
            held=[token._replace(key=without(token.key, lost)) for token in self.held[layer][head]],
            queries=[without(query, lost) for query in self.queries[layer][head]],
            group_rows=[rows[first : first + self.model.group_size] for rows in self.rows[layer]],
            layer_rows=self.rows[layer],
            rules=rules.of_head(layer, head),
            prompt_length=self.prompt_length,
            memory=self.memory[layer][head],
            projections=self.model.projections(layer, head),
            hidden=self.hidden[layer],
        )

    def compress_prompt(self, score: Score, rules: Rules, trace: Trace) -> None:
        """Drop the lowest tokens of the prompt until the budget is met."""
        self.prompt_length = self.num_read
        for layer in range(self.model.num_layers):
            for head, view in enumerate(self.views(layer, rules)):
                excess = self.prompt_length - rules.slots(layer, head)
                if excess <= 0:
                    continue
                ranking = rank(view, score, view.rules, prompt_length=self.prompt_length)
                if excess > len(ranking.positions):
                    raise ValueError("protected tokens do not fit into the budget")
                # Within the dropped ones the order is irrelevant.
                _note_gaps(trace, ranking.scores[excess - 1 : excess + 1])
                self.drop(layer, head, ranking.positions[:excess], score)
        # Only now: keys are ranked as a whole, and those that stay choose the channels.
        for layer, heads in enumerate(self.held):
            for head, held in enumerate(heads):
                self.lost[layer][head] = least_channels(
                    [token.key for token in held],
                    self.queries[layer][head][-self.layout.window :],
                    channel_ratio=self.layout.channel_ratio,
                )

    def make_room(self, step: int, score: Score, rules: Rules, trace: Trace) -> None:
        """Make sure that every head has a place for the token of decode step ``step``.

        Every ``interval`` steps what scores minus infinity is dropped, and the next ``interval``
        places are listed in advance: free ones first, then the lowest tokens as they rank now.
        Where the list is too short, the oldest token goes that is not a sink or of a protected
        prompt.
        """
        turn = step % rules.interval
        for layer in range(self.model.num_layers):
            views = self.views(layer, rules) if turn == 0 else []
            for head in range(self.model.num_heads):
                if turn == 0:
                    # Also where nothing has to go: a policy may write down what it saw.
                    view = views[head]
                    ranking = rank(view, score, view.rules, prompt_length=self.prompt_length)
                    num_dropped = ranking.scores.count(-math.inf)
                    self.drop(layer, head, ranking.positions[:num_dropped], score)
                    del ranking.positions[:num_dropped], ranking.scores[:num_dropped]
                    free = rules.slots(layer, head) - len(self.held[layer][head])
                    num_free = min(rules.interval, free)
                    num_tokens = rules.interval - num_free
                    victims: list[int | None] = [None] * num_free
                    if num_tokens:
                        if not ranking.positions and not num_free:
                            raise ValueError("protected tokens do not fit into the budget")
                        _note_gaps(trace, ranking.scores[: num_tokens + 1])
                        victims += ranking.positions[:num_tokens]
                    self.victims[layer][head] = victims
                listed = self.victims[layer][head]
                if turn < len(listed):
                    victim = listed[turn]
                else:
                    victim = min(
                        token.position
                        for token in self.held[layer][head]
                        if not rules.of_head(layer, head).protects_for_good(
                            token.position, prompt_length=self.prompt_length
                        )
                    )
                if victim is not None:
                    self.drop(layer, head, [victim], score)

    def drop(self, layer: int, head: int, positions: Sequence[int], score: Score) -> None:
        """Remove tokens from one head, all at once."""
        held = self.held[layer][head]
        evicted = [token for token in held if token.position in positions]
        assert len(evicted) == len(positions)
        kept = [token for token in held if token.position not in positions]
        held[:] = merge(score, kept, evicted)

    def kept(self) -> Kept:
        """Positions in the cache now."""
        return [[tuple(token.position for token in held) for held in layer] for layer in self.held]


class _SharingRow(_Row):
    """The same, where the heads of a layer share ``heads * budget`` slots."""

    def __init__(self, model: ReferenceLlama, layout: Layout, floor: float) -> None:
        super().__init__(model, layout)
        self.floor = floor
        self.listed: list[list[tuple[int, int] | None]] = [[] for _ in range(model.num_layers)]

    def ranking(
        self, layer: int, score: Score, rules: Rules, *, incoming: int
    ) -> list[tuple[float, int, int]]:
        """Score, position and head of what may be evicted, worst first.

        Under CriticalKV the scores that it changes say how many tokens of each head go until then,
        and its own which of them: its stages share the slots that these scores leave to the head.
        """
        base, heads = without_criticalkv(score), range(self.model.num_heads)
        listed = self.shared(layer, base, rules, incoming=incoming)
        if base is score:
            return listed
        assert isinstance(score, partial)
        held = sum(len(tokens) for tokens in self.held[layer])
        excess = max(0, held - len(heads) * rules.slots(layer, 0))
        gone = [head for _, _, head in self.shared(layer, base, rules, incoming=0)[:excess]]
        worst_first = []
        for head in heads:
            view = self.view(layer, head, rules)
            slots = len(view.held) - gone.count(head)
            score_of_head = partial(score, slots=slots, safe_slots=self.safe_slots(layer, rules))
            ranking = rank(view, score_of_head, rules, prompt_length=self.prompt_length)
            worst_first.append(iter(ranking.positions))
        return [(value, next(worst_first[head]), head) for value, _, head in listed]

    def safe_slots(self, layer: int, rules: Rules) -> int:
        """How many slots each head has at least."""
        return math.ceil(Fraction(str(self.floor)) * rules.slots(layer, 0))

    def shared(
        self, layer: int, score: Score, rules: Rules, *, incoming: int
    ) -> list[tuple[float, int, int]]:
        """Score, position and head of what may be evicted, worst first, by the scores themselves.

        Of equal scores the older token goes first, of equal positions the one of the first head.
        Each head withholds its best tokens, so that it has its floor once so many came in.
        """
        candidates: list[tuple[float, int, int]] = []
        withheld = self.safe_slots(layer, rules) - incoming
        for head in range(self.model.num_heads):
            view = self.view(layer, head, rules)
            own = []
            for value, token in zip(score(view), view.held, strict=True):
                safe = rules.protects(
                    token.position, incoming=view.incoming, prompt_length=self.prompt_length
                )
                own.append((math.inf if safe else min(value, _HIGHEST), token.position, head))
            own.sort()
            own = own[: max(0, len(own) - max(0, withheld))]
            candidates += [entry for entry in own if entry[0] != math.inf]
        return sorted(candidates)

    def compress_prompt(self, score: Score, rules: Rules, trace: Trace) -> None:
        """Drop the lowest tokens of all heads until the budget of the layer is met."""
        self.prompt_length = self.num_read
        heads = self.model.num_heads
        for layer in range(self.model.num_layers):
            excess = heads * (self.prompt_length - rules.slots(layer, 0))
            if excess > 0:
                ranking = self.ranking(layer, score, rules, incoming=0)
                _note_gaps(trace, [value for value, _, _ in ranking[excess - 1 : excess + 1]])
                for _, position, head in ranking[:excess]:
                    self.drop(layer, head, [position], score)

    def make_room(self, step: int, score: Score, rules: Rules, trace: Trace) -> None:
        """Make sure that a layer has as many free places as heads."""
        heads, turn = self.model.num_heads, step % rules.interval
        for layer in range(self.model.num_layers):
            if turn == 0:
                total = heads * rules.interval
                held = sum(len(tokens) for tokens in self.held[layer])
                num_free = min(total, heads * rules.slots(layer, 0) - held)
                ranking = self.ranking(layer, score, rules, incoming=rules.interval)
                _note_gaps(trace, [value for value, _, _ in ranking[: total - num_free + 1]])
                self.listed[layer] = [None] * num_free
                self.listed[layer] += [entry[1:] for entry in ranking[: total - num_free]]
            for _ in range(heads):
                victim = (
                    self.listed[layer].pop(0) if self.listed[layer] else self.oldest(layer, rules)
                )
                if victim is not None:
                    self.drop(layer, victim[1], [victim[0]], score)

    def oldest(self, layer: int, rules: Rules) -> tuple[int, int]:
        """Position and head of the oldest token that may go at all."""
        return min(
            (token.position, head)
            for head, tokens in enumerate(self.held[layer])
            for token in tokens
            if not rules.protects_for_good(token.position, prompt_length=self.prompt_length)
        )


def without(vector: Vector, lost: Sequence[int]) -> Vector:
    """``[..., D]`` with zeros in these channels."""
    if not lost:
        return vector
    kept = vector.copy()
    kept[..., list(lost)] = 0.0
    return kept


@cache
def _cos_and_sin(position: int, head_dim: int, theta: float) -> tuple[Vector, Vector]:
    # Angles are float32 in transformers whatever the dtype of the model. Exact ones would differ by
    # more than all the rest of this file.
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = position * frequency
    return angle.cos().double().numpy(), angle.sin().double().numpy()


# What a policy always keeps goes before what is protected.
_HIGHEST = sys.float_info.max


def _note_gaps(trace: Trace, scores: Sequence[float]) -> None:
    for low, high in pairwise(scores):
        scale = max(abs(low), abs(high))
        trace.gap = min(trace.gap, (high - low) / scale if scale else 0.0)
