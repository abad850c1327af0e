"""One text under ShadowKV, block by block and token by token, recomputed from all its keys."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.reference.llama import Kept, ReferenceLlama
from tests.reference.policies import Token, Vector, attention_row, softmax


@dataclass(frozen=True)
class Numbers:
    """As the options of the policy."""

    budget: int
    chunk_size: int
    outlier_chunks: int
    local_chunks: int
    rank: int | None = None


class ShadowText:
    """Every token of a text, and after :meth:`seal` what is near and what is far.

    Attributes:
        tokens: ``tokens[layer][head]``, all of them, exact.
        far: ``far[layer][head]`` chunks that must be fetched, as rebuilt; None before.
        near: ``near[layer][head]`` positions that need not be.
        attended: positions that the last block attended to, its own included.
    """

    def __init__(self, model: ReferenceLlama, numbers: Numbers) -> None:
        layers, heads = range(model.num_layers), range(model.num_heads)
        self.model = model
        self.numbers = numbers
        self.tokens: list[list[list[Token]]] = [[[] for _ in heads] for _ in layers]
        self.far: list[list[list[list[Token]]]] | None = None
        self.near: list[list[set[int]]] = [[set() for _ in heads] for _ in layers]
        self.attended: Kept = []

    def read(self, block: Sequence[int]) -> list[Vector]:
        """Reads tokens at once; returns the logits after each."""
        model = self.model
        self.attended = []
        first = len(self.tokens[0][0])
        hidden = [model.weights["model.embed_tokens.weight"][token] for token in block]
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            normed = [model.norm(h, f"{prefix}.input_layernorm.weight") for h in hidden]
            attended = self._attend(normed, layer, first)
            hidden = [h + a for h, a in zip(hidden, attended, strict=True)]
            normed = [model.norm(h, f"{prefix}.post_attention_layernorm.weight") for h in hidden]
            hidden = [
                h + model.mlp(n, f"{prefix}.mlp") for h, n in zip(hidden, normed, strict=True)
            ]
        head = model.weights["lm_head.weight"]
        return [head @ model.norm(h, "model.norm.weight") for h in hidden]

    def _attend(self, hidden: Sequence[Vector], layer: int, first: int) -> list[Vector]:
        model = self.model
        prefix = f"model.layers.{layer}.self_attn"
        outputs: list[list[Vector]] = [[] for _ in hidden]
        self.attended.append([])
        for head in range(model.num_heads):
            queries: list[list[Vector]] = []
            for place, state in enumerate(hidden, first):
                key, value = (self._projected(state, f"{prefix}.{n}_proj", head) for n in "kv")
                self.tokens[layer][head].append(Token(place, model.rotate(key, place), value))
                group = range(head * model.group_size, (head + 1) * model.group_size)
                queries.append(
                    [
                        model.rotate(self._projected(state, f"{prefix}.q_proj", member), place)
                        for member in group
                    ]
                )
            seen = self._seen(layer, head, queries)
            self.attended[-1].append(tuple(sorted(token.position for token in seen)))
            for place, group in enumerate(queries, first):
                before = [token for token in seen if token.position <= place]
                for query in group:
                    row = attention_row(query, before)
                    outputs[place - first].append(
                        sum((row[t.position] * t.value for t in before), np.zeros(model.head_dim))
                    )
        projection = model.weights[f"{prefix}.o_proj.weight"]
        return [projection @ np.concatenate(heads) for heads in outputs]

    def _projected(self, state: Vector, name: str, head: int) -> Vector:
        return (self.model.weights[f"{name}.weight"] @ state).reshape(-1, self.model.head_dim)[head]

    def _seen(self, layer: int, head: int, queries: Sequence[Sequence[Vector]]) -> list[Token]:
        tokens = self.tokens[layer][head]
        if self.far is None:
            return tokens
        far = self.far[layer][head]
        # The exact keys give the landmarks, whatever the fetched ones are.
        landmarks = [np.mean([tokens[t.position].key for t in chunk], axis=0) for chunk in far]
        totals = np.zeros((self.model.group_size, len(far)))
        for group in queries:
            for member, query in enumerate(group):
                logits = [float(query @ mark) / math.sqrt(len(query)) for mark in landmarks]
                totals[member] += softmax(logits)
        share = totals.max(axis=0)
        count = self.numbers.budget // self.numbers.chunk_size
        chosen = sorted(range(len(far)), key=lambda c: (share[c], c), reverse=True)[:count]
        hidden = {token.position for chunk in far for token in chunk}
        fetched = [token for number in chosen for token in far[number]]
        return sorted(fetched + [t for t in tokens if t.position not in hidden])

    def seal(self) -> None:
        """The prompt has ended."""
        numbers, size = self.numbers, self.numbers.chunk_size
        length = len(self.tokens[0][0])
        count = max(0, length // size - numbers.local_chunks)
        self.far = []
        for layer, heads in enumerate(self.tokens):
            self.far.append([])
            for head, rebuilt in enumerate(self._rebuilt(layer)):
                chunks = [heads[head][n * size : (n + 1) * size] for n in range(count)]
                worst = sorted((min(_cosines(c)), -n) for n, c in enumerate(chunks))
                outliers = {-number for _, number in worst[: numbers.outlier_chunks]}
                far = [rebuilt[n * size : (n + 1) * size] for n in range(count)]
                self.far[-1].append([c for n, c in enumerate(far) if n not in outliers])
                hidden = {token.position for chunk in self.far[-1][-1] for token in chunk}
                self.near[layer][head] = set(range(length)) - hidden

    def open(self) -> None:
        """The prompt goes on: what was exact is not at hand any more."""
        self.tokens = [self._rebuilt(layer) for layer in range(self.model.num_layers)]
        self.far = None

    def _rebuilt(self, layer: int) -> list[list[Token]]:
        """The tokens of each head with their keys cut to the rank, by what they were unrotated."""
        heads, rank = self.tokens[layer], self.numbers.rank
        if rank is None:
            return heads
        straight = [
            np.concatenate([self.model.rotate(t.key, -t.position) for t in same])
            for same in zip(*heads, strict=True)
        ]
        left, scale, right = np.linalg.svd(np.stack(straight), full_matrices=False)
        cut = (left[:, :rank] * scale[:rank]) @ right[:rank]
        keys = cut.reshape(len(cut), len(heads), -1)
        return [
            [t._replace(key=self.model.rotate(keys[t.position, head], t.position)) for t in tokens]
            for head, tokens in enumerate(heads)
        ]

    def kept(self) -> Kept:
        """What is near."""
        return [[tuple(sorted(head)) for head in layer] for layer in self.near]


def _cosines(chunk: Sequence[Token]) -> list[float]:
    mark = np.mean([token.key for token in chunk], axis=0)
    return [
        float(t.key @ mark) / float(np.linalg.norm(t.key) * np.linalg.norm(mark)) for t in chunk
    ]
