"""Neither keys nor what is asked stands in any log, however loud. In a process and a Ray of its
own, so that the whole session's logs are of these requests."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from services.models import load_model
from services.ports import free_port
from tests.builders import save_tiny
from tests.teacher.conftest import CONTEXT
from tests.waiting import DEADLINE_S

KEY = "a-key-that-nobody-else-has"
TEXT = "what-was-asked-in-words"
IDS = [41_263, 38_734, 47_911]  # no other numbers of these stand in a row
VOCABULARY = 50_000

PROGRAM = """
    import logging, sys
    from functools import partial
    import httpx, ray
    from ray import serve
    from teacher.config import TeachersConfig
    from teacher.serve import deploy_teacher

    directory, broken, port, key, text, *ids = sys.argv[1:]
    ids = [int(id_) for id_ in ids]

    def loud():
        logging.basicConfig(level=logging.DEBUG)
        logging.getLogger().setLevel(logging.DEBUG)

    loud()
    session = ray.init(
        "local", num_cpus=2, include_dashboard=False,
        runtime_env={"worker_process_setup_hook": loud},
    )
    print("session", session["session_dir"], flush=True)
    serve.start(
        proxy_location="HeadOnly", http_options={"port": int(port)},
        logging_config={"log_level": "DEBUG"},
    )
    serve.RunTarget = partial(serve.RunTarget, logging_config={"log_level": "DEBUG"})
    engine = {"kind": "transformers", "device": "cpu"}
    settings = {"engine": engine, "resources": {"cpus": 0.2}, "max_ongoing_requests": 2}
    other = {"model": broken, **settings, "key_tokens_per_s": 0.001}
    good_one = {"model": directory, **settings}
    both, scoring = {"default": good_one, "broken": other}, {"port": 0}
    for name, teachers in (("both", both), ("one", {"default": good_one})):
        served = TeachersConfig.model_validate({"teachers": teachers, "scoring": scoring})
        url = deploy_teacher(served, [key], name=name, route_prefix="/" + name)
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600)
        good = {"sequences": [{"prompt": ids, "completion": ids}], "top_logprobs": 2}

        def ask(expected, body, path="/v1/score", **headers):
            answer = http.post(path, json=body, headers=headers)
            assert answer.status_code == expected, (answer.status_code, answer.text[:300])

        ask(200, good)
        ask(200, {"model": directory, "prompt": ids, "max_tokens": 1}, "/v1/completions")
        ask(401, good, Authorization="Bearer wrong-" + key)
        ask(404, {**good, "model": text})
        ask(413, {"sequences": [{"prompt": ids * 1000, "completion": ids}]})
        ask(422, {"sequences": [{"prompt": [text, *ids], "completion": ids}]})
        ask(422, {"sequences": [{"prompt": ids, "completion": [10**6, *ids]}]})
        ask(422, {"prompt": text, "max_tokens": 1}, "/v1/completions")
        assert http.post("/v1/score", content=b"{" + text.encode()).status_code == 422
        assert http.get("/v1/models", params={"model": "none"}).status_code == 200
        if name == "both":
            ask(500, {**good, "model": broken})
            ask(429, {**good, "model": broken})
        try:
            http.post("/v1/score", json={"sequences": good["sequences"] * 1000}, timeout=0.05)
        except httpx.TimeoutException:  # the caller goes away
            pass
    ray.shutdown()
"""


def leaks(said: bytes) -> list[str]:
    """What of the requests stands there: as text, as a list in whatever form, as raw bytes."""
    ids = rb"\D{1,4}".join(str(id_).encode() for id_ in IDS)
    raw = np.array(IDS, np.int32).tobytes()
    patterns = {
        "the key": re.escape(KEY.encode()),
        "the text": re.escape(TEXT.encode()),
        "token ids": ids,
        "raw token ids": re.escape(raw) + rb"|" + re.escape(repr(raw)[2:-1].encode()),
    }
    return [what for what, pattern in patterns.items() if re.search(pattern, said)]


def test_a_leak_would_be_found() -> None:
    assert leaks(f"{KEY} {TEXT} {IDS}".encode()) == ["the key", "the text", "token ids"]
    assert leaks(repr(np.array(IDS, np.int32).tobytes()).encode()) == ["raw token ids"]
    assert leaks(b"41263 requests, 38734 tokens") == []


@pytest.mark.slow
def test_no_log_holds_keys_text_or_token_ids(tmp_path: Path) -> None:
    good = save_tiny(tmp_path / "good", vocab=VOCABULARY, context=CONTEXT)
    broken = save_tiny(tmp_path / "broken", vocab=VOCABULARY, context=CONTEXT)
    model = load_model(str(broken))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    model.save_pretrained(broken)
    port = str(free_port("127.0.0.1"))
    arguments = [str(good), str(broken), port, KEY, TEXT, *map(str, IDS)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode()[-3000:]
    found = re.search(rb"^session (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None
    logs = {"what it printed": done.stdout} | {
        str(file): file.read_bytes()
        for file in Path(found[1].decode(), "logs").rglob("*")
        if file.is_file()
    }
    everything = b"\n".join(logs.values())
    assert b"POST /v1/score" in everything or b"/v1/score 200" in everything  # it was loud
    assert {name: leaks(said) for name, said in logs.items() if leaks(said)} == {}
