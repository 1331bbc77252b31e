"""Whatever arrives from outside: bytes on the pipe, files, settings, command lines.

Nothing of it may crash, hang, or be understood wrongly. In CI the same examples each time;
`FT_FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py --timeout=0` draws that many others, which are
100,000 messages.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import string
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_launcher
from conftest import ROOT, Started, Watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ft_launcher
import ft_monitor
from ft_monitor import (
    MAX_MESSAGE_BYTES,
    Clocks,
    ConfigError,
    FaultToleranceConfig,
    Inbox,
    Outcome,
    Report,
    State,
)

BY_HAND = int(os.environ.get("FT_FUZZ_EXAMPLES", "0"))
QUICK = 150  # examples in CI, of what takes less than a millisecond each
in_process = test_launcher.in_process


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each file of garbage costs a line."""
    caplog.set_level(logging.CRITICAL, "ft_monitor")


def fuzz(examples: int = QUICK) -> Any:
    """`examples` in CI. By hand, as many as asked for, less where each takes longer."""
    return settings(
        max_examples=max(examples, BY_HAND * examples // QUICK),
        deadline=None,
        derandomize=not BY_HAND,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


# ---------------------------------------------------------------------------------- what is drawn

ORDINARY = string.ascii_letters + string.digits + ' \n\t\0[]{}:,"\\=.-_%$`é\u0663\U0001f525'
texts = st.text(st.sampled_from(ORDINARY + "\ud800"), max_size=12)
integers = st.integers() | st.sampled_from([0, 1, -1, 2**63, 10**400])
scalars = st.none() | st.booleans() | integers | st.floats() | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
sections = st.sampled_from(["setup", "checkpointing", "a]b", "", "x" * 300])
clocks = st.sampled_from(
    [
        *(ft_monitor.STARTUP, ft_monitor.INITIAL, ft_monitor.HEARTBEAT, ft_monitor.OUT_OF_SECTION),
        *(ft_monitor.EXIT, "rank_section_timeouts", *map(ft_monitor.section_clock, ["setup", ""])),
    ]
)
seconds = st.floats(min_value=1e-9, allow_infinity=False, allow_nan=False)
optional_texts = st.none() | texts
FIELDS: dict[str, dict[str, Any]] = {  # of each message; `complete` may not create files here
    "init": {"calculate": st.booleans(), "state_file": optional_texts, "pid": st.integers()},
    "heartbeat": {"step": st.none() | integers},
    "section": {"name": sections, "open": st.booleans()},
    "learned": {"longest": st.dictionaries(clocks, seconds, max_size=3)},
    "saved": {"step": integers, "checkpoint": optional_texts},
    "request": {
        "action": st.sampled_from([x.name for x in ft_monitor.WorkloadAction]),
        "reason": texts,
    },
    "complete": {"flag": st.none(), "values": st.dictionaries(texts, json_values, max_size=2)},
    "error": {"error": texts},
    "shutdown": {},
    "bye": {"error": optional_texts},
}
messages = st.one_of(
    *(
        st.builds(
            functools.partial(ft_monitor.encode_message, kind), time=st.floats(900, 4000), **fields
        )
        for kind, fields in FIELDS.items()
    )
)


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """An original that was cut, or in which something was replaced, doubled or inserted."""
    data = draw(originals)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 30)))
        swaps = [b"", b"\0", b"\xff", b'"', b"}", b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}"]
        new = draw(st.sampled_from([*swaps, data[start:end] * 2]) | st.binary(max_size=8))
        data = data[:start] + new + data[end:]
    return data


huge = st.builds(lambda piece, times: piece * times, st.binary(max_size=40), st.integers(90, 3000))
noise = st.one_of(st.binary(max_size=60), mutated(messages), messages, huge, st.just(b"[" * 4000))


def inside_json(originals: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """As text: the values themselves, arbitrary ones, and mutations of both."""
    encoded = (originals | json_values).map(lambda value: json.dumps(value).encode())
    return st.one_of(encoded, mutated(encoded), st.binary(max_size=60))


@st.composite
def objects(
    draw: st.DrawFn, fields: dict[str, st.SearchStrategy[Any]], needed: Collection[str] = ()
) -> dict[str, Any]:
    """These fields with values of their kinds; some are missing, or one is of another kind."""
    optional = {name: kind for name, kind in fields.items() if name not in needed}
    required = {name: fields[name] for name in needed}
    values: dict[str, Any] = draw(st.fixed_dictionaries(required, optional=optional))
    if draw(st.booleans()):
        values[draw(st.sampled_from([*fields, "other"]))] = draw(json_values)
    return values


# -------------------------------------------------------------------------------------------- pipe


@contextlib.contextmanager
def new_inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    os.close(inbox.read_end)
    os.close(inbox.write_end)


@fuzz()
@given(st.lists(noise, max_size=6), st.integers(1, 5000))
def test_after_any_bytes_on_the_pipe_the_next_message_is_understood(
    pieces: list[bytes], size: int
) -> None:
    data = b"".join(pieces)
    heartbeat = ft_monitor.encode_message("heartbeat", step=7)
    with new_inbox() as inbox:
        heard = []
        for start in range(0, len(data), size):
            heard += inbox.feed(data[start : start + size])
            assert len(inbox._rest) <= MAX_MESSAGE_BYTES
        heard += inbox.feed(b"\n")
        assert len(heard) + inbox.skipped == data.count(b"\n") + 1
        assert [message["step"] for message in inbox.feed(heartbeat)] == [7]


@fuzz()
@given(messages)
def test_what_a_client_sends_is_understood(line: bytes) -> None:
    assert line.endswith(b"\n") and len(line) <= MAX_MESSAGE_BYTES
    assert ft_monitor.decode_message(line[:-1]) is not None


@fuzz()
@given(
    st.lists(messages | mutated(messages), max_size=30),
    st.lists(st.floats(0, 100), min_size=30, max_size=30),
    st.sampled_from([{}, {"rank_heartbeat_timeout": 5}, {"exit_timeout": None}, {"min_timeout": 9}])
    | st.builds(lambda x: {"rank_section_timeouts": {"setup": x}, "safety_factor": 1.5}, seconds),
    st.none() | st.dictionaries(clocks, seconds, max_size=3),
)
def test_after_any_messages_every_clock_has_a_limit_above_zero_and_none_ran_out_at_once(
    lines: list[bytes], steps: list[float], values: dict[str, Any], earlier: dict[str, float] | None
) -> None:
    now = 1000.0
    watched = Clocks(FaultToleranceConfig.from_mapping(values), now, earlier)
    for line, step in zip(lines, steps, strict=False):
        message = ft_monitor.decode_message(line.rstrip(b"\n"))
        now += step
        if message is None:
            continue
        message["time"] = min(message["time"], now)  # this process's clock runs on
        watched.hear(message, now)
        clock, deadline = watched.first()
        assert not clock or watched.running[clock] <= now
        assert all(watched.limit(name) > 0 for name in [*watched.running, *watched.laps])
        assert all(limit >= 0 for limit in watched.limits().values())
        if clock and watched.running[clock] == now:
            assert deadline > now or watched.limit(clock) < 1e-9


def test_a_rank_that_writes_garbage_to_its_pipe_is_not_killed(
    watch: Callable[..., Watched],
) -> None:
    """Garbage and mutated heartbeats, with right ones in between; at the end it still is heard."""
    number = max(2000, 10 * BY_HAND)
    body = f"""
import json, random
draw = random.Random(1)
connect()
pipe = client._pipe
for step in range({number}):
    line = bytearray(ft_monitor.encode_message("heartbeat", step=step))
    for _ in range(draw.randrange(6)):
        line[draw.randrange(len(line))] = draw.randrange(256)
    try:
        os.write(pipe, bytes(line) + draw.randbytes(draw.randrange(40)) + b"\\n" * draw.randrange(2))
    except BlockingIOError:
        time.sleep(0.05)
    if step % 100 == 0:
        client.send_heartbeat(step)
        time.sleep(0.01)
os.write(pipe, b"\\n")
for _ in range(50):  # some may not find room
    beat(-7, seconds=0.01)
"""
    watched = watch(body, rank_heartbeat_timeout=20, exit_timeout=20)
    assert watched.started.wait(60 + number / 1000) == 0, watched.output
    assert watched.report.step == -7 and watched.report.end == ft_monitor.End.BY_ITSELF
    assert watched.output.count("skipping what is no message") == 1


# --------------------------------------------------------------------------------- reports, state

times = st.floats(1.7e9, 1.8e9)
reports = objects(
    {
        "rank": st.integers(0, 3),
        "attempt": st.integers(0, 3),
        "host": st.just(os.uname().nodename),
        "launcher_pid": st.integers(1, 9),
        "monitor_pid": st.integers(1, 9),
        "pid": st.integers(1, 9),
        **dict.fromkeys(["started", "connected", "first_heartbeat", "heartbeat", "ended"], times),
        **dict.fromkeys(["error_time", "clock_since", "clock_limit", "waited"], times),
        **dict.fromkeys(["first_step", "step", "saved"], st.none() | st.integers(0, 99)),
        "clock": clocks,
        "longest": st.dictionaries(clocks, seconds, max_size=2),
        "request": st.just({"action": "ShutdownWorkload", "reason": "why"}),
        "error": texts,
        "end": st.sampled_from([end.value for end in ft_monitor.End]),
        "reason": texts,
        "state": st.sampled_from("RSDTZ"),
        "stacks": st.booleans(),
        "status": st.integers(-64, 255),
        "oom_kills": st.integers(0, 2),
    },
    needed=["rank"],
)
states = objects(
    {
        "longest": st.dictionaries(clocks, seconds, max_size=3),
        "killed": st.dictionaries(clocks, st.tuples(integers, seconds), max_size=3),
        "run": texts,
    }
)
INCIDENT: dict[str, st.SearchStrategy[Any]] = {
    "attempt": st.integers(0, 9),
    "start": times,
    "end": times,
    "outcome": st.sampled_from([outcome.value for outcome in Outcome]),
    **dict.fromkeys(["first_heartbeat", "last_heartbeat"], times),
    **dict.fromkeys(["first_step", "last_step", "saved_step"], st.none() | st.integers(0, 99)),
    "connected": st.booleans(),
    "requests": st.just([]),
    "suspect": st.none() | st.integers(0, 3),
    "why": texts,
    "error": optional_texts,
    "places": texts,
}
incidents = objects(INCIDENT, INCIDENT)

stacks = st.sampled_from(
    [
        b'\n=== 1.0 x\nThread 0x1 (most recent call first):\n  File "a.py", line 3 in f\n',
        b'\n=== 99999999999.0 x\nThread 0x1:\n  File "\xff", line 99999999999 in \n',
    ]
)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@fuzz()
@given(inside_json(reports))
def test_what_is_no_report_is_an_error_of_two_kinds(tmp_path: Path, data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        report = Report.read(write(tmp_path / "rank0.json", data))
        assert isinstance(report.rank, int) and isinstance(report.end, ft_monitor.End)


@fuzz()
@given(inside_json(states), inside_json(states))
def test_what_is_no_state_is_an_error_of_two_kinds_and_every_state_can_be_added_to(
    tmp_path: Path, data: bytes, other: bytes
) -> None:
    path = tmp_path / "ft_state.json"
    with contextlib.suppress(OSError, ValueError):
        state = State.read(write(path, data))
        after = state.after([Report(0, longest=State.read(write(path, other)).longest)], "run")
        ft_monitor.write_file(path, json.dumps(ft_monitor.dataclasses.asdict(after)))
        assert State.read(path).killed == after.killed
        assert all(0 <= x < math.inf for x in after.longest.values())


def look(flag: str, directory: Path) -> tuple[int, str]:
    """What --ft-status or --ft-report answers: exit code and output."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = ft_monitor.show([flag, str(directory)])
    return code, out.getvalue() + errors.getvalue()


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[], Path]:
    """A new run directory for each example."""
    count = 0

    def make() -> Path:
        nonlocal count
        count += 1
        run = tmp_path / str(count) / "run"
        run.mkdir(parents=True)
        return run

    return make


@fuzz(75)
@given(
    st.lists(inside_json(reports), max_size=3),
    st.lists(inside_json(incidents), max_size=3),
    st.lists(mutated(stacks) | stacks, max_size=3),
    st.sampled_from(["attempt_0", "attempt_1", "missing", ".", "incidents.jsonl", None]),
)
def test_a_run_directory_of_garbage_is_shown_or_refused(
    new_run: Callable[[], Path],
    ranks: list[bytes],
    lines: list[bytes],
    dumps: list[bytes],
    link: str | None,
) -> None:
    run = new_run()
    for number, data in enumerate(ranks):
        write(run / "attempt_0" / f"rank{number}.json", data)
    for number, data in enumerate(dumps):
        write(run / "attempt_0" / f"rank{number}.stacks.txt", data)
    write(run / "incidents.jsonl", b"\n".join(lines))
    if link is not None:
        (run / "latest").symlink_to(link)
    for flag in ("--ft-status", "--ft-report"):
        for place in (run, run.parent):
            assert look(flag, place)[0] in (0, 2)


@fuzz(75)
@given(st.lists(inside_json(reports), max_size=3), st.lists(mutated(stacks) | stacks, max_size=3))
def test_a_launcher_explains_an_attempt_whatever_its_evidence_is(
    new_run: Callable[[], Path], ranks: list[bytes], dumps: list[bytes]
) -> None:
    run = new_run()
    for number, data in enumerate(ranks):
        write(run / f"rank{number}.json", data)
    for number, data in enumerate(dumps):
        write(run / f"rank{number}.stacks.txt", data)
    found = ft_monitor.read_reports(run)
    for report in found:
        report.place, report.waits = ft_monitor.read_place(run, report)
    incident = ft_monitor.make_incident(0, 1.75e9, Outcome.FAILED, found, 2)
    assert ft_monitor.explain(incident, str(run), "restarting")
    assert ft_launcher.RestartPolicy(3).why_not(incident) != ""
    json.dumps(ft_monitor.dataclasses.asdict(incident))


# ------------------------------------------------------------------------------------------ settings

timeouts = st.none() | seconds | st.integers(1, 9999) | st.sampled_from(["none", "60", "1e3"])
config_values = objects(
    {
        **dict.fromkeys(["startup_timeout", "initial_rank_heartbeat_timeout"], timeouts),
        **dict.fromkeys(["rank_heartbeat_timeout", "rank_out_of_section_timeout"], timeouts),
        **dict.fromkeys(["exit_timeout", "unknown_timeout", "workers_stop_timeout"], timeouts),
        "rank_section_timeouts": st.dictionaries(texts, timeouts, max_size=3)
        | st.sampled_from(["setup:600,step:60", "a:b:1", ":1", "a:1,a:1"]),
        "safety_factor": st.floats(1.1, 9),
        "min_timeout": seconds,
        "rank_termination_signal": st.sampled_from(["SIGKILL", "term", 15, "9"]),
        "log_level": st.sampled_from(["info", 10, "DEBUG"]),
    }
)


def check_usable(config: FaultToleranceConfig) -> None:
    """It survives the way to a monitor, and its limits are above zero."""
    assert FaultToleranceConfig.from_mapping(json.loads(config.to_json())) == config
    assert all(limit > 0 for limit in config.limits().values())
    assert Clocks(config, 0.0).first()[1] > 0
    assert isinstance(config.is_watching(), bool)


@fuzz()
@given(config_values | json_values | st.dictionaries(texts, json_values))
def test_settings_are_usable_or_a_config_error(values: Any) -> None:
    with contextlib.suppress(ConfigError):
        check_usable(FaultToleranceConfig.from_mapping(values))


YAML = b"fault_tolerance:\n  rank_heartbeat_timeout: 60\n  rank_section_timeouts:\n    setup: 6\n"


@fuzz()
@given(inside_json(config_values) | mutated(st.just(YAML)))
def test_a_file_of_settings_is_usable_or_a_config_error(tmp_path: Path, data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        path = write(tmp_path / "settings", data)
        check_usable(FaultToleranceConfig.load(str(path)))


@fuzz()
@given(json_values | texts | timeouts | st.binary(max_size=5))
def test_each_kind_of_setting_is_parsed_or_a_config_error(value: Any) -> None:
    for field in ft_monitor.dataclasses.fields(FaultToleranceConfig):
        with contextlib.suppress(ConfigError):
            field.metadata["parse"](value)
    for parse in (ft_monitor.parse_longest, ft_monitor.parse_number):
        with contextlib.suppress(ConfigError):
            parse(value)


# -------------------------------------------------------------------------------------- command line

OPTIONS = sorted(
    {*ft_launcher.get_args_parser()._option_string_actions} - {"-h", "--help", "--version"}
)
argument = st.text(st.sampled_from(string.ascii_letters + "0123456789:=,.-_/ é\udcff"), max_size=6)
PLAUSIBLE = """1 2 1:2 0 -1 none c10d static localhost:0 setup:60 train.py SIGTERM gpu cpu auto 3
0:1 a=b {} settings.json spawn nan"""
plausible = st.sampled_from(PLAUSIBLE.split())
words = st.one_of(
    st.sampled_from(OPTIONS),
    st.builds("{}={}".format, st.sampled_from(OPTIONS), argument | plausible),
    plausible,
    argument,
    st.builds(
        str.__add__,
        st.sampled_from(["--ft-", "--ft_param-", "--", "--ft-nvrx-", "-"]),
        argument,
    ),
)


@fuzz(75)
@given(st.lists(words, max_size=6))
def test_a_command_line_is_right_or_wrong_usage(in_process: Path, argv: list[str]) -> None:
    before = dict(os.environ)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            ft_launcher.parse_arguments([*argv, "train.py"])
        except SystemExit as stopped:
            assert stopped.code == 2
        finally:
            os.environ.clear()
            os.environ.update(before)


# ------------------------------------------------------------------------------------- autoresume.sh

FILES = ("progress", "stop", "gave_up", "runs", "job")
lines = st.one_of(
    st.binary(max_size=60),
    mutated(st.just(b'{"step": 12, "checkpoint": "/a b/last.ckpt", "time": "x", "by": "y"}\n')),
    mutated(st.just(b'{"time":"x","job":"5","run":3,"step":"7","failures":1,"result":"running"}')),
    st.just(b'{"reason": "$(touch crashed) `touch crashed`", "step": $(touch crashed)}'),
    st.just(b'{"run": a[$(touch crashed)], "job": "5", "failures": a[$(touch crashed)]}'),
    st.just(b"{" * 100_000),
)


@fuzz(6)
@given(st.dictionaries(st.sampled_from(FILES), lines, min_size=2), st.booleans())
def test_autoresume_does_not_take_garbage_for_the_end_of_training(
    start: Callable[..., Started],
    new_run: Callable[[], Path],
    contents: dict[str, bytes],
    in_slurm: bool,
) -> None:
    """A command that fails is run until the limit; without a flag, training is not complete."""
    directory = new_run()
    for name, data in contents.items():
        write(directory / f"ft_finished.flag.{name}", data)
    slurm = {"SLURM_JOB_ID": "5"} if in_slurm else {}
    options = ["--max-failures=2", "--slurm=requeue" if in_slurm else "--slurm=loop"]
    started = start([ROOT / "autoresume.sh", *options, "false"], cwd=directory, **slurm)
    code = started.wait(30)
    assert code in (1, 93), started.output
    assert "training is complete" not in started.output
    assert not (directory / "crashed").exists(), started.output
    unusual = [line for line in started.output.splitlines() if not line.startswith("[autoresume]")]
    assert unusual == [], started.output


@pytest.mark.parametrize("text", ["08", "1 2", "mode[$(touch crashed)]", "nonsense"])
def test_what_is_no_number_in_the_notes_of_a_chain_is_0(
    start: Callable[..., Started], tmp_path: Path, text: str
) -> None:
    note = f"x job 5 run {text} step - failures {text} next -: run {text} starts\n"
    (tmp_path / "ft_finished.flag.runs").write_text(note)
    options = ["--slurm=requeue", "--max-failures=1"]
    started = start([ROOT / "autoresume.sh", *options, "false"], SLURM_JOB_ID="5")
    assert started.wait(30) == 1
    assert "run 1 ended with exit code 1" in started.output, started.output
    assert not (tmp_path / "crashed").exists()
