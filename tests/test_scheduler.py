"""Requests share a model: in turns, independently, and without leaving anything behind."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from genssm.checkpoint import Checkpoint
from genssm.codec import Codec
from genssm.engine import CompiledGeneration, draw_ahead
from genssm.model import SequenceModel
from genssm.pipeline import Pipeline
from genssm.request import Request
from genssm.scheduler import BusyError, Job, Scheduler
from genssm.session import Sample


@pytest.fixture(scope="module")
def pipe(make_model: Callable[..., SequenceModel], codecs: dict[str, Codec]) -> Pipeline:
    codec = codecs["audio"]
    model = make_model("pooled", vocab_size=codec.vocab_size, n_outputs=codec.n_outputs)
    with torch.no_grad():
        model.head.linear.bias[codec.boundary] = -1e4  # its sounds do not end
    return Pipeline("toy", Checkpoint(model, codec))


@pytest.fixture
def scheduler(pipe: Pipeline) -> Iterator[Scheduler]:
    scheduler = Scheduler(pipe, limit=8)
    yield scheduler
    scheduler.close()


def test_results_do_not_depend_on_the_company(
    scheduler: Scheduler, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    companies: list[int] = []

    def counted(generations: Sequence[CompiledGeneration], threads: int | None) -> None:
        companies.append(len(generations))
        draw_ahead(generations, threads)

    monkeypatch.setattr("genssm.scheduler.draw_ahead", counted)
    settings = [
        {"count": 1 + i % 3, "max_tokens": 30 + 17 * i, "seed": i, "temperature": 0.7 + i / 10}
        for i in range(6)
    ]
    prompts = ["one", "two", np.zeros(9, np.float32), None, "one", np.zeros(20, np.float32)]
    jobs = [scheduler.submit(p, **s) for p, s in zip(prompts, settings, strict=True)]
    for job, prompt, s in zip(jobs, prompts, settings, strict=True):
        expected = pipe.sample(prompt, **s)
        assert [sample.tokens for sample in job.run()] == [sample.tokens for sample in expected]
        assert [s.token_bits for s in job.samples()] == [s.token_bits for s in expected]
    assert scheduler.busy == 0
    assert max(companies) > 1


def test_requests_may_come_from_many_threads(scheduler: Scheduler, pipe: Pipeline):
    drawn: dict[int, list[int]] = {}

    def visit(seed: int) -> None:
        drawn[seed] = scheduler.submit("two", max_tokens=40, seed=seed).run()[0].tokens

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in range(8)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert drawn == {i: pipe.sample("two", max_tokens=40, seed=i)[0].tokens for i in range(8)}


def test_pieces_are_those_of_the_sample(scheduler: Scheduler):
    job = scheduler.submit("one", max_tokens=200, seed=3)
    pieces = [piece for _, piece in job]
    np.testing.assert_array_equal(np.concatenate(pieces), job.samples()[0].raw)


def test_requests_take_turns(scheduler: Scheduler):
    """A short request overtakes the long ones that came before it and have all the workers."""
    longs = [scheduler.submit(max_tokens=10**6, seed=i) for i in range(len(scheduler._workers) + 1)]
    assert len(scheduler.submit(max_tokens=50, seed=20).run()[0].tokens) <= 50
    assert scheduler.busy == len(longs)
    for long in longs:
        long.cancel()
    assert all(long.run()[0].finish == "interrupted" for long in longs)


def test_whoever_leaves_frees_the_place_and_keeps_what_was_drawn(scheduler: Scheduler):
    job = scheduler.submit(max_tokens=10**6, seed=1)
    for _ in job:
        break
    wait_until(lambda: scheduler.busy == 0)
    assert 0 < len(job.samples()[0].tokens) < 10**6


def test_a_full_house_turns_away(scheduler: Scheduler):
    jobs = [scheduler.submit(max_tokens=10**6, seed=i) for i in range(8)]
    with pytest.raises(BusyError, match=r"8 requests are under way.*try again"):
        scheduler.submit(max_tokens=5)
    jobs[3].cancel()
    wait_until(lambda: scheduler.busy == 7)
    assert scheduler.submit(max_tokens=5).run()
    for job in jobs:
        job.cancel()


def test_a_deadline_ends_a_request_with_what_it_has(scheduler: Scheduler):
    started = time.monotonic()
    sample = scheduler.submit(max_tokens=10**7, seed=0, seconds=0.3).run()[0]
    assert time.monotonic() - started < 30
    assert sample.finish == "interrupted"
    assert len(sample.tokens) > 0


def ended(job: Job) -> list[Sample]:
    """What a job ends with, which must not take long."""
    samples: list[Sample] = []
    waiting = threading.Thread(target=lambda: samples.extend(job.run()), daemon=True)
    waiting.start()
    waiting.join(30)
    assert not waiting.is_alive()
    return samples


def test_a_request_that_is_over_may_be_waited_for_again(scheduler: Scheduler):
    job = scheduler.submit(max_tokens=20, seed=3)
    assert ended(job)[0].tokens == ended(job)[0].tokens == job.samples()[0].tokens


def test_closing_ends_what_is_under_way_with_what_it_has(pipe: Pipeline):
    scheduler = Scheduler(pipe)
    jobs = [scheduler.submit(max_tokens=10**6, seed=i) for i in range(3)]
    wait_until(lambda: all(job.samples() and job.samples()[0].tokens for job in jobs))
    scheduler.close()
    for job in jobs:
        (sample,) = ended(job)
        assert sample.finish == "interrupted"
        assert len(sample.tokens) > 0
    assert scheduler.busy == 0
    with pytest.raises(RuntimeError, match="this scheduler is closed"):
        scheduler.submit(max_tokens=3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_long_prompt_takes_a_turn_for_each_piece(
    pipe: Pipeline, guidance: float, monkeypatch: pytest.MonkeyPatch
):
    """So that others have theirs between, and it may end before it is read."""
    monkeypatch.setattr("genssm.engine.PIECE", 8)
    prompt = np.zeros(50, np.float32)
    plan = pipe.plan(prompt, Request(label="one", max_tokens=6, seed=3, guidance=guidance))
    pieces = -(-len(plan.tokens) // 8)
    job = Job(pipe, plan, None, time.monotonic() + 60, 0)
    turns = 0
    while not job.samples():
        assert job._turn()
        turns += 1
    assert turns == (pieces if guidance == 1 else 2 * pieces - 1)
    while job._turn():
        pass
    expected = pipe.sample(prompt, label="one", max_tokens=6, seed=3, guidance=guidance)
    assert [s.tokens for s in job.samples()] == [s.tokens for s in expected]
    late = Job(pipe, plan, None, time.monotonic() + 60, 0)
    assert late._turn()
    late.cancel()
    assert not late._turn()
    assert late.samples() == []


def test_a_failure_is_that_requests_alone(
    scheduler: Scheduler, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    other = scheduler.submit(max_tokens=300, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "beginning", lambda *_: (1 / 0 for _ in [0]))
        broken = scheduler.submit(max_tokens=300, seed=5)
    with pytest.raises(ZeroDivisionError):
        broken.run()
    assert other.run()[0].tokens == pipe.sample(max_tokens=300, seed=4)[0].tokens
    wait_until(lambda: scheduler.busy == 0)


def test_bad_requests_are_refused_before_they_wait(scheduler: Scheduler):
    with pytest.raises(ValueError, match="unknown class"):
        scheduler.submit("seven")
    with pytest.raises(ValueError, match=r"at most 64 samples.*got count=65, rank=1"):
        scheduler.submit(count=65)
    assert scheduler.busy == 0


def test_a_request_can_be_continued_from_its_state(scheduler: Scheduler, pipe: Pipeline):
    job = scheduler.submit("one", max_tokens=20, seed=6)
    first = job.run()[0]
    on = scheduler.submit(state=job.reading(), max_tokens=20, seed=7).run()[0]
    assert on.plan.tokens[1:] == tuple(t for t in first.tokens if t != pipe.codec.boundary)


def test_five_hundred_visits_leave_nothing_behind(scheduler: Scheduler):
    threads, kept = threading.active_count(), weakref.WeakSet[Job]()
    for i in range(500):
        job = scheduler.submit(max_tokens=1 + i % 5, seed=i)
        kept.add(job)
        if i % 3:
            job.run()
        else:
            job.cancel()
        wait_until(lambda: scheduler.busy < 8)
    wait_until(lambda: scheduler.busy == 0)
    del job
    gc.collect()
    assert len(kept) <= 2  # the last of each worker
    assert threading.active_count() == threads


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)
