"""Milliseconds per token and bytes of cache against the length of the text.

    python examples/speed_and_memory.py --out pictures
    python examples/speed_and_memory.py --out pictures --model Qwen/Qwen3-4B --lengths 4096,32768

Speed depends on the size of a model, not on what it has learnt, so by default it is one of four
layers of 512 with random weights.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.telemetry.measure import measure
from compressed_cache.versions import cache_argument

FULL = "transformers' DynamicCache"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What a token takes after texts of growing length."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for speed_and_memory.png")
    parser.add_argument("--model", help="a hub or local model (default: random weights)")
    parser.add_argument("--policies", default="streaming_llm,h2o,snapkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated after each")
    options = parser.parse_args()

    model = load(options.model)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for length in map(int, options.lengths.split(",")):
        prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, length))
        for policy in (None, *options.policies.split(",")):
            # Each policy takes graphs of its own, and torch makes only a few of one function.
            torch._dynamo.reset()
            cache = CompressedCache(policy, options.budget) if policy else DynamicCache()
            with measure(model) as measured:
                model.generate(
                    prompt.to(model.device),
                    attention_mask=torch.ones_like(prompt).to(model.device),
                    **cache_argument(cache),
                    min_new_tokens=options.tokens,
                    max_new_tokens=options.tokens,
                    do_sample=False,
                )
            timing = measured.timing
            step_ms = 1000 * statistics.median(timing.step_s)
            mib = timing.cache_bytes / 2**20
            name = policy or FULL
            print(f"{length:>6} tokens, {name:>26}: {step_ms:6.2f} ms per token, {mib:7.2f} MiB")
            lines.setdefault(name, []).append((length, step_ms, mib))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(lines, options.budget, options.out / "speed_and_memory.png")


def load(name: str | None) -> Any:
    """A model of the user's, or a small one with random weights."""
    if name is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=2048,
            max_position_embeddings=1 << 17,
        )
        return LlamaForCausalLM(config).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to(device).eval()


def draw(lines: dict[str, list[tuple[int, float, float]]], budget: int, path: Path) -> None:
    """Two panels against the length of the text."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (name, points) in enumerate(lines.items()):
        lengths, step_ms, mib = zip(*points, strict=True)
        style: dict[str, Any] = dict(marker="osv^Dpx*"[number % 8], label=name, alpha=0.8)
        if name == FULL:
            style |= dict(color="black", linestyle="--")
        for panel, values in zip(panels, (step_ms, mib), strict=True):
            panel.plot(lengths, values, **style)
    for panel, title in zip(panels, ("milliseconds per token", "MiB of cache"), strict=True):
        panel.set_title(title)
        panel.set_xlabel(f"tokens of the text (budget {budget})")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
