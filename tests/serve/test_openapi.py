"""The OpenAPI description and the server say the same: schemathesis makes requests from the one and asks the other."""

from __future__ import annotations

import base64

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import radio_fast
from radio_fast.serve.embedder import Embedder
from tests.conftest import golden_source
from tests.serve.live import picture, serving

schemathesis = pytest.importorskip("schemathesis", minversion="4", reason="needs schemathesis")

KEY = {"Authorization": "Bearer secret"}
IMAGES = [picture(1, 20, 30), picture(2, 17, 16, "JPEG")]
schemathesis.openapi.format("binary", st.sampled_from(IMAGES))


@pytest.fixture(scope="module")
def server():
    model = radio_fast.load(golden_source("vit_h16"))
    with Embedder(model, resolution=32, max_wait_ms=0) as embedder, serving(embedder, api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def description(server):
    """With what it can't say: which texts are images, and what this server's model is called and takes."""
    content = httpx.get(f"{server.url}/openapi.json").json()
    body = content["paths"]["/v1/embeddings"]["post"]["requestBody"]
    request = body["content"]["application/json"]["schema"]["properties"]
    texts = {"enum": [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in IMAGES]}
    text, several = request["input"]["anyOf"]
    text |= texts
    several["items"] |= texts
    request["model"]["enum"] = ["tiny"]
    query = {one["name"]: one["schema"] for one in content["paths"]["/embed"]["post"]["parameters"]}
    query["adaptor"]["items"]["enum"] = ["backbone"]
    query["resolution"]["anyOf"][0]["enum"] = ["16", "32x48"]
    query["deadline"]["anyOf"][0] |= {"minimum": 10, "maximum": 30}
    checks = {
        # Nor can it say what does not go together, such as npy and two images: that is a 400.
        "positive_data_acceptance": {"expected-statuses": ["2xx", 400]},
        "negative_data_rejection": {"expected-statuses": [400, 401, 404, 405, 415]},
    }
    schema = schemathesis.openapi.from_dict(content, config=schemathesis.Config.from_dict({"checks": checks}))
    schema.config.update(base_url=server.url)
    return schema


MODES = list(schemathesis.GenerationMode)
OPERATIONS = {
    ("GET", "/health/live"), ("GET", "/health/ready"), ("GET", "/metrics"), ("GET", "/v1/models"),
    ("POST", "/v1/embeddings"), ("POST", "/embed"),
}  # fmt: skip


# Not by its own pytest plugin, which does not work with every pytest.
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    # Nothing is wrong with what takes nothing.
    [(*one, mode) for one in sorted(OPERATIONS) for mode in MODES if one[0] == "POST" or not mode.is_negative],
)
def test_every_operation(description, method, path, mode):
    operation = description[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40 if method == "POST" else 3, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def ask(case):
        statuses.append(case.call_and_validate(headers=KEY).status_code)

    statuses: list[int] = []
    ask()
    assert statuses.count(400 if mode.is_negative else 200) >= len(statuses) / 3  # not other answers alone


def test_what_it_says(server):
    content = httpx.get(f"{server.url}/openapi.json").json()
    found = {(method.upper(), path) for path, operations in content["paths"].items() for method in operations}
    assert found == OPERATIONS
    for path in ("/v1/embeddings", "/embed"):
        operation = content["paths"][path]["post"]
        assert set(operation["responses"]) == {
            "200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504",
        }  # fmt: skip
        assert operation["security"] == [{"HTTPBearer": []}]
    assert "security" not in content["paths"]["/health/live"]["get"]
