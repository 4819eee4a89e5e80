"""transformers' server with exits, asked by OpenAI's client: each gets its own answer and its own exit layer."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import dyvte
from dyvte.cli.main import main
from dyvte.data import encode, load_samples

ROOT = Path(__file__).parents[1]
MLLM, HEADS = str(ROOT / "checkpoints/reference-mllm"), str(ROOT / "checkpoints/reference-heads")
LINE = ["serve", MLLM, f"heads={HEADS}", "dtype=float32", "device=cpu"]


@pytest.fixture(scope="module")
def samples():
    return load_samples({"scenes": {"split": "test", "n": 8, "seed": 7}})[:]


@pytest.fixture(scope="module")
def expected(samples):
    """Answers and exit layers of the samples one by one, without a server."""
    model = AutoModelForImageTextToText.from_pretrained(MLLM, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(MLLM)
    answers = []
    with dyvte.visual_exit(model, dyvte.LearnedExit(dyvte.ExitHeads.from_pretrained(HEADS))) as exits:
        for sample in samples:
            inputs = encode(processor, [sample])
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.append((text, told(int(exits.layers[0]))))
    return answers


@pytest.fixture(scope="module")
def client():
    """A client of the server that the command starts, on whichever port is free."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="the server has an environment of its own: make test-serve")
    import openai
    import uvicorn

    started = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "run", lambda app, **options: started.update(options, app=app))
        main([*LINE, "port=8080"])
    assert (started["host"], started["port"]) == ("localhost", 8080)
    server = uvicorn.Server(uvicorn.Config(started["app"], port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join()


def told(exit_layer: int, layers: int = 10) -> dict:
    return {"exit_layer": exit_layer, "layers": layers, "saved": round(1 - exit_layer / layers, 4)}


def message(sample, image: str | None = None) -> dict:
    file = io.BytesIO()
    sample.images[0].save(file, "PNG")
    image = image or base64.b64encode(file.getvalue()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    return {"role": "user", "content": [picture, {"type": "text", "text": sample.question}]}


def ask(client, messages: list[dict], stream: bool = False) -> tuple[str, dict]:
    """The answer, and what the server tells of its exit; all requests bear the same id."""
    headers = {"X-Request-ID": "one"}
    wanted = {"messages": messages, "max_tokens": 8, "temperature": 0, "stream": stream, "extra_headers": headers}
    said = client.chat.completions.create(model=MLLM, **wanted)
    if not stream:
        return said.choices[0].message.content, said.model_extra["dyvte"]
    *chunks, last = said
    assert last.choices[0].finish_reason == "stop" and not any("dyvte" in chunk.model_extra for chunk in chunks)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), last.model_extra["dyvte"]


@pytest.mark.parametrize("stream", [False, True])
def test_eight_clients_at_once_get_their_own_exits(client, samples, expected, stream):
    with ThreadPoolExecutor(8) as clients:
        got = list(clients.map(lambda sample: ask(client, [message(sample)], stream), samples))
    assert got == expected and len({exit["exit_layer"] for _, exit in got}) > 3


def test_a_question_without_an_image_never_leaves(client):
    assert ask(client, [{"role": "user", "content": "what is 2 plus 3 ?"}])[1] == told(10)


def test_other_routes_serve_the_same_model_and_no_other(client, samples, expected):
    import httpx

    picture = message(samples[1])["content"][0]["image_url"]["url"]
    asked = [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": samples[1].question}]
    wanted = {"model": MLLM, "input": [{"role": "user", "content": asked}], "max_output_tokens": 8, "temperature": 0}
    assert client.responses.create(**wanted, stream=False).output_text == expected[1][0]
    loading = httpx.post(f"{str(client.base_url).removesuffix('v1/')}load_model", json={"model": "other/model"})
    assert "this server has" in loading.text


@pytest.mark.parametrize(
    "request_, fault",
    [
        (lambda sample: {"messages": [message(sample, image="AAAA")]}, "image"),
        (lambda sample: {"messages": [message(sample)], "extra_body": {"generation_config": "{"}}, "Expecting"),
        (lambda sample: {"messages": None}, "needs messages"),
        (lambda sample: {"messages": [message(sample)], "model": "another"}, "pinned"),
        (lambda sample: {"messages": [message(sample)], "extra_body": {"exit_layer": 3}}, "exit_layer"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_one_answered(client, samples, expected, request_, fault):
    import openai

    with pytest.raises(openai.APIStatusError, match=fault) as refused:
        client.chat.completions.create(**{"model": MLLM} | request_(samples[0]))
    assert refused.value.status_code in (400, 422)
    assert ask(client, [message(samples[1])]) == expected[1]


@pytest.mark.parametrize(
    "arguments, available, fault",
    [
        ([], False, "pip install 'dyvte[serve]'"),
        (["shard=fsdp2"], True, "one process"),
        (["risk=2"], True, "risk must be above 0 and below 1, not 2"),
        (["risk=0.0000001"], True, "cannot show a risk as low"),
    ],
)
def test_what_cannot_be_served_is_said_beforehand(arguments, available, fault, monkeypatch, capsys):
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: available)
    with pytest.raises(SystemExit) as ended:
        main([*LINE, *arguments])
    assert ended.value.code == 2 and fault in capsys.readouterr().err
