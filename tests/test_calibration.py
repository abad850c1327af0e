"""Statistics of a model: what is collected, and which file is taken for which model."""

import copy
import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from compressed_cache import CompressedCache
from compressed_cache.__main__ import main
from compressed_cache.calibration import command
from compressed_cache.calibration.command import CORPUS
from compressed_cache.calibration.recording import CHUNK, chunks, collect
from compressed_cache.calibration.statistics import STATISTICS
from compressed_cache.ops.rotary import rotary_of
from compressed_cache.policies import POLICIES, make_policy
from compressed_cache.policies import statistics_file as files
from compressed_cache.policies.methods.calibrated import Calibrated
from compressed_cache.policies.methods.triattention import expected_logits, virtual_query
from compressed_cache.reasoner import MODEL_PATH
from tests.families import FAMILIES, LINEAR, VOCABULARY
from tests.grids import alternating
from tests.reference.comparison import distinct_tokens, make_model
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Token, attention_row, trigonometric_series

pytestmark = pytest.mark.real_statistics

CALIBRATED = [name for name, kind in POLICIES.items() if issubclass(kind, Calibrated)]


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 90, (n,), generator=generator).tolist() for n in lengths]


def calibrated(path: Path, policy: str, model: Any, *lengths: int) -> str:
    config = model.config.get_text_config()
    layers = collect(model, texts(*lengths), policy)
    files.save(path, policy=policy, model="mine", config=config, tokens=sum(lengths), layers=layers)
    return str(path)


def straight_queries(model: Any, text: list[int]) -> list[np.ndarray]:
    """``[L, H * G, D]`` of each layer before RoPE."""
    found = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _i, out: found.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [queries.unflatten(-1, (-1, model.config.head_dim)).numpy() for queries in found]


def test_means_and_covariances_are_those_of_queries_before_rope() -> None:
    model = make_model()
    pieces = texts(30, 50)
    queries = [straight_queries(model, piece) for piece in pieces]
    centres, moments = (collect(model, pieces, n) for n in ("triattention", "expected_attention"))
    for layer in range(2):
        every = np.concatenate([text[layer] for text in queries])
        half = every.shape[-1] // 2
        length = np.hypot(every[..., :half], every[..., half:]).mean(axis=0)
        found = {name: part.flatten(0, 1).numpy() for name, part in centres[layer][1].items()}
        np.testing.assert_allclose(found["mean"], every.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(found["magnitude"], np.tile(length, 2), atol=1e-6)
        later = np.concatenate([text[layer][4:] for text in queries])
        found = {name: part.flatten(0, 1).numpy() for name, part in moments[layer][1].items()}
        np.testing.assert_allclose(found["mean"], later.mean(axis=0), atol=1e-6)
        for head in range(4):
            covariance = np.cov(later[:, head].T, bias=True)
            np.testing.assert_allclose(found["covariance"][head], covariance, atol=1e-6)


def test_filters_are_the_main_direction_of_queries_after_rope() -> None:
    model = make_model()
    pieces = texts(30, 50)
    found = collect(model, pieces, "qfilter")
    reference = ReferenceLlama(model)
    for layer in range(2):
        turned = [
            [reference.rotate(query, position) for query in row]
            for piece in pieces
            for position, row in enumerate(straight_queries(model, piece)[layer])
        ]
        directions = []
        for head in range(4):
            queries = np.stack([row[head] for row in turned])
            direction = np.linalg.svd(queries)[2][0]
            directions.append(direction * math.copysign(1, float((queries @ direction).sum())))
        expected = -np.stack(directions).reshape(2, 2, -1).mean(axis=1)
        np.testing.assert_allclose(found[layer][1]["filters"].numpy(), expected, atol=1e-6)


def test_gates_are_the_attention_beyond_sinks_and_window() -> None:
    model = make_model()
    (piece,) = texts(100)
    found = collect(model, [piece], "duo_attention")
    keys: dict[int, list[np.ndarray]] = {}
    reference = ReferenceLlama(model)
    queries = straight_queries(model, piece)
    cache = CompressedCache("full")
    with torch.no_grad():
        model(torch.tensor([piece]), past_key_values=cache)
    for layer in range(2):
        keys[layer] = [head.numpy()[:100] for head in cache.layers[layer].keys[0]]
        for head in range(2):
            far = []
            for position in range(80, 100):
                held = [
                    Token(p, keys[layer][head][p], keys[layer][head][p])
                    for p in range(position + 1)
                ]
                shares = []
                for member in range(2):
                    query = reference.rotate(queries[layer][position, 2 * head + member], position)
                    row = attention_row(query, held)
                    shares.append(sum(row[p] for p in range(16, position - 63)))
                far.append(max(shares))
            gate = float(found[layer][1]["gates"][head])
            assert gate == pytest.approx(sum(far) / len(far), abs=1e-6)
            assert 0 < gate < 1


def test_the_product_with_one_query_is_the_series_of_cosines() -> None:
    model = make_model()
    rotary = rotary_of(model.config, model.model.layers[0].self_attn, 0, 16)
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(2, 3, 16, dtype=torch.float64, generator=generator)
    first, second = centre.chunk(2, dim=-1)
    length = torch.hypot(first, second) * 1.3
    magnitude = torch.cat([length, length], dim=-1)
    straight = torch.randn(1, 2, 40, 16, dtype=torch.float64, generator=generator)
    positions = torch.arange(40, dtype=torch.float64) * 37
    keys = rotary.rotate(straight, positions)
    constants = virtual_query(centre, magnitude, rotary, num_offsets=17)
    now = torch.tensor([1500.0], dtype=torch.float64)
    found = expected_logits(keys, now, constants)
    for head in range(2):
        for member in range(3):
            for index in range(40):
                key = keys[0, head, index].numpy()
                expected = trigonometric_series(
                    centre[head, member].numpy(),
                    magnitude[head, member].numpy(),
                    Token(int(positions[index]), key, key),
                    now=1500,
                    num_offsets=17,
                    theta=10_000.0,
                )
                assert float(found[0, head, member, index]) == pytest.approx(expected, abs=1e-9)


# Those that normalise queries, or rotate them in a way of their own, with every policy.
_ALL = ("Llama 3", "Qwen3", "Gemma 3", "SmolLM3", "GLM-4", "GPT-OSS", "Qwen2-VL")
_QUICK = ("Llama 3", "Gemma 3", "GLM-4")


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        pytest.param(family, policy, marks=[] if family.name in _QUICK else pytest.mark.slow)
        for family, one in alternating(FAMILIES, CALIBRATED)
        for policy in (CALIBRATED if family.name in _ALL else [one])
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_every_family_can_be_calibrated(tmp_path: Path, family: Any, policy: str) -> None:
    model = family.make()
    prompt = torch.arange(1, 25)[None]
    arguments: dict[str, Any] = dict(max_new_tokens=20, do_sample=False)
    if "full" not in family.kinds:
        with pytest.raises(ValueError, match="no layer without a sliding window"):
            collect(model, texts(40), policy)
        return
    if not family.turns and policy != "qfilter":
        with pytest.raises(NotImplementedError, match=r"rotary|position"):
            collect(model, texts(40), policy)
        return
    path = calibrated(tmp_path / "it.safetensors", policy, model, 40, 60)
    expected = [i for i, kind in enumerate(family.kinds) if kind not in (LINEAR, "sliding")]
    assert sorted(collect(model, texts(40), policy)) == expected
    everything = CompressedCache(policy, 48, calibration=path)
    full = model.generate(prompt, past_key_values=CompressedCache("full"), **arguments)
    assert torch.equal(model.generate(prompt, past_key_values=everything, **arguments), full)
    cache = CompressedCache(policy, 16, calibration=path, protect_prompt=False)
    model.generate(prompt, past_key_values=cache, **arguments)
    assert cache.evicted_tokens == 24 + 19 - 16
    assert VOCABULARY > 90


@pytest.mark.parametrize("policy", CALIBRATED)
def test_a_file_goes_on_with_the_statistics(tmp_path: Path, policy: str) -> None:
    model: Any = make_model()
    path = calibrated(tmp_path / "it.safetensors", policy, model, 60)
    text = torch.tensor([distinct_tokens(40, seed=1)])
    cache = CompressedCache(policy, 16, calibration=path, protect_prompt=False)

    def go_on(cache: CompressedCache) -> Tensor:
        for token in range(20, 40):
            out = model(text[:, token : token + 1], past_key_values=cache)
        return out.logits

    with torch.no_grad():
        model(text[:, :20], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        expected = go_on(cache)
        loaded = CompressedCache.load(tmp_path / "cache.safetensors")
        assert torch.equal(go_on(loaded), expected)


@pytest.mark.parametrize("policy", STATISTICS)
def test_the_shipped_model_brings_its_statistics(policy: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    path = files.shipped(policy, model.config)
    assert path is not None and path.stat().st_size < 200_000
    assert files.describe(path)["policy"] == policy
    if policy in CALIBRATED:
        options = {"calibration": str(path)} if policy not in NEEDY else {}
        cache = CompressedCache(policy, 24, protect_prompt=False, **options)
        model.generate(torch.arange(4, 44)[None], past_key_values=cache, max_new_tokens=4)
        assert cache.evicted_tokens == 40 + 3 - 24


def test_the_hash_is_that_of_the_shape_alone(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    expected = files.model_hash(model.config)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.config._attn_implementation = "eager"
    assert files.model_hash(loaded.config) == expected
    others = dict(num_hidden_layers=3, head_dim=8, vocab_size=7, num_key_value_heads=1)
    for name, value in others.items():
        config = copy.deepcopy(model.config)
        setattr(config, name, value)
        assert files.model_hash(config) != expected
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = 5e5
    assert files.model_hash(config) != expected


def generate(model: Any, policy: str, path: str | None) -> None:
    cache = CompressedCache(policy, 48, calibration=path)
    with torch.no_grad():
        model(torch.arange(1, 25)[None], past_key_values=cache)


def test_a_model_in_another_dtype_is_the_same(tmp_path: Path) -> None:
    path = calibrated(tmp_path / "it.safetensors", "qfilter", make_model(torch.float32), 40)
    generate(make_model().to(torch.bfloat16), "qfilter", path)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    model = make_model()
    path = calibrated(tmp_path / "it.safetensors", "qfilter", model, 40)
    other = make_model(num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"model 'mine' \(hash \w+\), not of this one \(hash"):
        generate(other, "qfilter", path)
    with pytest.raises(ValueError, match=r"model 'mine'.*but with other weights"):
        generate(make_model(seed=1), "qfilter", path)
    with pytest.raises(ValueError, match="statistics for policy 'qfilter', not 'triattention'"):
        make_policy("triattention", calibration=path)


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    opened = files.opened

    def counted(path: Path, *, what: str) -> Any:
        reads.append(path.name)
        return opened(path, what=what)

    monkeypatch.setattr(files, "opened", counted)
    model = make_model()
    path = calibrated(tmp_path / "it.safetensors", "qfilter", model, 40)
    generate(model, "qfilter", path)
    generate(model, "qfilter", path)
    assert reads == ["it.safetensors"]
    calibrated(Path(path), "qfilter", make_model(seed=1), 40)
    with pytest.raises(ValueError, match="but with other weights"):
        generate(model, "qfilter", path)
    assert reads == ["it.safetensors"] * 2


# One for each policy with statistics, by itself or with another.
NEEDY = {name: "snapkv+duo_attention" if name == "duo_attention" else name for name in STATISTICS}
# Those of the prompt will do.
del NEEDY["expected_attention"]


@pytest.mark.parametrize("policy", [*NEEDY.values(), "snapkv/qfilter", "qfilter+duo_attention"])
def test_what_a_model_without_statistics_is_told_to_do_works(tmp_path: Path, policy: str) -> None:
    model: Any = make_model()
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    vocabulary = {str(token): token for token in range(90)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="1")), unk_token="1"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(map(str, texts(120)[0])))
    options: dict[str, Any] = {}
    # A policy made of two asks for one file after the other.
    while (advice := asked_for(model, policy, options)) is not None:
        command, option = advice
        file = str(tmp_path / option)
        arguments = command.replace("FILE", file).split()
        assert main([*arguments, "--text", str(tmp_path / "text")]) == 0
        options[option] = file
    assert len(options) == 1 + (policy == "qfilter+duo_attention")


def asked_for(model: Any, policy: str, options: dict[str, Any]) -> tuple[str, str] | None:
    """The command and the option that a message names; None where all is well."""
    try:
        go(model, policy, **options)
    except ValueError as error:
        advice = re.search(r"compressed-cache (.*)\n.*pass (\w+)=FILE\.", str(error))
        assert advice is not None and advice[2] not in options
        return advice[1], advice[2]
    return None


def go(model: Any, policy: str, **options: Any) -> None:
    cache = CompressedCache(policy, 40, protect_prompt=False, recent=4, **options)
    with torch.no_grad():
        model(torch.arange(1, 61)[None], past_key_values=cache)


def test_two_policies_with_statistics_take_a_folder_of_files(tmp_path: Path) -> None:
    model = make_model()
    for policy in ("qfilter", "triattention", "duo_attention"):
        calibrated(tmp_path / f"{policy}.safetensors", policy, model, 120)
    one = str(tmp_path / "qfilter.safetensors")
    with pytest.raises(ValueError, match=r"folder with qfilter\.safetensors and triattention\.saf"):
        go(model, "qfilter/triattention", calibration=one)
    go(model, "qfilter/triattention", calibration=str(tmp_path))
    go(model, "qfilter+duo_attention", calibration=str(tmp_path), gates=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected_attention\.safetensors or model\.saf"):
        go(model, "expected_attention", calibration=str(tmp_path))
    (tmp_path / "triattention.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no calibration file triattention\.saf\w+ in"):
        go(model, "triattention", calibration=str(tmp_path))


def test_what_is_no_file_of_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        make_policy("qfilter", calibration=str(tmp_path / "none"))
    with pytest.raises(TypeError, match="calibration must be a str or None, got 3"):
        make_policy("qfilter", calibration=3)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        make_policy("qfilter", calibration=str(tmp_path / "text"))
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="must be written by 'compressed-cache calibr"):
        make_policy("qfilter", calibration=str(tmp_path / "other"))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too little text"):
        collect(make_model(), texts(4), "expected_attention")
    with pytest.raises(ValueError, match="too little text"):
        collect(make_model(), [], "qfilter")


def test_texts_are_cut_into_chunks_up_to_the_limit() -> None:
    first, second = list(range(CHUNK + 5)), list(range(100))
    assert chunks([first, second], limit=10**6) == [first[:CHUNK], first[CHUNK:], second]
    assert chunks([second, second], limit=130) == [second, second[:30]]


def test_the_command_writes_a_file_that_the_policy_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "it.safetensors"
    arguments = ["--model", str(MODEL_PATH), "--policy", "qfilter", "--out", str(out)]
    assert main(["calibrate", *arguments, "--tokens", "400"]) == 0
    assert "4 layers, 400 tokens" in capsys.readouterr().out
    assert files.describe(out)["tokens"] == "400"
    generate(AutoModelForCausalLM.from_pretrained(MODEL_PATH), "qfilter", str(out))
    assert main(["calibrate", *arguments, "--text", str(CORPUS)]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--policy": "qfilters"}, "--policy must be one of .* got 'qfilters'.*qfilter"),
        ({"--tokens": "0"}, "--tokens must be >= 1, got 0"),
        ({"--device": "nowhere"}, "--device must be one that torch finds here, got 'nowhere': "),
        ({"--out": "."}, "--out must name a file, got the folder \\."),
        ({"--text": "nowhere.txt"}, "--text must name files, got"),
    ],
)
def test_the_command_refuses_in_words(
    capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    options = {"--model": str(MODEL_PATH), "--policy": "qfilter", "--out": "x", **changes}
    assert main(["calibrate", *[part for item in options.items() for part in item]]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--policy", "qfilter", "--out", "x", "--device", "cuda"]
    assert main(["calibrate", "--model", str(MODEL_PATH), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--device must be one that torch finds here, got 'cuda': ")


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    options = ["--policy", "qfilter", "--out", f"{tmp_path}/file/x"]
    assert main(["calibrate", "--model", str(MODEL_PATH), *options]) == 1
    assert capsys.readouterr().err == f"--out {tmp_path}/file/x: Not a directory\n"


def test_ctrl_c_keeps_the_statistics_of_the_chunks_that_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = LlamaForCausalLM.forward

    def interrupted(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return read(*arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", interrupted)
    (tmp_path / "text.txt").write_text("tax 9 goods 6 " * 1000)
    options = ["--policy", "qfilter", "--text", str(tmp_path / "text.txt")]
    out = tmp_path / "it.safetensors"
    assert main(["calibrate", "--model", str(MODEL_PATH), *options, "--out", str(out)]) == 130
    captured = capsys.readouterr()
    assert captured.err == "stopped after 1 of 4 chunks\n"
    assert files.describe(out)["tokens"] == str(CHUNK)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", "/nope", "--policy", "qfilter", "--out", "x"]) == 1
    assert capsys.readouterr().err == "--model /nope: there is no folder '/nope'\n"
