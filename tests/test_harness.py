"""Compressed caches inside lm-evaluation-harness: what they answer, record and refuse."""

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressed_cache import CompressedCache
from compressed_cache.__main__ import main
from compressed_cache.integrations.harness.arguments import take_press
from compressed_cache.policies.methods.keydiff import KeyDiff
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import make_problem
from compressed_cache.tasks.record import Record, Reply
from tests.grids import slow_but
from tests.harness import evaluate, leave_out_their_tasks, messages, replies

EASY, LONG = "reasoning_shipped_easy", "reasoning_shipped_long"
H2O = {"kv_press": "h2o", "kv_budget": 140}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights would be loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were loaded before the error")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.parametrize(
    "policy", slow_but(("h2o",), ("full", "knorm", "random", "h2o", "pyramidkv"))
)
def test_replies_and_records_are_those_of_generate(policy: str) -> None:
    arguments = {"kv_press": policy, "kv_budget": 90, "kv_protect_prompt": policy == "knorm"}
    results = evaluate([EASY], limit=1, model_args=arguments, gen_kwargs={"max_gen_toks": 100})
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    for sample in results["samples"][EASY]:
        cache = CompressedCache(policy, 90, protect_prompt=policy == "knorm")
        inputs = tokenizer(sample["arguments"][0][0], return_tensors="pt")
        prompt = inputs.input_ids.shape[1]
        with torch.inference_mode():
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        (reply,) = sample["resps"][0]
        assert reply == tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
        assert reply.record == Record(
            tokens=output.shape[1] - prompt,
            truncated=bool(output[0, -1] != tokenizer.eos_token_id),
            seen_tokens=cache.get_seq_length(),
            held_tokens=cache.get_seq_length() - cache.evicted_tokens,
            cache_bytes=cache.nbytes,
        )
        assert sample["evicted_tokens"] == cache.evicted_tokens
        assert (cache.evicted_tokens > 0) == (policy != "full")


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_that_a_full_cache_verifies_answer_as_it_does(rows: int) -> None:
    options: dict[str, Any] = dict(limit=3, gen_kwargs={"max_gen_toks": 120}, batch_size=rows)
    press = {"kv_press": "h2o", "kv_budget": 90, "dtype": "float32"}
    full = evaluate([EASY], model_args={"dtype": "float32"}, **options)
    found = evaluate([EASY], model_args=press | {"kv_lossless": True}, **options)
    assert replies(found, EASY) == replies(full, EASY)
    summary = found["config"]["compressed_cache"]
    assert summary["lossless"] is True
    assert 0 < summary["accepted"] <= summary["drafted"]
    assert summary["acceptance_rate"] == summary["accepted"] / summary["drafted"]
    records = [sample["resps"][0][0].record for sample in found["samples"][EASY]]
    assert sum(record.tokens for record in records) - len(records) <= summary["tokens"]
    assert all(record.evicted_tokens == 0 for record in records)
    alone = evaluate([EASY], model_args=press, **options)
    (bytes_alone,) = {s["resps"][0][0].record.cache_bytes for s in alone["samples"][EASY]}
    assert all(record.cache_bytes > bytes_alone for record in records)
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.slow
def test_batches_of_any_size_answer_as_their_rows_do_alone() -> None:
    # Walks of both lengths, so that rows are padded and end at different times: the short ones by
    # themselves.
    options: dict[str, Any] = {
        "limit": 2,
        # The harness finds an automatic size with rows of the greatest length.
        "model_args": {
            "kv_press": "snapkv",
            "kv_budget": 150,
            "dtype": "float32",
            "max_length": 512,
        },
        "gen_kwargs": {"max_gen_toks": 230},
    }
    alone = evaluate([EASY, LONG], batch_size=1, **options)
    for size in (3, "auto"):
        together = evaluate([EASY, LONG], batch_size=size, max_batch_size=6, **options)
        for task in (EASY, LONG):
            assert replies(alone, task) == replies(together, task)
            for metric in ("tokens", "evicted_tokens", "held_tokens", "accuracy"):
                pairs = zip(alone["samples"][task], together["samples"][task], strict=True)
                assert all(one[metric] == other[metric] for one, other in pairs)


@pytest.mark.slow
def test_without_kv_arguments_nothing_changes() -> None:
    options: dict[str, Any] = {"limit": 2, "gen_kwargs": {"max_gen_toks": 60}}
    results = evaluate([EASY], **options)
    full = evaluate([EASY], model_args={"kv_press": "full"}, **options)
    assert replies(results, EASY) == replies(full, EASY)
    assert all(type(reply) is str for (reply,) in replies(results, EASY))
    assert "tokens,none" not in results["results"][EASY]
    assert "compressed_cache" not in results["config"]


def test_the_results_say_which_press_it_was() -> None:
    results = evaluate([EASY], limit=1, model_args={**H2O, "kv_recent": 7})
    assert results["config"]["model_args"]["kv_press"] == "h2o"
    described = results["config"]["compressed_cache"]
    assert described["policy"] == "h2o"
    assert (described["budget"], described["recent"], described["interval"]) == (140, 7, 1)
    sample = results["samples"][EASY][0]
    assert described["evicted_tokens"] == sample["evicted_tokens"] > 0
    assert json.loads(json.dumps(sample["resps"])) == sample["resps"]


def test_single_documents_may_be_chosen() -> None:
    options: dict[str, Any] = {"gen_kwargs": {"max_gen_toks": 110}, "samples": {EASY: [7, 3]}}
    results = evaluate([EASY], model_args=H2O, **options)
    assert sorted(sample["doc_id"] for sample in results["samples"][EASY]) == [3, 7]
    with pytest.raises(ValueError, match=r"document 7 has 40 tokens"):
        evaluate([EASY], model_args={**H2O, "max_length": 120}, **options)


@pytest.mark.parametrize("word", ["kv_policy", "kv_press"])
def test_every_argument_is_reachable(word: str) -> None:
    arguments = {
        word: "snapkv",
        "kv_budget": 100,
        "kv_interval": 4,
        "kv_sinks": 3,
        "kv_recent": 20,
        "kv_protect_prompt": True,
        "kv_window": 16,
        "kv_kernel_size": 3,
        "kv_pool": "max",
    }
    given = dict(arguments, pretrained="x")
    press = take_press(given)
    assert press is not None and given == {"pretrained": "x"}
    expected = {name.removeprefix("kv_"): value for name, value in arguments.items()}
    expected["policy"] = expected.pop(word.removeprefix("kv_"))
    assert press.describe() == expected
    assert take_press({word: "none", "dtype": "auto"}) is None
    unset = take_press({word: "snapkv", "kv_interval": "none"})
    assert unset is not None and unset.describe()["interval"] == 32


def test_a_chat_template_applies_and_is_measured(tmp_path: Path) -> None:
    shutil.copytree(MODEL_PATH, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = (
        "{% for message in messages %}nut {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}{{ 'is ' if enable_thinking }}so{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = {**H2O, "pretrained": str(tmp_path / "model")}
    arguments |= {"enable_thinking": True, "think_end_token": "</think>"}
    options: dict[str, Any] = {"limit": 1, "apply_chat_template": True}
    results = evaluate([EASY], model_args=arguments, **options)
    (sample,) = results["samples"][EASY]
    prompt = sample["arguments"][0][0]
    assert prompt == f"nut {sample['doc']['prompt']} is so"
    length = len(tokenizer(prompt).input_ids)
    assert sample["resps"][0][0].record.seen_tokens == length + sample["tokens"] - 1
    with pytest.raises(ValueError, match=rf"document 0 has {length} tokens"):
        evaluate([EASY], model_args={**arguments, "max_length": length + 399}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{"device_map": "auto"}, {"parallelize": True}])
def test_models_spread_by_accelerate_work(extra: dict[str, Any]) -> None:
    options: dict[str, Any] = {"limit": 1, "gen_kwargs": {"max_gen_toks": 120}}
    plain = evaluate([EASY], model_args=H2O, **options)
    spread = evaluate([EASY], model_args=H2O | extra, **options)
    assert replies(plain, EASY) == replies(spread, EASY)
    assert spread["results"][EASY]["evicted_tokens,none"] > 0


@pytest.mark.slow
def test_a_budget_without_effect_is_said_loudly() -> None:
    with messages() as heard:
        evaluate(
            [EASY, LONG],
            limit=1,
            batch_size=2,
            model_args={**H2O, "kv_budget": 300},
            gen_kwargs={"max_gen_toks": 300},
        )
    assert [message for message in heard if "evicted_tokens" in message] == [
        "reasoning_shipped_easy: evicted_tokens = 0. None of 1 replies outgrew the budget of 300 "
        "(the longest had 244 tokens, prompt included), so this measured a full cache."
    ]
    options: dict[str, Any] = {"limit": 1, "gen_kwargs": {"max_gen_toks": 110}}
    with messages() as heard:
        evaluate([EASY], model_args=H2O, **options)
        evaluate([EASY], model_args={"kv_press": "full"}, **options)
    assert not any("evicted_tokens" in message for message in heard)


@pytest.mark.slow
def test_the_response_cache_knows_the_press(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "limit": 2,
        "use_cache": str(tmp_path / "responses"),
        "gen_kwargs": {"max_gen_toks": 90},
    }
    narrow = {"kv_press": "h2o", "kv_budget": 60}
    full = evaluate([EASY], **options)
    first = evaluate([EASY], model_args=narrow, **options)
    assert replies(first, EASY) != replies(full, EASY)
    again = evaluate([EASY], model_args=narrow, **options)
    assert again["config"]["compressed_cache"]["replies"] == 0
    assert replies(again, EASY) == replies(first, EASY)
    assert again["results"][EASY]["tokens,none"] == first["results"][EASY]["tokens,none"]
    other = evaluate([EASY], model_args={**narrow, "kv_recent": 3}, **options)
    assert other["config"]["compressed_cache"]["replies"] == 2


# The shipped model is so sure of itself that it takes heat to make it vary.
SAMPLING = {"do_sample": True, "temperature": 4.0, "top_k": 0, "max_gen_toks": 20}


def _sampled(seed: int, limit: int, **options: Any) -> list[list[str]]:
    results = evaluate(
        [EASY],
        limit=limit,
        torch_random_seed=seed,
        gen_kwargs=dict(SAMPLING),
        model_args={"kv_press": "random", "kv_budget": 48, "dtype": "float32"},
        metadata={"repeats": 3},
        **options,
    )
    return replies(results, EASY)


@pytest.mark.slow
def test_each_repeat_is_reproducible() -> None:
    first = _sampled(1, 2)
    assert [len(set(document)) for document in first] == [3, 3]
    assert _sampled(1, 2) == first
    assert _sampled(2, 2) != first
    # What else is in the run does not matter.
    assert _sampled(1, 1) == first[:1]


@pytest.mark.slow
def test_repeats_give_the_mean_and_the_best_of_k() -> None:
    results = evaluate(
        [LONG],
        limit=4,
        batch_size=12,
        gen_kwargs={"do_sample": True, "temperature": 1.5},
        model_args={"kv_press": "h2o", "kv_budget": 200},
        metadata={"repeats": 3},
    )
    samples = results["samples"][LONG]
    for sample in samples:
        assert sample["accuracy"] * 3 in (0, 1, 2, 3)
        assert sample["pass@k"] == float(sample["accuracy"] > 0)
    summary = results["results"][LONG]
    assert summary["pass@k,none"] == sum(sample["pass@k"] for sample in samples) / 4
    assert summary["accuracy,none"] < summary["pass@k,none"]
    assert results["configs"][LONG]["repeats"] == 3


def test_sampling_takes_what_the_makers_recommend(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"limit": 1, "gen_kwargs": {"do_sample": True, "max_gen_toks": 8}}
    with pytest.raises(ValueError, match=r"do_sample=True needs a temperature"):
        evaluate([EASY], model_args=H2O, **options)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def recommending(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", recommending)
    results = evaluate([EASY], model_args=H2O, **options)
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert results["config"]["compressed_cache"]["sampling"] == recommended
    # As the command line gives it: a whole number is an int.
    options["gen_kwargs"] = "do_sample=True,temperature=1,max_gen_toks=8"
    results = evaluate([EASY], model_args=H2O, **options)
    assert results["config"]["compressed_cache"]["sampling"] == recommended | {"temperature": 1.0}


def test_log_likelihoods_are_those_of_the_full_cache_and_that_is_said_once() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def ask(**arguments: Any) -> list[tuple[float, bool]]:
        model = HFLM(str(MODEL_PATH), device="cpu", **arguments)
        texts = ("tea 1 plus", "tax 4 goods 3 oil 2p")
        return [
            model.loglikelihood([Instance("loglikelihood", {}, (text, " 4 is"), 0)])[0]
            for text in texts
        ]

    with messages() as heard:
        assert ask(**H2O) == ask()
    assert [message for message in heard if "full cache" in message] == [
        "log-likelihood requests are answered with the full cache: nothing is decoded in them, so "
        "kv_ arguments change nothing"
    ]


FOREIGN = """
task: foreign
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["answer 0", "list"], max_gen_toks: 150}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: whole
    filter: [{{function: take_first}}]
  - name: last
    filter:
      - {{function: regex, regex_pattern: "([0-9]) [.]", group_select: -1}}
      - {{function: take_first}}
"""


def test_other_tasks_take_compressed_caches_too(tmp_path: Path) -> None:
    problem = make_problem(0, 3)
    last = problem.trace.partition(" list")[0].split()[-2]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": problem.prompt, "answer": last}))
    (tmp_path / "foreign.yaml").write_text(FOREIGN.format(rows=rows))
    results = evaluate([str(tmp_path / "foreign.yaml")], model_args=H2O)
    summary = results["results"]["foreign"]
    assert (summary["exact_match,whole"], summary["exact_match,last"]) == (0.0, 1.0)
    # Cut at a stop string, which is counted as generated.
    assert (
        results["config"]["compressed_cache"]["tokens"] == problem.trace.split().index("list") + 1
    )


def test_a_reply_survives_pickling() -> None:
    reply = pickle.loads(pickle.dumps(Reply("text", Record(5, False, 9, 4, 100))))
    assert (reply, reply.record) == ("text", Record(5, False, 9, 4, 100))
    assert reply.record.evicted_tokens == 5
    assert Reply(7) == "7" and Reply(7).record is None


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"kv_press": "snapkw"},
        ValueError,
        r"kv_press='snapkw': unknown policy 'snapkw', expected one of .*Did you mean 'snapkv'\?",
    ),
    (
        {"kv_press": "snapkv", "kv_widow": 8},
        TypeError,
        r"unknown model argument 'kv_widow' .*Did you mean 'kv_window'\?",
    ),
    (
        {"kv_press": "h2o", "kv_window": 8},
        TypeError,
        r"unknown model argument 'kv_window' for kv_press='h2o'",
    ),
    (
        {"kv_press": "h2o", "kv_lossless": 1},
        TypeError,
        r"kv_lossless must be a bool, got 1 \(int\)",
    ),
    (
        {"kv_press": "h2o", "kv_compression_ratio": 0.5},
        TypeError,
        r"kv_press='h2o': compression_ratio must be given as kv_budget, so that results are of one",
    ),
    (
        {"kv_budget": 64},
        ValueError,
        r"'kv_budget' given without kv_policy. Add e.g. kv_policy=snapkv \(kv_press is the same\)",
    ),
    (
        {"kv_press": "none", "kv_budget": 64},
        ValueError,
        r"'kv_budget' given without kv_policy",
    ),
    (
        {"kv_policy": "h2o", "kv_press": "h2o"},
        ValueError,
        r"kv_policy and kv_press are the same argument. Leave one of them out.",
    ),
    (
        {"kv_policy": "h2o", "kv_window": 8},
        TypeError,
        r"'kv_window' for kv_policy='h2o', expected one of 'kv_budget', .*'kv_policy'",
    ),
    (
        {"kv_press": "snapkv", "kv_budget": 0},
        ValueError,
        r"kv_press='snapkv': budget must be an int >= 1, got 0 \(each argument carries the prefix",
    ),
    (
        {"kv_press": "snapkv", "kv_budget": 8, "kv_recent": 32},
        ValueError,
        r"kv_press='snapkv': budget must be .*, got 8",
    ),
    (
        {"kv_press": "snapkv", "kv_budget": "many"},
        TypeError,
        r"kv_press='snapkv': budget must be .*'many'",
    ),
    (
        {"kv_press": "h2o", "kv_budget": 30, "kv_protect_prompt": True},
        ValueError,
        rf"^{EASY}, document 0: budget must be at least prompt \+ 1 with protect_prompt=True",
    ),
    (
        {"kv_press": "snapkv", "max_length": 300},
        ValueError,
        r"reasoning_shipped_easy: the prompt of document 0 has 40 tokens and its reply may have "
        r"400, together more than the model's 300. Allow shorter replies \(--gen_kwargs "
        r"max_gen_toks=260\)",
    ),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "kind", "message"), REFUSED, ids=[str(case[0]) for case in REFUSED]
)
def test_bad_arguments_are_refused_before_the_weights_are_loaded(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        evaluate([EASY], limit=2, model_args=arguments)


def test_a_refusal_while_generating_leaves_no_frames_and_no_bar_of_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # With a budget of each layer, the prompt is met when it is read.
    budgets = "/".join(["30"] * 4)
    arguments = {"kv_press": "h2o", "kv_budget": budgets, "kv_protect_prompt": True}
    with pytest.raises(ValueError, match=r"^budget must be at least prompt") as caught:
        evaluate([EASY], limit=2, model_args=arguments)
    names = [Path(entry.path).name for entry in caught.traceback]
    assert "huggingface.py" not in names and names[-1] == "adapter.py"
    # Closed before the traceback is printed.
    assert "Running generate_until requests" in capsys.readouterr().err


def test_other_errors_while_generating_keep_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    # By PyTorch, in a line of this package.
    monkeypatch.setattr(KeyDiff, "scores", lambda *_: None)
    with pytest.raises((AttributeError, TypeError)) as caught:
        evaluate([EASY], limit=2, model_args=H2O | {"kv_press": "keydiff"})
    assert "huggingface.py" in [Path(entry.path).name for entry in caught.traceback]


@pytest.mark.slow
def test_eval_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "hf", "--tasks", EASY, "--limit", "1", "--device", "cpu"]
    arguments = f"pretrained={MODEL_PATH},kv_press=h2o,kv_budget=30,kv_protect_prompt=True"
    monkeypatch.setattr("sys.argv", ["x"])
    leave_out_their_tasks(monkeypatch)
    assert main(["eval", *options, "--model_args", arguments]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"{EASY}, document 0: budget must be at least prompt")
    assert "Traceback" not in error and error.count("budget must be") == 1


@pytest.mark.usefixtures("no_weights")
def test_another_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.4.12", "0.5.0"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, found=version: found)
        with pytest.raises(RuntimeError, match=rf"lm_eval 0.4.13 to 0.4.x, found {version}"):
            evaluate([EASY], limit=1, model_args=H2O)


def test_a_model_class_that_generates_otherwise_is_refused() -> None:
    from lm_eval.models.huggingface import HFLM

    class Own(HFLM):
        def _model_generate(self, *args: Any, **kwargs: Any) -> Any: ...

    with pytest.raises(NotImplementedError, match="Own generates in its own way"):
        Own(str(MODEL_PATH), device="cpu", **H2O)


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    DeepseekV3Config(num_hidden_layers=2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="multi-head latent attention"):
        evaluate([EASY], limit=1, model_args={**H2O, "pretrained": str(tmp_path)})


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A factory of ``--metadata`` for a folder with so many rows of GSM8K."""

    def make(*lines: str) -> dict[str, str]:
        (tmp_path / "gsm8k.jsonl").write_text("\n".join(lines))
        return {"data_dir": str(tmp_path)}

    return make


GOOD = json.dumps({"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"})
BROKEN = [
    ('{"question": "1', r"gsm8k.jsonl, line 3: .*Unterminated string"),
    ("[1]", r"gsm8k.jsonl, line 3: must be a JSON object, got list"),
    ('{"question": "?"}', r"line 3: column 'answer' is missing, needed are question, answer"),
    ('{"question": 1, "answer": "#### 1"}', r"line 3: column 'question' must be str, got int"),
    ('{"question": "?", "answer": "two"}', r"line 3: 'answer' has no '####' before its result"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("line", "message"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_row_is_named_before_the_weights_are_loaded(
    folder: Callable[..., dict[str, str]], line: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(["reasoning_gsm8k"], metadata=folder(GOOD, "", line), model_args=H2O)


@pytest.mark.usefixtures("no_weights")
def test_missing_data_is_said_before_the_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no local rows at .*gsm8k.jsonl"):
        evaluate(["reasoning_gsm8k"], metadata={"data_dir": str(tmp_path)}, model_args=H2O)

    def gated(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("Dataset 'yale-nlp/FOLIO' is a gated dataset on the Hub.\nMore.")

    monkeypatch.setattr("datasets.load_dataset", gated)
    with pytest.raises(RuntimeError) as caught:
        evaluate(["reasoning_logic"], model_args=H2O)
    assert str(caught.value).startswith(
        "reasoning_folio: the hub does not give yale-nlp/FOLIO. PermissionError: Dataset "
        "'yale-nlp/FOLIO' is a gated dataset on the Hub. The dataset is gated: accept its terms"
    )
    assert "--metadata data_dir=FOLDER or COMPRESSED_CACHE_DATA=FOLDER" in str(caught.value)
    # One error, not the hub's own above it.
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("repeats", [0, "3", True])
def test_bad_repeats_are_refused(repeats: Any) -> None:
    with pytest.raises(ValueError, match="repeats must be a whole number from 1"):
        evaluate([EASY], limit=1, metadata={"repeats": repeats})


@pytest.mark.slow
def test_an_adapter_and_a_dtype_pass_through(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, r=4))
    adapted.save_pretrained(tmp_path)
    options: dict[str, Any] = {"limit": 1, "gen_kwargs": {"max_gen_toks": 110}}
    plain = evaluate([EASY], model_args=H2O, **options)
    both = evaluate([EASY], model_args={**H2O, "peft": str(tmp_path)}, **options)
    assert replies(plain, EASY) != replies(both, EASY)
    assert both["results"][EASY]["evicted_tokens,none"] > 0
    half = evaluate([EASY], model_args={**H2O, "dtype": "bfloat16"}, **options)
    ratio = half["results"][EASY]["cache_bytes,none"] / plain["results"][EASY]["cache_bytes,none"]
    assert 0.5 < ratio < 0.6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
# Ternary weights, the one kind that transformers quantises without another package. It compiles a
# function for that, which takes longer than all the rest.
@torch._dynamo.config.patch(disable=True)
def test_quantised_weights_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(MODEL_PATH, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    (path / "config.json").write_text(json.dumps(config))

    def reply(**arguments: Any) -> str:
        results = evaluate([EASY], limit=1, model_args=arguments, gen_kwargs={"max_gen_toks": 60})
        return replies(results, EASY)[0][0]

    quantised = reply(pretrained=str(path))
    assert quantised != reply()
    # A budget that is never reached gives what the model gives by itself.
    assert reply(pretrained=str(path), kv_press="h2o", kv_budget=200) == quantised
    pressed = reply(pretrained=str(path), kv_press="h2o", kv_budget=50)
    assert pressed.record.held_tokens == 50 and pressed.record.evicted_tokens > 0


def test_metrics_of_every_document_agree_with_the_summary() -> None:
    results = evaluate([EASY], limit=8, batch_size=8, model_args=H2O, stderr=True)
    summary, samples = results["results"][EASY], results["samples"][EASY]
    for metric in ("accuracy", "answered", "tokens", "truncated", "evicted_tokens", "held_tokens"):
        mean = sum(sample[metric] for sample in samples) / 8
        assert summary[f"{metric},none"] == pytest.approx(mean)
    right = [sample["tokens"] for sample in samples if sample["accuracy"]]
    assert summary["tokens_right,none"] == pytest.approx(sum(right) / len(right))
    accuracy, error = summary["accuracy,none"], summary["accuracy_stderr,none"]
    assert error == pytest.approx((accuracy * (1 - accuracy) / 7) ** 0.5)
    # Wilson's interval, from its own formula.
    z, n = 1.959964, 8
    middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) ** 0.5
    assert summary["accuracy_low,none"] == pytest.approx(middle - half, abs=1e-6)
    assert summary["accuracy_high,none"] == pytest.approx(middle + half, abs=1e-6)
    assert all(a <= b for a, b in itertools.pairwise([middle - half, accuracy, middle + half]))
