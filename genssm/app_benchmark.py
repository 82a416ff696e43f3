"""Load on the page: visitors at the same time, what they wait for, what the server keeps."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genssm.benchmark import machine, resident_bytes

# What visitors ask for, in turn: endpoint, arguments, and where the messages of what grows are.
ERRANDS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/write", {"prompt": "The first bridge", "tokens": 150}, 1),
    ("/draw", {"label": "any", "count": 1}, 1),
    ("/speak", {"words": "42"}, 1),
)
LEAVES = 4  # every so many errands a visitor leaves after the first output
START = 120.0  # seconds within which the server must answer
BUSY = ("try again", "queue is full")  # what a visitor is told when there is no room
MiB = 2**20

Report = Callable[[str], None]


@dataclass(frozen=True)
class Errand:
    """One request of one visitor."""

    endpoint: str
    outcome: str  # "finished", "cancelled" (by the visitor), "turned away" or the error
    first: float | None  # seconds to the first output that shows something
    seconds: float


@contextlib.contextmanager
def server(**environment: str) -> Iterator[tuple[str, int, float]]:
    """The page as a process of its own: its address, its process id, seconds until it answered.

    ``environment``: variables that it sees besides those of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "genssm.cli", "app", "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        url = f"http://127.0.0.1:{port}/"
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            if process.poll() is not None or time.perf_counter() - began > START:
                raise OSError("the page did not start; see above")
            time.sleep(0.1)
        yield url, process.pid, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def _held(process: int) -> int | None:
    resident = resident_bytes(process)
    return None if resident is None else resident[0]


def errand(client: Any, turn: int, *, leave: bool = False) -> Errand:
    """One request, watched from its beginning to its end, or until the visitor leaves."""
    endpoint, arguments, growing = ERRANDS[turn % len(ERRANDS)]
    began, first = time.perf_counter(), None
    job = client.submit(**arguments, api_name=endpoint)
    outcome = "finished"
    try:
        for update in job:
            if first is None and len(update[growing]["items"]) > 1:
                first = time.perf_counter() - began
                if leave:
                    job.cancel()
                    outcome = "cancelled"
                    break
        if outcome == "finished" and not job.outputs()[-1][growing]["done"]:
            outcome = "ended early"
    except (CancelledError, StopIteration):
        outcome = "cancelled"
    except Exception as error:  # whatever the server or the connection says is the result
        polite = any(word in str(error).lower() for word in BUSY)
        outcome = "turned away" if polite else f"{type(error).__name__}: {error}"
    return Errand(endpoint, outcome, first, time.perf_counter() - began)


def visit(url: str, number: int, until: float, done: list[Errand]) -> None:
    """One visitor: errand after errand until the time is over."""
    from gradio_client import Client

    client = Client(url, verbose=False)
    turn = number
    while time.monotonic() < until:
        done.append(errand(client, turn, leave=turn % LEAVES == LEAVES - 1))
        turn += 1


def _firsts(done: list[Errand], endpoint: str | None = None) -> list[float]:
    chosen = (e for e in done if endpoint in (None, e.endpoint))
    return [e.first for e in chosen if e.first is not None]


def percentile(values: list[float], share: float) -> float | None:
    """The value below which this share of the values lies; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def benchmark_app(
    visitors: int = 16, seconds: float = 60.0, report: Report = lambda line: None
) -> dict[str, Any]:
    """Start the page, send visitors for so many seconds, and sum up. JSON-able."""
    from gradio_client import Client

    with server() as (url, process, started):
        report(f"the page answers after {started:.1f} s")
        client = Client(url, verbose=False)
        cold = errand(client, 0)
        report(f"the first text: {cold.outcome}, first output after {cold.first or 0:.1f} s")
        for turn in range(1, len(ERRANDS)):
            errand(client, turn)  # loads the other models
        before = _held(process)
        done: list[Errand] = []
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=visit, args=(url, n, until, done)) for n in range(visitors)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        middle = _held(process)
        for thread in threads:
            thread.join()
        after = _held(process)
        last = errand(client, 0)
    return _summed_up(
        {"visitors": visitors, "seconds": seconds, "seconds_to_answer": started,
         "seconds_to_first_output_cold": started + (cold.first or 0.0)},
        done, last, (before, middle, after), report,
    )  # fmt: skip


def measure_cold_start(report: Report = lambda line: None) -> dict[str, Any]:
    """From a new process and an empty cache of compiled code to a whole text. JSON-able.

    Seconds from the start of the process until it answers, until the first token of the first
    text and until its end.
    """
    from gradio_client import Client

    with (
        tempfile.TemporaryDirectory() as empty,
        server(NUMBA_CACHE_DIR=empty) as (url, _, started),
    ):
        began = time.perf_counter()
        first = errand(Client(url, verbose=False), 0)
        came = time.perf_counter() - began - first.seconds  # of the client: what it reads first
        compiled = any(Path(empty).rglob("*.nbc"))
    facts = {
        "seconds_to_answer": started,
        "seconds_to_first_output": None if first.first is None else started + came + first.first,
        "seconds_to_first_text": started + came + first.seconds,
        "outcome": first.outcome,
        "compiled": compiled,
        "machine": machine("cpu"),
    }
    report(
        f"cold start: the page answers after {started:.1f} s, its first text ({first.outcome}) "
        f"begins after {facts['seconds_to_first_output'] or 0:.1f} s and is whole after "
        f"{facts['seconds_to_first_text']:.1f} s"
    )
    return facts


def _summed_up(
    facts: dict[str, Any],
    done: list[Errand],
    last: Errand,
    memory: tuple[int | None, int | None, int | None],
    report: Report,
) -> dict[str, Any]:
    outcomes = Counter(e.outcome for e in done)
    firsts = _firsts(done)
    facts |= {
        "machine": machine("cpu"),
        "errands": len(done),
        "outcomes": dict(outcomes),
        "p95_to_first": percentile(firsts, 0.95),
        "median_to_first": statistics.median(firsts) if firsts else None,
        "endpoints": {
            endpoint: {
                "errands": sum(e.endpoint == endpoint for e in done),
                "p95_to_first": percentile(_firsts(done, endpoint), 0.95),
            }
            for endpoint, _, _ in ERRANDS
        },
        "afterwards": asdict(last),
        "memory_mib": [None if m is None else round(m / MiB, 1) for m in memory],
    }
    report(
        f"{facts['visitors']} visitors, {len(done)} errands: "
        + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    )
    if firsts:
        report(
            f"first output after {facts['median_to_first']:.2f} s (median), "
            f"{facts['p95_to_first']:.2f} s (p95)"
        )
    if None not in memory:
        start, half, end = facts["memory_mib"]
        report(f"memory {start:.0f} MiB before, {half:.0f} halfway, {end:.0f} at the end")
    return facts
