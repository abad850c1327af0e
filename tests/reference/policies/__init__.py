"""The scores of every policy, token by token, from everything a key/value head has seen."""

from collections.abc import Callable
from functools import partial

from tests.reference.policies.attention import (
    finch,
    h2o,
    morphkv,
    observed_attention,
    raas,
    rpc,
    snapkv,
    tova,
)
from tests.reference.policies.draws import random, vase, vase_dkv
from tests.reference.policies.gates import learned_gate, made_up_gate
from tests.reference.policies.keys import full, keydiff, knorm, lagkv, streaming_llm
from tests.reference.policies.layout import Layout, key_rerotation, layout_of, least_channels, think
from tests.reference.policies.modifiers import caote, chunk, chunkkv, criticalkv, merge, merging
from tests.reference.policies.redundancy import gkv, rkv, rkv_lsh
from tests.reference.policies.statistics import (
    expected_attention,
    made_up,
    qfilter,
    triattention,
    trigonometric_series,
)
from tests.reference.policies.view import (
    Ranking,
    Row,
    Rules,
    Score,
    Token,
    Vector,
    View,
    attention_row,
    rank,
    softmax,
)

__all__ = [
    "POLICIES",
    "Layout",
    "Ranking",
    "Row",
    "Rules",
    "Score",
    "Token",
    "Vector",
    "View",
    "attention_row",
    "full",
    "h2o",
    "layout_of",
    "least_channels",
    "made_up",
    "made_up_gate",
    "merge",
    "merging",
    "rank",
    "rkv",
    "rpc",
    "snapkv",
    "softmax",
    "trigonometric_series",
]

POLICIES: dict[str, Callable[..., list[float]]] = {
    "expected_attention": expected_attention,
    "finch": finch,
    "full": full,
    "gkv": gkv,
    "h2o": h2o,
    "keydiff": keydiff,
    "knorm": knorm,
    "lagkv": lagkv,
    "learned_gate": learned_gate,
    "morphkv": morphkv,
    "observed_attention": observed_attention,
    "qfilter": qfilter,
    "raas": raas,
    "random": random,
    "random_prompt": random,
    "rkv": rkv,
    "rkv_lsh": rkv_lsh,
    "rpc": rpc,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tova": tova,
    "triattention": triattention,
    "vase": vase,
    "vase_dkv": vase_dkv,
    "h2o+caote": partial(caote, base=h2o),
    "h2o+key_rerotation": partial(key_rerotation, base=h2o),
    "snapkv+key_rerotation": partial(key_rerotation, base=snapkv),
    "streaming_llm+key_rerotation": partial(key_rerotation, base=streaming_llm),
    "h2o+think": partial(think, base=h2o),
    "rkv+think": partial(think, base=rkv),
    "snapkv+think": partial(think, base=snapkv),
    "snapkv+caote": partial(caote, base=snapkv),
    "observed_attention+caote": partial(caote, base=observed_attention),
    "observed_attention+criticalkv": partial(criticalkv, base=observed_attention),
    "h2o+criticalkv": partial(criticalkv, base=h2o),
    "snapkv+criticalkv": partial(criticalkv, base=snapkv),
    "h2o+merging": partial(merging, base=h2o),
    "snapkv+merging": partial(merging, base=snapkv),
    "h2o+chunk": partial(chunk, base=h2o),
    "keydiff+chunk": partial(chunk, base=keydiff),
    "rkv+chunk": partial(chunk, base=rkv),
    "snapkv+chunk": partial(chunk, base=snapkv),
    "knorm+chunkkv": partial(chunkkv, base=knorm),
    "rkv+chunkkv": partial(chunkkv, base=rkv),
    "snapkv+chunkkv": partial(chunkkv, base=snapkv),
}
