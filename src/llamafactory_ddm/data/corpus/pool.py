"""Runs jobs in several processes that end with this one, under one progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, TypeVar

from tqdm.auto import tqdm

J = TypeVar("J")
_POLL = 0.5  # seconds between two updates of the bar
_STOP = -(1 << 60)  # progress that ends the jobs that still run
# What the worker functions share within a process.
_encoder: Any = None
_report: Callable[[int], Any] = lambda n_bytes: None  # noqa: E731


def report_progress(n_bytes: int) -> None:
    """Advance the bar by so many bytes of input."""
    _report(n_bytes)


def run_jobs(
    work: Callable[[J, Any], None], jobs: Iterable[J], encoder: Any, n_processes: int, total: int, title: str
) -> None:
    """Call `work(job, encoder)` for each job, in this process if `n_processes` is 1.

    Args:
        work: a function of a module.
        jobs: may be a generator; only a few are taken ahead.
        encoder: sent once to each process.
        n_processes: number of processes.
        total: bytes of the progress bar.
        title: of the bar.
    Raises:
        ValueError: what a job raised, or that a process was killed.
    """
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        if n_processes == 1:
            _run_here(work, jobs, encoder, bar)
        else:
            _run_in_processes(work, jobs, encoder, n_processes, bar)


def _run_here(work: Callable[[J, Any], None], jobs: Iterable[J], encoder: Any, bar: Any) -> None:
    global _report
    _report = bar.update
    encoder.start()
    try:
        for job in jobs:
            work(job, encoder)
    finally:
        _report = lambda n_bytes: None  # noqa: E731


def _run_in_processes(
    work: Callable[[J, Any], None], jobs: Iterable[J], encoder: Any, n_processes: int, bar: Any
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of pyarrow and fsspec
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(n_processes, context, _start_worker, (encoder, done))
    running: set[Future[None]] = set()
    try:
        for job in jobs:
            while len(running) >= 2 * n_processes:
                running = _wait(running, bar, done)
            running.add(pool.submit(_call, work, job))
        while running:
            running = _wait(running, bar, done)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of prepare-data was killed, perhaps for lack of memory; run the same command again, which goes "
            "on where it stopped, with a lower preprocessing_num_workers"
        ) from error
    finally:
        if running:
            done.value = _STOP
        pool.shutdown(wait=True, cancel_futures=True)


def _wait(running: set[Future[None]], bar: Any, done: Any) -> set[Future[None]]:
    finished, rest = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
    bar.update(max(0, done.value - bar.n))
    for future in finished:
        future.result()
    return rest


def _start_worker(encoder: Any, done: Any) -> None:
    global _encoder, _report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    encoder.start()
    _encoder = encoder

    def report(n_bytes: int) -> None:
        with done.get_lock():
            if done.value <= _STOP:
                raise InterruptedError("another process failed")
            done.value += n_bytes

    _report = report


def _end_with(sentinel: int) -> None:
    """End this process once the first one has, even if that was killed."""
    wait_for_end([sentinel])
    os._exit(1)


def _call(work: Callable[[Any, Any], None], job: Any) -> None:
    work(job, _encoder)
