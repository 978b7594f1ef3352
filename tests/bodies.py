"""Bodies of requests: ones that are refused, good ones of the schema, and accepted ones."""

import re

from asking import PROMPT
from conftest import EXPERTS
from hypothesis import strategies as st

BAD = [
    ({"prompt": "x", "model": "gpt"}, 404, "gpt"),
    ({"prompt": "x", "model": None}, 200, ""),  # all names are of one family: the first answers
    ({"prompt": "x", "tools": []}, 400, "`tools`"),
    ({"prompt": "x", "suffix": "y"}, 400, "`suffix`"),
    ({"prompt": "x", "response_format": {"type": "yaml"}}, 400, "`response_format.type`"),
    ({"prompt": "x", "structured_outputs": {}}, 400, "`structured_outputs`"),
    ({"prompt": "x", "best_of": 3}, 400, "`best_of`"),
    ({"prompt": "x", "no_such_field": 1}, 400, "`no_such_field`"),
    ({"prompt": "x", "fusion": {"rules": "grid"}}, 400, "`fusion.rules`"),
    ({"prompt": "x", "fusion": {"rule": "magic"}}, 400, "`fusion.rule`"),
    ({"prompt": "x", "fusion": {"experts": ["chemistry"]}}, 400, "chemistry"),
    ({"prompt": "x", "fusion": {"weights": {"math": 1.0}}}, 400, "`weights`"),
    ({"prompt": "x", "prompts": {"chemistry": "y"}}, 400, "chemistry"),
    ({"prompt": ["x", "y"], "prompts": {"base": "y"}}, 400, "`prompts`"),
    ({"prompt": ""}, 400, "`prompt`"),
    ({"prompt": []}, 400, "`prompt`"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({}, 400, "`prompt`"),
    ({"prompt": 5}, 400, "`prompt`"),
    ({"prompt": ["x", 5]}, 400, "`prompt`"),
    ({"prompt": [5] * 300}, 400, "prompt"),
    ({"prompt": [300]}, 400, "vocabulary"),
    ({"prompt": [-1]}, 400, "vocabulary"),
    ({"prompt": [10**40]}, 400, "vocabulary"),
    ({"prompt": "\ud800"}, 400, "`prompt`"),
    ({"prompt": "x", "max_tokens": -1}, 400, "`max_tokens`"),
    ({"prompt": "x", "max_tokens": 0}, 400, "`max_tokens`"),
    ({"prompt": "x", "max_tokens": 10**30}, 400, "`max_tokens`"),
    ({"prompt": "x", "max_tokens": "many"}, 400, "`max_tokens`"),
    ({"prompt": "x", "temperature": -1}, 400, "`temperature`"),
    ({"prompt": "x", "temperature": 10**400}, 400, "`temperature`"),
    ({"prompt": "x", "top_p": 0}, 400, "`top_p`"),
    ({"prompt": "x", "n": 0}, 400, "`n`"),
    ({"prompt": "x", "n": 10**9}, 400, "`n`"),
    ({"prompt": ["x"] * 300}, 400, "300"),
    ({"prompt": "x", "seed": 2**70}, 400, "`seed`"),
    ({"prompt": "x", "stop": [""]}, 400, "`stop`"),
    ({"prompt": "x", "stop_token_ids": [300]}, 400, "`stop_token_ids`"),
    ({"prompt": "x", "logit_bias": {"300": 1}}, 400, "`logit_bias`"),
    ({"prompt": "x", "logit_bias": {"x": 1}}, 400, "`logit_bias"),
    ({"prompt": "x", "logprobs": 1000}, 400, "`logprobs`"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "`stream_options`"),
    ({"prompt": "x", "stream": True, "fusion": {"experts": ["chemistry"]}}, 400, "chemistry"),
]
"""Each with the status of its answer, and what an error names."""

MEANT = {
    "/v1/completions": {"model": "dlf", "prompt": PROMPT, "max_tokens": 1},
    "/v1/chat/completions": {
        "model": "large",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
    },
    "/v1/score": {"model": "dlf", "prompt": PROMPT, "continuation": " rock"},
    "/tokenize": {"model": "dlf"},
    "/detokenize": {"model": "dlf", "tokens": [5, 6]},
}
"""What makes a body of each path a good one."""


def meant(body, path):
    """A body of the schema, about models, experts and tokens that there are, and without fields
    that exclude each other; one short answer each, so that there is time for many."""
    if path not in MEANT:
        return body
    made = {name: value for name, value in body.items() if value is not None} | MEANT[path]
    shapes = ("response_format", "structured_outputs")
    for name in ("n", "best_of", "prompts", "max_completion_tokens", *shapes):
        made.pop(name, None)
    if not made.get("stream"):
        made.pop("stream_options", None)
    if made.get("top_logprobs"):
        made["logprobs"] = True
    if made.get("tools"):
        made["tool_choice"] = "none"
    made["min_tokens"] = min(made.get("min_tokens", 0), 1)
    made["stop_token_ids"] = [token % 300 for token in made.get("stop_token_ids", [])]
    made["logit_bias"] = {
        str(int(token) % 300): bias
        for token, bias in made.get("logit_bias", {}).items()
        if re.fullmatch("[0-9]{1,9}", token)  # a schema's pattern forbids no other names
    }
    fusion = {name: value for name, value in made.get("fusion", {}).items() if value is not None}
    about = {"experts": ["math"], "bounds": {"math": [0, 1]}, "step": 0.1, "alone": "math"}
    fusion |= {name: value for name, value in about.items() if name in fusion}
    if fusion.pop("weights", None):
        fusion |= {"rule": "static", "weights": {"math": 0.5}}
    if "alone" in fusion:
        fusion = {"alone": "math"}
    elif "bounds" in fusion:
        fusion["experts"] = ["math"]
    made["fusion"] = fusion
    known = {"/v1/score": {"model", "prompt", "continuation", "fusion"}}
    known |= {"/tokenize": {"model", "prompt", "add_special_tokens"}}
    known |= {"/detokenize": {"model", "tokens"}}
    return {name: value for name, value in made.items() if name in known.get(path, made)}


def accepted():
    """Bodies of completions that are accepted, of values as extreme as that allows."""

    def maybe(**fields):
        return st.fixed_dictionaries({}, optional=fields)

    def ends(low, high, *between):
        return st.sampled_from([low, high, *between])

    wide = {"experts": ["math"], "bounds": {"math": [-100, 100]}, "step": 2}
    fusion = st.one_of(
        maybe(
            rule=st.sampled_from(["grid", "exact"]),
            select=st.sampled_from(["paper", "strongest", "blend"]),
            step=ends(0.1, 2.0),
            experts=st.sampled_from([[], ["math"], ["facts", "math"], list(EXPERTS)]),
            return_weights=st.booleans(),
            trace=st.booleans(),
        ),
        st.fixed_dictionaries(
            {
                "rule": st.just("static"),
                "weights": st.dictionaries(
                    st.sampled_from(EXPERTS), ends(-100, 100, 1e-300), max_size=3
                ),
            },
        ),
        st.sampled_from(
            [
                wide,
                {**wide, "rule": "exact"},
                {**wide, "bounds": {"math": [-1e-300, 100]}},
                {**wide, "bounds": {"math": [99.999, 100]}, "step": 1e-2},
                {"alone": "large"},
                {"alone": "math"},
            ]
        ),
    )
    return maybe(
        fusion=fusion,
        temperature=ends(0, 100, 1e-300, 1e-4),
        top_p=ends(1e-300, 1.0, 0.5),
        top_k=ends(-1, 2**31 - 1, 1),
        min_p=ends(0.0, 1.0, 1e-300),
        seed=ends(0, 2**63 - 1),
        presence_penalty=ends(-2.0, 2.0),
        frequency_penalty=ends(-2.0, 2.0),
        repetition_penalty=ends(0.01, 100.0),
        logit_bias=st.sampled_from(
            [{str(k): 100.0 for k in range(300)}, {str(k): -100.0 for k in range(300)}, {"0": 1e-9}]
        ),
        stop=st.sampled_from([["x" * 1024] * 64, ["\U0001f600"], "\x00"]),
        stop_token_ids=st.sampled_from([list(range(300)), [0]]),
        ignore_eos=st.booleans(),
        min_tokens=ends(0, 4),
        logprobs=ends(0, 20),
        echo=st.booleans(),
        user=st.text(max_size=256),
    )
