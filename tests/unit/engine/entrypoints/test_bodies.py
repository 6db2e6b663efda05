"""Bodies are read at a cost that their length bounds: the first fault ends it, and large ones are read on a thread."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator
from starlette.responses import Response
from starlette.testclient import TestClient

from waybill.engine.control.operations import ReleaseMemoryOccupation, UpdateWeightsFromDistributed
from waybill.engine.entrypoints.bodies import MAX_FIELDS, BodyReader
from waybill.engine.entrypoints.control import body_model
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.native import AbortRequestInput, DetokenizeInput, TokenizeInput
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.frontend.generate_request import GenerateReqInput
from waybill.engine.frontend.request_observer import NoObserver
from waybill.engine.frontend.work_threads import WorkThreads
from waybill.engine.validation import json_values
from waybill.engine.validation.request_model import RequestModel

MAX_VALUES = 1 << 18
READER = BodyReader(WorkThreads(), MAX_VALUES, NoObserver())
SIZE = 2 << 20
MemoryInput = body_model(ReleaseMemoryOccupation)
UpdateFromDistributedInput = body_model(UpdateWeightsFromDistributed)


def many(item: str, size: int = SIZE) -> str:
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


def many_keys(value: str) -> str:
    return "{" + ",".join(f'"k{i}":{value}' for i in range(SIZE // 12)) + "}"


HOSTILE: list[tuple[type[RequestModel], str]] = [
    *((GenerateReqInput, f'{{"input_ids": {many(item)}}}') for item in ('"a"', "null", "1.5", "[]", '["a"]', "{}")),
    *((GenerateReqInput, f'{{"text": {many(item)}}}') for item in ("1", "[]", "null")),
    *((GenerateReqInput, f'{{"text": "a", "rid": {many(item)}}}') for item in ("1", '""')),
    *((GenerateReqInput, f'{{"text": "a", "sampling_params": {many(item)}}}') for item in ("1", '{"n":0}', "[]")),
    *(
        (GenerateReqInput, f'{{"text": "a", "sampling_params": {{"{name}": {many(item)}}}}}')
        for name, item in (("stop", "1"), ("stop_token_ids", '"a"'), ("stop_token_ids", "1"), ("logit_bias", "1"))
    ),
    (GenerateReqInput, f'{{"text": "a", "sampling_params": {{"logit_bias": {many_keys("1")}}}}}'),
    (GenerateReqInput, f'{{"text": "a", "sampling_params": {many_keys("1")}}}'),
    (GenerateReqInput, many_keys("1")),
    (GenerateReqInput, f'{{"text": "a", "image_data": {many("1")}}}'),
    *(
        (GenerateReqInput, f'{{"text": "a", "{name}": {many(json.dumps("a"))}}}')
        for name in ("return_logprob", "logprob_start_len", "routed_experts_start_len", "return_routed_experts")
    ),
    *((CompletionRequest, f'{{"prompt": {many(item)}}}') for item in ("null", "1.5", "[1.5]", "[]", "{}", '["a"]')),
    (CompletionRequest, f'{{"prompt": ["a", {many("1")[1:]}}}'),
    (CompletionRequest, f'{{"prompt": "a", "stop_token_ids": {many(json.dumps("a"))}}}'),
    *((ChatCompletionRequest, f'{{"messages": {many(item)}}}') for item in ("1", '{"role":1}', "[]")),
    (ChatCompletionRequest, f'{{"messages": [{{"role": "user", "content": {many("1")}}}]}}'),
    (ChatCompletionRequest, f'{{"messages": [{{"role": 1, "x": {many("1")}}}]}}'),
    *((TokenizeInput, f'{{"prompt": {many(item)}}}') for item in ("1", "[]")),
    *((DetokenizeInput, f'{{"tokens": {many(item)}}}') for item in ('"a"', "[]", "1.5")),
    (AbortRequestInput, f'{{"rid": {many("1")}}}'),
    (AbortRequestInput, f'{{"rid": "{"x" * SIZE}"}}'),
    *(
        (UpdateFromDistributedInput, f'{{"names": {names}, "dtypes": {many("1")}, "shapes": {many("[[]]")}}}')
        for names in (many("1"), many("[]"))
    ),
    (MemoryInput, f'{{"tags": {many(json.dumps("x"))}}}'),
]


def refusals() -> list[str]:
    messages = []
    for model, text in HOSTILE:
        with pytest.raises(ValueError, match=r".") as refusal:
            READER.parse(text.encode(), model)
        messages.append(str(refusal.value))
    return messages


def test_hostile_lists_are_refused_by_name_with_a_short_message() -> None:
    for (_, text), message in zip(HOSTILE, refusals(), strict=True):
        assert len(message) < 400
        assert any(name in message for name in ("body", *re.findall(r'"(\w+)":', text[:100]))), message


MEASURE = """
import resource, sys
sys.path[:0] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("bodies_test", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["bodies_test"] = module
spec.loader.exec_module(module)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
module.refusals()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_their_refusal_takes_little_memory() -> None:
    """An error for each item would be a gigabyte a body."""
    script = MEASURE.format(path=sys.path, file=__file__)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert int(ended.stdout) < 200 << 10, "KiB"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a\\",[]{}:é', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a\\",[{', max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


def num_values(value: Any) -> int:
    """As the scan counts: commas and openings, and one."""
    if isinstance(value, dict | list):
        inner = list(value.values()) if isinstance(value, dict) else value
        return 1 + max(0, len(inner) - 1) + sum(num_values(one) - 1 for one in inner) + 1
    return 1


@settings(max_examples=300, deadline=None)
@given(value=JSON_VALUES, chunk=st.sampled_from([1, 2, 3, 7, 1 << 20]), ascii_only=st.booleans())
def test_values_are_counted_as_a_parser_would(value: Any, chunk: int, ascii_only: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "CHUNK_BYTES", chunk)
        text = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert json_values.count_values(text, 1 << 30) == num_values(value)
        if isinstance(value, dict) and value:
            assert json_values.count_fields(text, 1 << 30) == len(value)


def test_too_many_values_are_refused_before_they_are_made() -> None:
    reader = BodyReader(WorkThreads(), 50_000, NoObserver())
    text = '{"messages": [{"role": "user", "content": "%s"}], "chat_template_kwargs": {"x": %s}}'
    assert reader.parse((text % ("a, " * 200_000, "[1]")).encode(), ChatCompletionRequest), "commas of a text are none"
    with pytest.raises(ValueError, match=r"chat_template_kwargs: must have at most 50000 values.*--max-body-values"):
        reader.parse((text % ("a", many("[]"))).encode(), ChatCompletionRequest)


def test_unknown_fields_may_be_null_and_are_counted() -> None:
    assert READER.parse(b'{"text": "a", "colour": null}', GenerateReqInput).text == "a"
    with pytest.raises(ValueError, match="colour: is no field of this request"):
        READER.parse(b'{"text": "a", "colour": 1}', GenerateReqInput)
    for num, words in ((MAX_FIELDS - 1, "k0: is no field"), (MAX_FIELDS + 1, f"at most {MAX_FIELDS} fields")):
        body = json.dumps({f"k{i}": 1 for i in range(num)}).encode()
        with pytest.raises(ValueError, match=words):
            READER.parse(body, GenerateReqInput)


def read_on(name: str) -> str:
    return threading.current_thread().name


class Probe(RequestModel):
    text: Annotated[str, AfterValidator(read_on)]


@pytest.fixture(scope="module")
def client() -> TestClient:
    """One route that tells which thread has read its body, and one whose body may be absent."""
    app = FastAPI()
    install_error_handlers(app)
    router = APIRouter(route_class=READER.route_class())

    @router.post("/probe")
    async def probe(body: Probe) -> Response:
        return Response(f"{body.text}|{threading.current_thread().name}")

    @router.post("/optional")
    async def optional(body: MemoryInput | None = None) -> Response:
        return Response(str(body is None))

    app.include_router(router)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(("size", "lane"), [(10, None), (100_000, "short work"), (3_000_000, "long work")])
def test_large_bodies_are_read_on_a_lane_of_their_own(client: TestClient, size: int, lane: str | None) -> None:
    reader, handler = client.post("/probe", json={"text": "x" * size}).text.split("|")
    assert reader == handler if lane is None else reader.startswith(lane)


@pytest.mark.parametrize("num", [1_200, 400_000])
@pytest.mark.parametrize("text", ['{"text": %s}', "%s", '{"colour": %s}'])
def test_deep_nesting_is_refused(client: TestClient, text: str, num: int) -> None:
    for deep in ("[" * num + "]" * num, '{"a":' * num + "1" + "}" * num):
        reply = client.post("/probe", content=text % deep, headers={"content-type": "application/json"})
        assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b'{"text": "a"}', "text/plain", "sent with Content-Type: application/json"),
        (b'{"text": "a"}', "", "sent with Content-Type: application/json"),
        (b"", "application/json", "must be a JSON object"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'{"text": "a"', "application/json", "body: must be JSON"),
        (b'{"text": "\\ud800"}', "application/json", "must be JSON in UTF-8, without half surrogate pairs"),
        (b'{"text": "\xff\xfe"}', "application/json", "text: must be UTF-8"),
        (b'{"text": NaN}', "application/json", "text: Input should be a valid string"),
        (b'{"text": 1}', "application/json", "text: Input should be a valid string"),
    ],
)
def test_what_is_no_object_of_the_model_is_refused(client: TestClient, content: bytes, kind: str, words: str) -> None:
    reply = client.post("/probe", content=content, headers={"content-type": kind})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text


def test_bodies_may_be_absent_where_they_are_optional(client: TestClient) -> None:
    assert client.post("/optional").text == "True"
    assert client.post("/optional", json={}).text == "False"


def test_the_schema_is_still_told(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/probe"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "text" in schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        (CompletionRequest, '{"prompt": "a", "model": "\\ud800"}', "model: "),
        (GenerateReqInput, '{"text": "a", "rid": "\\ud800"}', "rid: "),
        (GenerateReqInput, '{"text": "a", "sampling_params": {"temperature": NaN}}', "temperature: must lie in 0"),
        (GenerateReqInput, '{"text": "\\ud800"}', "body: must be JSON in UTF-8"),
        (GenerateReqInput, '{"text": "a", "\\ud800": 1}', "is no field of this request"),
        (GenerateReqInput, '{"text": "%s\\ud800"}' % ("x" * 100_000), "body: must be JSON"),
    ],
)
def test_what_only_pythons_decoder_takes_is_refused_by_its_field(
    model: type[RequestModel], text: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        READER.parse(text.encode(), model)
