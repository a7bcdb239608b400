"""Everything that a GPU has to show, in one command: correct results, speed, memory.

    python benchmarks/gpu.py --minutes 10                   all parts on the first GPU
    python benchmarks/gpu.py --parts gradients,speed-1b     some of them
    python benchmarks/gpu.py --device cpu --toy             all parts at toy sizes, whose figures mean nothing

Models have random weights; nothing is downloaded. Each part runs in a process of its own with its own time limit. A
crash, too little memory, a missing package or the end of the time is a row of the table, and the next part runs. The
files `gpu.json`, `gpu.md` and `gpu.log` of `--output` are written after each part.

Claims that the table checks: results equal the CPU's in float32; a step of `stage: ddm` is as fast, compared with one
of `stage: pt`, as the operations of both say, within 5 %; 45 % of the peak FLOP/s at 1B in bfloat16; a peak memory of
at most 0.85 of the step of `stage: pt`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Part
from gpu_parts.report import Report, Row, last_line, read_rows, table

ROOT = Path(__file__).resolve().parents[1]
FULL_MINUTES = 10  # in which the time limits of the parts are given
RESERVE = 3.0  # seconds to write the results at the end
SHORTEST = 0.15  # of its time limit: a part is left out if less is left
LOG_CHARACTERS = 20_000  # of each part
WRITE_EVERY = 5.0  # seconds
N_AHEAD = 2  # processes that import while a part runs
WHOLE = "the part"


class Worker:
    """The process of a part: it imports what it needs, and begins to measure when it is told to."""

    def __init__(self, part: Part, arguments: argparse.Namespace, folder: Path) -> None:
        self.part, self._is_over = part, False
        self.rows_file, self.log_file = folder / f"{part.name}.rows", folder / f"{part.name}.log"
        words = [sys.executable, __file__, "--child", part.name, "--rows", str(self.rows_file)]
        words += ["--device", arguments.device, *(["--toy"] if arguments.toy else [])]
        if arguments.peak_tflops is not None:
            words += ["--peak-tflops", str(arguments.peak_tflops)]
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment(arguments), process_group=0
            )

    def run(self, seconds: float, on_rows: Callable[[list[Row]], None]) -> list[Row]:
        """Measure for at most so many seconds; return what was measured, and the failure if there is one.

        `on_rows` gets what was measured so far every few seconds.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        end, code = time.monotonic() + seconds, None
        try:
            while code is None and (left := end - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(timeout=min(left, WRITE_EVERY))
                on_rows(read_rows(self.rows_file))
        finally:
            self.end()
        rows = read_rows(self.rows_file)
        if code is None:
            rows.append(self._failure(f"stopped after its time limit of {seconds:.0f} s"))
        elif code != 0 and not any(row.state == "failed" and row.what == WHOLE for row in rows):
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            rows.append(self._failure(f"{how}: {last_line(self.log())}"))
        return rows

    def _failure(self, why: str) -> Row:
        return Row(self.part.name, WHOLE, state="failed", note=why)

    def log(self) -> str:
        """Return the end of what the process has printed."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]

    def end(self) -> None:
        """Kill the process and all that it has started."""
        if self._is_over:
            return
        self._is_over = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a part: offline, one GPU or none, this repository's package if none is installed."""
    result = dict(os.environ)
    result |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # The versions are in the results; what does not work with them is a row of its own.
    result |= {"DISABLE_VERSION_CHECK": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    result.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    if arguments.device == "cpu":
        result["CUDA_VISIBLE_DEVICES"] = ""
    else:
        result.setdefault("CUDA_VISIBLE_DEVICES", "0")
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [result.get("PYTHONPATH"), str(ROOT / "src")]))
    return result


@dataclass
class Results:
    """The rows so far, and their files."""

    output: Path
    arguments: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, unfinished: Sequence[Row] = (), worker: Worker | None = None) -> None:
        """Rewrite all files, with the log of `worker` at the end of the log; each is complete at any time."""
        rows = [*self.rows, *unfinished]
        whole = {"arguments": self.arguments, "seconds": self.seconds, "rows": [row.to_json() for row in rows]}
        for name, text in (("gpu.json", json.dumps(whole, indent=1) + "\n"), ("gpu.md", table(rows))):
            scratch = self.output / f".{name}"
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(self.output / name)
        if worker is not None:
            with open(self.output / "gpu.log", "a", encoding="utf-8") as log:
                log.write(f"==== {worker.part.name}\n{worker.log()}\n")


def measure(parts: list[Part], arguments: argparse.Namespace, end: float) -> Results:
    """Run the parts one after another until the monotonic time `end`; return all rows."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.log").write_text("", encoding="utf-8")
    said = {"device": arguments.device, "toy": arguments.toy, "minutes": arguments.minutes}
    results = Results(arguments.output, said)
    ready: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as name:
        try:
            for number, part in enumerate(parts):
                limit, left = part.seconds * arguments.minutes / FULL_MINUTES, end - time.monotonic()
                if left < SHORTEST * limit:
                    why = f"{max(left, 0):.0f} s of {arguments.minutes:g} minutes were left"
                    results.rows.append(Row(part.name, WHOLE, state="left out", note=why))
                    results.write()
                    continue
                for each in parts[number : number + 1 + N_AHEAD]:
                    if each.name not in ready:
                        ready[each.name] = Worker(each, arguments, Path(name))
                start = time.monotonic()
                rows = ready[part.name].run(min(limit, left), results.write)
                results.seconds[part.name] = round(time.monotonic() - start, 1)
                results.rows += rows
                results.write(worker=ready[part.name])
                print(f"{part.name}: {results.seconds[part.name]} s", flush=True)
                for line in table(rows).splitlines()[2:]:
                    print(line, flush=True)
        finally:
            for worker in ready.values():
                worker.end()
    return results


def run_part(part: Part, arguments: argparse.Namespace) -> int:
    """Run a part in this process, when the parent says so; return the exit code."""
    for name in ("torch", "transformers", *part.imports):
        with contextlib.suppress(Exception):  # the part itself reports what it needs and cannot import
            importlib.import_module(name)
    if not os.read(0, 100):  # not by sys.stdin, whose lock a fork would copy
        return 1
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = Report(arguments.rows, part.name)
    try:
        from gpu_parts.machine import Machine

        machine = Machine(arguments.device, arguments.toy, arguments.peak_tflops)
        run = getattr(importlib.import_module(f"gpu_parts.{part.module}"), part.name.replace("-", "_"))
        run(machine, report)
    except Exception as error:  # noqa: BLE001 - any failure is a row
        traceback.print_exc()
        report.fail(WHOLE, error)
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter's teardown can hang, and everything is written


def _end_with_parent() -> None:
    if not os.read(0, 1):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> int:
    """Run the benchmark; return 1 if a claim does not hold or a part failed."""
    start = time.monotonic()
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="for all parts together (default: 10)")
    parser.add_argument("--parts", default=",".join(names), help=f"of {', '.join(names)}; separated by commas")
    parser.add_argument("--output", type=Path, default=Path("saves/gpu"), help="folder (default: saves/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="small models, whose figures mean nothing")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak; known for A100, H100 SXM and H200")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {part.name: part for part in PARTS}
    if arguments.child:
        return run_part(by_name[arguments.child], arguments)
    chosen = arguments.parts.split(",")
    for name in chosen:
        if name not in by_name:
            parser.error(f"--parts: {name!r} is none of {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end = start + 60 * arguments.minutes - RESERVE
    results = measure([part for part in PARTS if part.name in chosen], arguments, end)
    bad = [row for row in results.rows if not row.is_good]
    n_claims = sum(row.held is not None for row in results.rows)
    print(f"{n_claims} claims checked, {len(bad)} rows failed or did not hold: {arguments.output / 'gpu.md'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
