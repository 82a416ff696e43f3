"""Load on the page, the short form: visitors come, get what they want or a sentence, and leave."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs the extra [app]")

from genssm import app_benchmark
from genssm.app_benchmark import BUSY, Errand, benchmark_app, percentile
from genssm.benchmark import resident_bytes
from genssm.cli import main


@pytest.mark.slow
def test_visitors_finish_or_leave_and_the_page_goes_on() -> None:
    lines: list[str] = []
    facts = benchmark_app(visitors=6, seconds=12, report=lines.append)
    assert set(facts["outcomes"]) <= {"finished", "cancelled", "turned away"}
    assert facts["outcomes"]["finished"] >= 6
    assert facts["errands"] == sum(facts["outcomes"].values())
    assert facts["afterwards"]["outcome"] == "finished"
    assert facts["p95_to_first"] >= facts["median_to_first"] > 0
    before, _, after = facts["memory_mib"]
    assert before is None or after < before + 200
    json.dumps(facts)
    assert any("p95" in line for line in lines)


def test_a_cold_start_begins_with_nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the start itself, which takes half a minute."""
    folders: list[list[Path]] = []

    @contextlib.contextmanager
    def server(**environment: str) -> Iterator[tuple[str, int, float]]:
        folders.append(list(Path(environment["NUMBA_CACHE_DIR"]).iterdir()))
        (Path(environment["NUMBA_CACHE_DIR"]) / "loop.nbc").touch()
        yield "http://127.0.0.1:1/", 1, 6.0

    monkeypatch.setattr(app_benchmark, "server", server)
    monkeypatch.setattr("gradio_client.Client", lambda *_, **__: None)
    monkeypatch.setattr(app_benchmark, "errand", lambda *_: Errand("/write", "finished", 1.0, 2.0))
    lines: list[str] = []
    facts = app_benchmark.measure_cold_start(lines.append)
    assert folders == [[]]
    assert facts["compiled"]
    # Six seconds to answer; the text took no time here, of which its two are taken off again.
    assert facts["seconds_to_first_output"] == pytest.approx(6 - 2 + 1, abs=0.5)
    assert facts["seconds_to_first_text"] == pytest.approx(6 - 2 + 2, abs=0.5)
    assert "cold start" in lines[0]
    json.dumps(facts)


def test_percentiles_are_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 3.0
    assert percentile([], 0.95) is None


def test_the_memory_of_no_process_is_unknown() -> None:
    assert resident_bytes(2**30) is None


def test_what_the_page_says_when_it_is_full_counts_as_polite() -> None:
    from genssm.interface import house

    source = Path(house.__file__).read_text()
    assert BUSY[0] in source
    assert Errand("/write", "turned away", None, 1.0).first is None


def test_the_figures_do_not_replace_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "load.json"
    file.write_text("mine")
    monkeypatch.setattr("sys.argv", ["genssm", "benchmark", "app", "--out", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "exists; use --force" in capsys.readouterr().err
    assert file.read_text() == "mine"
