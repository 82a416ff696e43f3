"""The page's endpoints, asked over HTTP as curl asks them."""

import json
import urllib.request
from typing import Any


def call(site: str, endpoint: str, data: list[Any]) -> str:
    """The events that a request is answered with."""
    request = urllib.request.Request(
        f"{site}gradio_api/call/{endpoint}",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{site}gradio_api/call/{endpoint}/{event}") as answer:
        return answer.read().decode()
