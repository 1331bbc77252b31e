"""The rank monitor: configuration, messages, the client, then monitors with fake ranks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from conftest import PYTHON, ROOT, Started, Watched, freeze, is_running, state_of, wait_until

import ft_monitor
from ft_monitor import (
    MAX_MESSAGE_BYTES,
    ConfigError,
    End,
    FaultToleranceConfig,
    Inbox,
    RankMonitorClient,
    RankMonitorClientError,
    Report,
    encode_message,
    to_text,
)

LATE = 4.0  # seconds by which a busy host may delay a kill; 5 ms are usual
IN_THE_RANK = 'File "rank.py", line'
Message = dict[str, Any]
Start = Callable[..., Started]
Watch = Callable[..., Watched]


# ------------------------------------------------------------------------------- configuration

FIELDS = [field.name for field in dataclasses.fields(FaultToleranceConfig)]
NUMBERS = ["safety_factor", "min_timeout", "workers_stop_timeout"]
TIMEOUTS = [name for name in FIELDS if name.endswith("_timeout") and name not in NUMBERS]
NO_TIMES: list[Any] = [0, -1, nan, -inf, True, False, "soon", "-1", "inf", "", [1], {}, 10**400]
NO_SECTIONS: list[Any] = [5, None, "step", ":5", "a:5,b", ["a"], {"a": 0}, {"a": True}]


@pytest.mark.parametrize(
    "name, values",
    [
        *[(name, NO_TIMES) for name in TIMEOUTS],
        *[(name, [*NO_TIMES, None, inf, "none"]) for name in NUMBERS],
        ("safety_factor", [1]),
        ("rank_section_timeouts", NO_SECTIONS),
        ("rank_termination_signal", ["SIGNOTHING", "", None, True, 0, 1000, []]),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}: got .*, expected "):
            FaultToleranceConfig(**{name: value})


@pytest.mark.parametrize(
    "names, values, meaning",
    [
        (TIMEOUTS, [None], None),
        (TIMEOUTS, ["none", " Null ", inf], inf),
        ([*TIMEOUTS, *NUMBERS], ["2.5", 2.5], 2.5),
        (["rank_section_timeouts"], ["a:6, b:none,c:d:1.5"], {"a": 6, "b": inf, "c:d": 1.5}),
        (["rank_section_timeouts"], [{"a": "6", "b": None}], {"a": 6, "b": inf}),
        (["rank_termination_signal"], ["term", "SIGTERM"], "SIGTERM"),
    ],
)
def test_a_setting_is_understood_as_people_write_it(
    names: list[str], values: list[Any], meaning: Any
) -> None:
    for name, value in itertools.product(names, values):
        assert getattr(FaultToleranceConfig(**{name: value}), name) == meaning


def test_a_configuration_goes_through_json_unchanged_and_cannot_be_changed() -> None:
    values = {"startup_timeout": None, "rank_section_timeouts": {"a": None, "b": 5}}
    config = FaultToleranceConfig.from_mapping(values)
    assert (config.startup_timeout, config.rank_section_timeouts["a"]) == (inf, inf)
    assert FaultToleranceConfig.from_mapping(json.loads(config.to_json())) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.startup_timeout = 1  # type: ignore[misc]
    values["rank_section_timeouts"]["b"] = 6  # type: ignore[index]
    assert config.rank_section_timeouts["b"] == 5


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "No such file"),
        (b"\xff\xfe\x00x", "can't decode"),
        (b'{"startup_timeout": ', "Expecting value"),
        (b"[" * 100_000, "recursion"),
        *[(content, "expected an object") for content in (b"[1]", b"5", b'"x"')],
        (b"a: 1\nnull", "expected JSON"),
        (b'{"fault_tolerance": {"startuptime": 5}}', "did you mean 'startup_timeout'"),
        (b'{"heartbeat_timeout": 5}', "did you mean 'rank_heartbeat_timeout'"),
        (b'{"startup_timeout": 0}', "startup_timeout: got 0"),
    ],
)
def test_settings_that_cannot_be_used_are_named_with_their_place_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path}.*{problem}"):
        FaultToleranceConfig.load(str(path))
    monkeypatch.setenv("FT_CONFIG", "{")
    with pytest.raises(ConfigError, match="environment variable FT_CONFIG: "):
        FaultToleranceConfig.load()


NVIDIAS_YAML = """
---
# as in its documentation
fault_tolerance:
  workload_check_interval: 5
  rank_heartbeat_timeout: 180   # seconds
  exit_timeout: null
  rank_section_timeouts:
    setup: 600
    "step": 90
  rank_termination_signal: SIGUSR1
other:
  exit_timeout: 1
"""


def test_settings_in_yaml_are_answered_with_a_command_that_turns_them_into_json(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nvidia.yaml"
    path.write_text(NVIDIAS_YAML)
    with pytest.raises(ConfigError) as error:
        FaultToleranceConfig.load(str(path))
    command = str(error.value).split("expected JSON; ")[1].removesuffix(" turns YAML into it")
    bin_dir = os.path.dirname(sys.executable)
    path = tmp_path / "settings.json"
    path.write_text(
        subprocess.check_output(
            command, shell=True, text=True, env={"PATH": f"{bin_dir}:{os.environ['PATH']}"}
        )
    )
    config = FaultToleranceConfig.load(str(path))
    assert config.rank_section_timeouts == {"setup": 600, "step": 90}


# Of NVIDIA's launcher 0.5 and its newest source.
NVIDIAS = """
attribution_host attribution_loganalysis check_remaining_processes checkpoint_iteration_file
cycle_info_dir enable_dist_storage_healthcheck enable_gpu_healthcheck enable_nic_healthcheck
enable_nic_monitor gpu_memory_poll_interval gpu_memory_reclaim_timeout gpu_memory_tolerance_mb
ignore_missing_cfg install_exception_handler link_down_path_template link_state_path_template
log_aggregator_count log_leaf_count log_level log_server_port max_no_progress_cycles
min_progress_iterations no_restart_on_failure node_health_check_endpoint node_health_check_interval
num_warmup_iters numa_binding_strict nvrx_logfile pci_topo_file per_cycle_applog_prefix rdzv_impl
restart_check_interval restart_policy segment skip_section_response storage_healthcheck_path
use_infra_group_rank workload_check_interval
"""


def test_what_resembles_a_setting_is_a_mistake_and_what_is_nvidias_does_not() -> None:
    config = FaultToleranceConfig.from_mapping(dict.fromkeys(NVIDIAS.split(), 1))
    assert config == FaultToleranceConfig()
    mistakes = "heartbeat_timeout timeout section_timeouts min_timout safety_facktor"
    for name in mistakes.split():
        with pytest.raises(ConfigError, match=f"unknown setting '{name}'; did you mean"):
            FaultToleranceConfig.from_mapping({name: 1})


def test_flags_beat_the_file_which_beats_the_environment_which_beats_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def startup_timeout(*flags: str) -> float | None:
        return ft_monitor.parse_arguments([*flags, "--", "true"])[1].startup_timeout

    monkeypatch.delenv("FT_CONFIG", raising=False)
    assert startup_timeout() is None
    monkeypatch.setenv("FT_CONFIG", '{"startup_timeout": 1}')
    assert startup_timeout() == startup_timeout("--ft-exit-timeout=9") == 1
    path = tmp_path / "config.json"
    for text in ('{"startup_timeout": 2}', '{"x": 1, "fault_tolerance": {"startup_timeout": 2}}'):
        path.write_text(text)
        assert startup_timeout(f"--ft-cfg-path={path}") == 2
    assert startup_timeout(f"--ft-cfg-path={path}", "--ft-startup-timeout=3") == 3
    assert startup_timeout(f"--ft-cfg-path={path}", "--ft-startup-timeout=none") == inf


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_flag(name: str) -> None:
    value: Any = {"rank_section_timeouts": "a:5", "rank_termination_signal": "INT"}.get(name, "5.5")
    flag = f"--ft-{name.replace('_', '-')}"
    config = ft_monitor.parse_arguments([flag, value, "--", "true"])[1]
    assert config == FaultToleranceConfig(**{name: value}) != FaultToleranceConfig()


# ------------------------------------------------------------------------------------ messages

MESSAGES: dict[str, Message] = {
    "init": {"calculate": True, "state_file": "/a/b", "pid": 7},
    "heartbeat": {"step": 8},
    "section": {"name": "save", "open": True},
    "learned": {"longest": {"rank_heartbeat_timeout": 12.5}},
    "saved": {"step": 8, "checkpoint": None},
    "request": {"action": "ShutdownWorkload", "reason": "enough"},
    "complete": {"flag": "/a/flag", "values": {"step": 8}},
    "error": {"error": "ValueError: x"},
    "shutdown": {},
    "bye": {"error": None},
}


def without_time(messages: list[Message]) -> list[Message]:
    return [{name: x for name, x in message.items() if name != "time"} for message in messages]


def line(kind: str, **changed: Any) -> bytes:
    return to_text({"type": kind, "time": 1.0, **MESSAGES.get(kind, {}), **changed})[:-1].encode()


GOOD = line("saved") + b"\n"


def test_every_message_is_understood_as_it_was_sent_wherever_it_is_cut() -> None:
    sent = b"".join(encode_message(kind, **fields) for kind, fields in MESSAGES.items())
    whole, inbox = Inbox().feed(sent), Inbox()
    assert without_time(whole) == [{"type": kind, **fields} for kind, fields in MESSAGES.items()]
    for cut in range(len(sent)):
        assert inbox.feed(sent[:cut]) + inbox.feed(sent[cut:]) == whole
    assert inbox.skipped == 0


ODD: list[Any] = [None, "x", -1, [], nan, 10**400]
NOISE = [
    *[b"", b"\0", b"text", b"\xff\xfe", b"{", b"null", b"5", b"NaN", b'"init"', b"[]", b"{}"],
    *[b"[" * 4000, b'{"a":' * 800, b"9" * 4000, b" " * 5000, b"x" * 70_000, GOOD[:-1] * 2],
    *[GOOD[:-1].ljust(MAX_MESSAGE_BYTES), line("unknown")],
    *[line("saved", type=kind) for kind in [*ODD, {}, "init"]],
    *[line(kind, **{name: [[]]}) for kind in MESSAGES for name in MESSAGES[kind]],
    *[line("saved", time=value) for value in [*ODD, inf]],
    *[line("learned", longest={"a": value}) for value in ODD],
]


@pytest.mark.parametrize("noise", NOISE, ids=lambda noise: repr(noise[:60]))
def test_what_is_no_message_is_skipped_and_counted_and_the_next_is_understood(noise: bytes) -> None:
    inbox = Inbox()
    longest = GOOD[:-1].ljust(MAX_MESSAGE_BYTES - 1) + b"\n"
    messages = inbox.feed(noise + b"\n" + GOOD + longest)
    assert [message["step"] for message in messages] == [8, 8] and inbox.skipped == 1


def test_a_line_that_never_ends_takes_no_memory_and_is_counted_once() -> None:
    inbox = Inbox()
    assert not any(inbox.feed(b"x" * 65536) for _ in range(100))
    assert len(inbox._rest) <= MAX_MESSAGE_BYTES
    assert len(inbox.feed(b"\n" + GOOD)) == inbox.skipped == 1


def random_line(generator: random.Random) -> bytes:
    """Noise, a damaged message, half of one, or a right one with values that make no sense."""
    kind, choice = generator.choice(list(MESSAGES)), generator.randrange(4)
    message = bytearray(line(kind))
    if choice == 0:
        message = bytearray(generator.randbytes(generator.randrange(200)))
    elif choice == 1:
        message[generator.randrange(len(message))] = generator.randrange(256)
    elif choice == 2:
        del message[generator.randrange(len(message)) :]
    else:
        hour = generator.choice([-3600, 3600])
        odd = {"time": generator.choice([1e-300, 1e308, time.monotonic() + hour])}
        odd |= {"step": -(10**300)} if kind == "heartbeat" else {}
        message = bytearray(line(kind, **odd))
    return bytes(message) + b"\n" * generator.randrange(2)


def test_no_message_ends_the_monitor_or_lets_a_healthy_rank_seem_hung() -> None:
    config = FaultToleranceConfig(rank_heartbeat_timeout=60)
    monitor = ft_monitor.RankMonitor(config, ft_monitor.Log("test"))
    generator = random.Random(0)
    for _ in range(1000):
        noise = b"".join(random_line(generator) for _ in range(20))
        os.write(monitor.inbox.write_end, noise + b"\n" + encode_message("heartbeat", step=8))
        now = time.monotonic()
        monitor.hear(now)
        assert monitor.clocks.first()[1] > now + 50
        assert monitor.report.step == 8 and to_text(dataclasses.asdict(monitor.report))
    assert monitor.inbox.skipped > 5000


@pytest.mark.parametrize("character", ["x", "漢", "😀", "\0", '"', "\n", "\ud800"])
def test_long_text_is_cut_so_that_the_message_fits(character: str) -> None:
    for kind, name in (("section", "name"), ("request", "reason"), ("bye", "error")):
        message = encode_message(kind, **{**MESSAGES[kind], name: character * 10_000})
        assert len(message) <= MAX_MESSAGE_BYTES and message.count(b"\n") == 1
        [understood] = without_time(Inbox().feed(message))
        text = character * max(100, len(understood[name]))
        assert understood == {"type": kind, **MESSAGES[kind], name: text}


def test_of_values_that_are_too_long_for_a_message_the_flag_remains() -> None:
    flag, values = "/x" * 500, {"a": "x" * 4000, "b": Path()}
    [message] = Inbox().feed(encode_message("complete", flag=flag, values=values))
    assert (message["flag"], message["values"]) == (flag, {})


# -------------------------------------------------------------------------- the rank's end


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    """A monitor's end of the pipe, in this process."""
    inbox = Inbox()
    for name in ("FT_RUN_DIR", "FT_CONFIG", "FT_STACKS_FD", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FT_MONITOR_PID", str(os.getpid()))
    monkeypatch.setenv("FT_MONITOR_FD", str(inbox.write_end))
    monkeypatch.setattr(RankMonitorClient, "_announce_the_end", lambda client: None)
    yield inbox
    os.close(inbox.read_end)
    os.close(inbox.write_end)


@pytest.fixture
def client(inbox: Inbox) -> RankMonitorClient:
    client = RankMonitorClient()
    client.init_workload_monitoring()
    return client


def test_the_client_sends_what_the_table_of_messages_tells(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ft_monitor.FLAG_VARIABLE, "flag")
    monkeypatch.chdir(tmp_path)
    client = RankMonitorClient()
    client.shutdown_workload_monitoring()  # without a connection, nothing
    client.load_state_dict({"longest": {"a": 2}})
    action = ft_monitor.WorkloadAction.ExcludeThisNode
    for _ in range(2):
        client.init_workload_monitoring(calculate_timeouts=True, state_file="missing.json")
        client.send_heartbeat(7)
        client.send_heartbeat()
        client.start_section("a")
        client.end_all_sections()
        client.report_saved(7)
        client.training_complete(step=7)
        client.calculate_and_set_hb_timeouts(calc_initial=False)
        client.report_error(ValueError("x"))
        client.send_workload_control_request(ft_monitor.WorkloadControlRequest(action, "hot"))
        client.shutdown_workload_monitoring()
        assert without_time(inbox.read()) == [
            {
                "type": "init",
                "calculate": True,
                "state_file": f"{tmp_path}/missing.json",
                "pid": os.getpid(),
            },
            {"type": "learned", "longest": {"a": 2}},
            {"type": "heartbeat", "step": 7},
            {"type": "heartbeat", "step": None},
            {"type": "section", "name": "a", "open": True},
            {"type": "section", "name": "a", "open": False},
            {"type": "saved", "step": 7, "checkpoint": None},
            {"type": "complete", "flag": f"{tmp_path}/flag", "values": {"step": 7}},
            {"type": "learned", "longest": {}},
            {"type": "error", "error": "ValueError: x"},
            {"type": "request", "action": "ExcludeThisNode", "reason": "hot"},
            {"type": "shutdown"},
        ]


def test_the_client_refuses_what_cannot_work_and_says_what_to_do(client: RankMonitorClient) -> None:
    early = RankMonitorClient()
    client.start_section("a")
    for action, error in (
        (early.send_heartbeat, r"call init_workload_monitoring\(\) first"),
        (early.calculate_and_set_hb_timeouts, r"call init_workload_monitoring\(\) first"),
        (client.init_workload_monitoring, "connected already"),
        (lambda: client.end_section("b"), "'b' is not open: call start_section"),
        (lambda: client.start_section("a"), "'a' is open: call end_section"),
    ):
        with pytest.raises(RankMonitorClientError, match=error):
            action()
    assert client.open_sections == {"a"}


@pytest.mark.parametrize("pid, fd", [("self", "x"), ("self", "9999"), ("999999999", "3"), ("", "")])
def test_without_a_monitor_the_client_says_why(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, pid: str, fd: str
) -> None:
    monkeypatch.setenv("FT_MONITOR_PID", pid)
    monkeypatch.setenv("FT_MONITOR_FD", fd)
    with pytest.raises(RankMonitorClientError, match=f"no rank monitor at /proc/{pid}/fd/{fd}, "):
        RankMonitorClient().init_workload_monitoring()
    monkeypatch.delenv("FT_MONITOR_FD")
    with pytest.raises(
        RankMonitorClientError, match=r"not started by ft_launcher; run python ft_l"
    ):
        RankMonitorClient().init_workload_monitoring()


def test_a_copy_of_a_client_is_a_new_one(client: RankMonitorClient) -> None:
    for again in (copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
        assert isinstance(again, RankMonitorClient) and not again.is_initialized


def test_while_the_pipe_is_full_heartbeats_are_dropped_and_all_else_is_kept_in_order(
    client: RankMonitorClient, inbox: Inbox
) -> None:
    for step in range(2000):
        client.send_heartbeat(step)
        client.report_saved(step)
    client.shutdown_workload_monitoring()
    messages: list[Message] = []
    while more := inbox.read():
        messages += more
        client._flush()
    kinds = [message["type"] for message in messages]
    assert kinds.count("heartbeat") < 2000 and (kinds[0], kinds[-1]) == ("init", "shutdown")
    assert [message["step"] for message in messages if message["type"] == "saved"] == [*range(2000)]


def test_a_client_whose_pipe_was_closed_loses_one_heartbeat(
    client: RankMonitorClient, inbox: Inbox
) -> None:
    os.close(client._pipe)
    client.report_saved(1)
    os.close(client._pipe)
    client.send_heartbeat(2)
    client.send_heartbeat(3)
    assert [message.get("step") for message in inbox.read()] == [None, 1, 3]


# ------------------------------------------------------------------------- a rank that hangs

HEARTBEAT, OUTSIDE = "rank_heartbeat_timeout", "rank_out_of_section_timeout"


@pytest.mark.parametrize(
    "clock, hang, others",
    [
        (HEARTBEAT, "connect(); beat(8); hang()", {}),
        (HEARTBEAT, "connect(); beat(8)\nwhile True: pass", {}),
        (HEARTBEAT, "connect(); beat(8); deadlock()", {}),
        (HEARTBEAT, "connect(); beat(8); stop()", {}),
        ("startup_timeout", "hang()", {}),
        ("initial_rank_heartbeat_timeout", "connect(); hang()", {HEARTBEAT: 0.1}),
        ("rank_section_timeouts[a]", "connect(); enter('a'); hang()", {}),
        (OUTSIDE, "connect(); enter('a'); leave('a'); hang()", {}),
        ("exit_timeout", "connect(); linger()", {HEARTBEAT: 0.1}),
        ("exit_timeout", "connect(); client.shutdown_workload_monitoring(); linger(); 1 / 0", {}),
    ],
)
def test_a_rank_that_hangs_is_killed_when_its_time_is_over_and_not_before(
    watch: Watch, clock: str, hang: str, others: dict[str, Any]
) -> None:
    limit = {"rank_section_timeouts": {"a": 1}} if "[" in clock else {clock: 1}
    watched = watch(f"tell('silent', time.time()); {hang}", **others, **limit)
    assert watched.ends() == -signal.SIGKILL
    report = watched.report
    assert (report.end, report.hung_on, report.status) == (End.HUNG, clock, -signal.SIGKILL)
    assert report.step == (8 if clock == HEARTBEAT else None)
    assert 1 <= report.waited < 1 + LATE and watched.seconds_since("silent") < 1.5 + LATE
    assert clock == "startup_timeout" or watched.seconds_since("silent") >= 1
    assert f"{report.reason}; sent SIGKILL" in watched.log[-1]
    assert report.state == ("T" if "stop" in hang else "R" if "pass" in hang else "S")
    assert report.stacks is (None if clock == "startup_timeout" else True)
    if report.stacks:
        assert ("threading.py" if "linger" in hang else IN_THE_RANK) in watched.stacks
        header = rf"^{ft_monitor.STACKS_HEADER} (\d+\.\d+) \(.*\) {re.escape(report.reason)}$"
        [at] = re.findall(header, watched.stacks, re.MULTILINE)
        assert 0 <= report.ended - float(at) < LATE


def test_a_rank_that_shows_signs_of_life_is_not_ended(watch: Watch) -> None:
    body = "connect()\nfor n in range(20): beat(n); enter('a'); time.sleep(0.1); leave('a')"
    limits = {HEARTBEAT: 1.5, OUTSIDE: 1.5, "rank_section_timeouts": {"a": 1.5}}
    watched = watch(body, **limits, exit_timeout=20)
    assert (watched.ends(), watched.report.end, watched.log) == (0, End.BY_ITSELF, [])


def test_at_half_of_its_time_a_rank_is_warned_of_and_its_stacks_are_taken(watch: Watch) -> None:
    watched = watch("connect(); beat(8); told('warned')", rank_heartbeat_timeout=4)
    watched.started.wait_for_output(
        " s at step 8 (limit 4 s, --ft-rank-heartbeat-timeout); its stacks are kept"
    )
    watched.tell("warned")
    assert watched.ends() == 0
    assert IN_THE_RANK in watched.stacks and len(watched.log) == 1


def test_a_stopped_process_writes_its_stacks_before_it_goes_on(start: Start) -> None:
    """Any of its threads could handle a signal to the process, while the main one goes on."""
    code = f"""
import faulthandler, os, signal, sys, threading, time
faulthandler.register({int(ft_monitor.STACKS_SIGNAL)}, sys.stdout)
def wait():
    while True:
        time.sleep(0.0005)
for _ in range(20):
    threading.Thread(target=wait, daemon=True).start()
while True:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.02)
"""
    process = start([sys.executable, "-c", code])
    for _ in range(10):
        wait_until(lambda: state_of(process.pid) == "T")
        before = process.output.count(" in <module>")
        ft_monitor.send_to_main_thread(process.pid, ft_monitor.STACKS_SIGNAL)
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda before=before: process.output.count(" in <module>") > before)  # type: ignore[misc]
    assert process.output.count("line 10 in <module>") == 10


@pytest.mark.parametrize("hang", ["hang()", "stop()"])
def test_a_hung_rank_may_end_by_another_termination_signal(watch: Watch, hang: str) -> None:
    body = f"on(signal.SIGTERM, lambda: os._exit(9)); {hang}"
    watched = watch(body, startup_timeout=1, rank_termination_signal="TERM")
    assert (watched.ends(), watched.report.hung_on) == (9, "startup_timeout")


def test_what_a_hung_rank_does_while_it_is_killed_is_not_learned(watch: Watch) -> None:
    """Else a stopped rank that is continued for its stacks would widen its limit each time."""
    body = """
on(15, lambda: (tell("got", time.time()), leave("a"), beat(9)))
connect(calculate_timeouts=True); enter("a"); saved(8); hang()
"""
    hurry = {"TERMINATION_SECONDS": 0.5, "UNKNOWN_SECONDS": 0.5}  # 5 s and 1,800 s
    watched = watch(body, hurry, rank_termination_signal="SIGTERM")
    assert watched.ends() == -signal.SIGKILL
    assert 0.4 < watched.seconds_since("got") < 0.5 + LATE
    assert (watched.report.step, watched.report.saved) == (None, 8)
    assert watched.report.longest.keys() == {"startup_timeout", "initial_rank_heartbeat_timeout"}


@pytest.mark.parametrize(
    "files, kills",
    [
        ({"/proc/vmstat": "nr_free_pages 9\noom_kill 3"}, 3),
        (
            {"/proc/self/cgroup": "4:x:/\n0::/a\n", "/sys/fs/cgroup/a/memory.events": "oom_kill 1"},
            1,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/proc/vmstat": "oom_kill 3"}, 3),
        ({}, 0),
    ],
)
def test_kills_for_want_of_memory_are_those_of_the_control_group_if_it_counts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], kills: int
) -> None:
    def opened(path: str, mode: str) -> Any:
        (tmp_path / "file").write_text(files[path]) if path in files else None
        return open(tmp_path / "file" if path in files else tmp_path / "missing", mode)

    monkeypatch.setattr(ft_monitor, "open", opened, raising=False)
    assert ft_monitor.oom_kills() == kills


def test_what_is_killed_whoever_it_is_is_not_asked_for_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To read that may wait for ever for a process that hangs in the kernel."""

    def read(path: str) -> bytes:
        raise AssertionError(path)

    monkeypatch.setattr(ft_monitor, "read_kernel", read)
    with subprocess.Popen([*PYTHON, "-c", "import time; time.sleep(60)"]) as child:
        found = [child.pid]
        monkeypatch.setattr(ft_monitor, "descendants", lambda pid: [found.pop()] if found else [])
        assert ft_monitor.kill_descendants() == []
        assert child.wait() == -signal.SIGKILL


# -------------------------------------------------------------------------- a rank that ends

ALLOW_CORE_DUMPS = ("sh", "-c", 'ulimit -c "$(ulimit -H -c)"; exec "$@"', "sh")


@pytest.mark.parametrize("name", ["KILL", "SEGV", "TERM", "ABRT", "INT", "RTMIN"])
def test_the_monitor_ends_by_its_ranks_signal_without_a_core_dump(watch: Watch, name: str) -> None:
    body = f"signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), signal.SIG{name})"
    watched = watch(body, wrapper=ALLOW_CORE_DUMPS)
    assert watched.ends() == watched.report.status == -getattr(signal, f"SIG{name}")
    assert watched.report.end == End.BY_ITSELF and list(watched.directory.glob("*core*")) == []
    assert ("Segmentation fault" in watched.output) == (name == "SEGV")  # the rank's stack


AS_PARENT = (*PYTHON, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
ENDS = {
    End.BY_ITSELF: "crash()",
    End.HUNG: "connect(); beat(); hang()",
    End.STOPPED: "on(15, lambda: tell('stopped', time.time())); tell('ready'); hang()",
    End.PEER_FAILED: "on(6, print); connect(); tell('ready', time.time()); hang()",
    End.LAUNCHER_DIED: "tell('ready'); hang()",
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_of_a_rank_outlives_it_in_whatever_session(watch: Watch, end: End) -> None:
    body = f"helper('same'); helper('own', daemon=True); {ENDS[end]}"
    grace = {"FT_SHUTDOWN_TIMEOUT": "0.5"}
    watched = watch(body, wrapper=AS_PARENT, environment=grace, rank_heartbeat_timeout=0.3)
    pids = [int(watched.told("same")), int(watched.told("own")), watched.rank, watched.monitor]
    if end in (End.STOPPED, End.PEER_FAILED):
        watched.send(signal.SIGTERM if end == End.STOPPED else signal.SIGABRT)
    elif end == End.LAUNCHER_DIED:
        watched.told("ready")
        watched.started.process.kill()
    watched.ends()
    wait_until(lambda: not any(map(is_running, pids)), 10)
    report, launcher = watched.report, watched.started.pid
    assert (report.end, report.launcher_pid) == (end, launcher)
    if end == End.STOPPED:
        assert report.reason == "stopped by SIGTERM"
        assert 0.4 <= watched.seconds_since("stopped") < 0.5 + LATE
    elif end == End.PEER_FAILED:
        assert report.reason == "its peer failed" and report.stacks
        assert watched.seconds_since("ready") < LATE and IN_THE_RANK in watched.stacks
    elif end == End.LAUNCHER_DIED:
        assert report.reason == f"the launcher (pid {launcher}) is gone"


def test_orphans_that_have_ended_are_reaped_at_once(watch: Watch) -> None:
    body = """
for _ in range(20):
    if os.fork() == 0:
        os.fork() or time.sleep(0.1)
        os._exit(0)
    os.wait()
tell("ready")
told("end")
"""
    watched = watch(body)
    watched.told("ready")
    children = Path(f"/proc/{watched.monitor}/task/{watched.monitor}/children")
    wait_until(lambda: children.read_text().split() == [str(watched.rank)], 10, "one child")
    watched.tell("end")
    assert watched.ends() == 0


COMPLETE = "connect(); client.training_complete(step=8); client.shutdown_workload_monitoring()\n"
SCRIPT_ENDS = {  # after training is complete: the status, whether the script is over, and the flag
    "pass": (0, True, True),
    "sys.exit(0)": (0, True, True),
    "os._exit(0)": (0, False, True),
    "connect(); client.report_error(ValueError()); client.training_complete()": (0, True, True),
    "connect()": (0, True, False),
    "sys.exit(3)": (3, True, False),
    "raise ValueError('bad')": (1, True, False),
    "os.kill(os.getpid(), signal.SIGKILL)": (-9, False, False),
    "os.fork() == 0 and sys.exit(0); os.wait(); os.kill(os.getpid(), 9)": (-9, False, False),
    "bye(); connect(); client.training_complete(); os.kill(os.getpid(), 9)": (-9, False, False),
    "linger()": (-9, True, True),
    "linger(); raise ValueError('bad')": (-9, True, False),
}


@pytest.mark.parametrize("end", SCRIPT_ENDS)
def test_the_flag_is_created_if_the_script_ends_well(
    watch: Watch, tmp_path: Path, end: str
) -> None:
    flag = tmp_path / "flag.json"
    watched = watch(
        COMPLETE + end, environment={ft_monitor.FLAG_VARIABLE: flag.name}, exit_timeout=0.5
    )
    assert (watched.ends(), watched.report.over, flag.exists()) == SCRIPT_ENDS[end], watched.output
    if end == "pass":
        assert json.loads(flag.read_text()) == {"step": 8}
    if "bad" in end:
        assert watched.report.error == "ValueError: bad (rank.py:2 in <module>)"


def test_a_flag_that_cannot_be_created_is_said(watch: Watch) -> None:
    watched = watch(COMPLETE, environment={ft_monitor.FLAG_VARIABLE: "rank.py/flag"})
    assert watched.ends() == 0
    assert "cannot write" in watched.log[0] and "rank.py/flag" in watched.log[0]


def test_a_client_touches_no_handler_and_a_forked_child_says_no_bye(watch: Watch) -> None:
    body = """
def hooks():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return sys.exit, threading.excepthook, handlers
before = hooks()
connect()
assert hooks() == before
show = sys.excepthook
ft_monitor.RankMonitorClient().init_workload_monitoring()
assert sys.excepthook is show  # one, however many clients
if os.fork() == 0:
    raise ValueError("in the child")
os.wait()
beat(3)
told("end")
"""
    watched = watch(body, exit_timeout=20)
    watched.wait_for("step", 3)
    report = watched.report
    watched.tell("end")
    assert watched.ends() == 0 and "in the child" in watched.output
    assert (report.error, report.over) == (None, False) and "no heartbeat" in report.waiting


# ---------------------------------------------------------------------- a rank that is stopped


@pytest.mark.parametrize("number", ft_monitor.STOP_SIGNALS)
def test_a_stop_signal_goes_to_the_rank_alone(watch: Watch, number: signal.Signals) -> None:
    passed_on = 2 if number == signal.SIGINT else 15
    seconds = 2.2 if number == signal.SIGTERM else 0  # no clock runs in the grace
    body = f"""
on({passed_on}, lambda: (time.sleep({seconds}), saved(8), os._exit(5)))
helper(); connect(); beat(); tell("ready"); stop(); hang()
"""
    watched = watch(body, rank_heartbeat_timeout=2)
    watched.told("ready")
    wait_until(lambda: state_of(watched.rank) == "T", 10, "SIGSTOP")
    watched.send(number)
    assert watched.ends() == 5
    assert (watched.report.reason, watched.report.saved) == (f"stopped by {number.name}", 8)
    assert not (watched.directory / "helper_got_a_signal").exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP, signal.SIGABRT])
@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_cuts_the_grace_of_a_stop_short(watch: Watch, second: int, at_once: bool) -> None:
    body = """
stops = []
for number in (*ft_monitor.STOP_SIGNALS, 6): on(number, lambda: (stops.append(1), tell("stop")))
on(10, lambda: tell("fence")); on(12, lambda: os._exit(len(stops))); tell("ready"); hang()
"""
    watched = watch(body)
    watched.told("ready")
    if at_once:
        freeze(watched.monitor)
    for number in (second, signal.SIGTERM) if at_once else (signal.SIGTERM, second):
        watched.send(number)
    watched.send(signal.SIGCONT)
    watched.told("stop")
    watched.send(signal.SIGUSR1)
    watched.told("fence")  # now the monitor has taken in the second one, too
    watched.send(signal.SIGUSR2)
    assert watched.ends() == 1


def test_user_signals_are_passed_on_and_end_nothing_and_nohup_is_respected(watch: Watch) -> None:
    body = """
tell("ignored", signal.getsignal(1) is signal.SIG_IGN); tell("ready"); told("go")
on(10, lambda: tell("one")); on(12, lambda: os._exit(5)); tell("armed"); hang()
"""
    watched = watch(body, wrapper=("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    watched.send(signal.SIGUSR1)  # a rank that does not know it is not killed
    watched.send(signal.SIGHUP)
    watched.tell("go")
    watched.told("armed")
    watched.send(signal.SIGUSR1)
    watched.told("one")
    watched.send(signal.SIGUSR2)
    assert (watched.ends(), watched.told("ignored")) == (5, "True")
    assert watched.report.end == End.BY_ITSELF


@pytest.mark.parametrize("patience, saved", [(20, 8), (0.4, None)])
def test_a_survivor_may_finish_saving_a_checkpoint_in_bounded_time(
    watch: Watch, patience: float, saved: int | None
) -> None:
    body = """
connect(); enter("checkpointing"); tell("ready"); told("save")
saved(8); leave("checkpointing"); hang()
"""
    watched = watch(body, workers_stop_timeout=patience)
    watched.wait_for("sections", ["checkpointing"])
    watched.send(signal.SIGABRT)
    if saved:
        watched.wait_for("end", End.PEER_FAILED)
        watched.tell("save")
    before = time.monotonic()
    assert watched.ends() == -signal.SIGKILL
    assert time.monotonic() - before < 0.4 + LATE and watched.report.saved == saved


def test_a_signal_to_all_processes_leaves_the_monitor_until_the_end(
    watch: Watch,
) -> None:
    body = """
on(15, lambda: (on(15, print), time.sleep(0.2), beat(9), saved(9), os._exit(5)))
helper(); connect(); tell("ready"); hang()
"""
    watched = watch(body)
    watched.told("ready")
    for pid in (watched.monitor, int(watched.told("helper")), watched.rank):
        os.kill(pid, signal.SIGTERM)
    assert watched.ends() == watched.report.status == 5
    assert (watched.report.saved, watched.report.step) == (9, 9)


# ---------------------------------------------------------- monitors that are killed or frozen

FROM_A_THREAD = """
import os, subprocess, sys, threading, time
def start():
    started.append(subprocess.Popen(sys.argv[1:]))
    while not os.path.exists("ready"): time.sleep(0.01)
started, thread = [], threading.Thread(target=start)
thread.start(); thread.join()
started[0].send_signal(10)
sys.exit(started[0].wait())
"""


def test_the_end_of_the_thread_that_started_the_monitor_ends_nothing(watch: Watch) -> None:
    body = "on(signal.SIGUSR1, lambda: tell('fence')); tell('ready'); told('end'); sys.exit(5)"
    watched = watch(body, wrapper=(*PYTHON, "-c", FROM_A_THREAD))
    watched.told("fence")
    watched.tell("end")
    assert watched.ends() == 5


def test_a_launcher_that_was_gone_before_it_is_watched_is_missed(
    watch: Watch,
) -> None:
    gone = os.getppid()  # is not the parent of what we start
    watched = watch("hang()", environment={"FT_LAUNCHER_PID": str(gone)})
    assert watched.ends() == -signal.SIGKILL
    assert watched.report.reason == f"the launcher (pid {gone}) is gone"


def test_when_the_monitor_is_killed_the_rank_is_too(watch: Watch) -> None:
    watched = watch("connect(); tell('ready'); hang()")
    rank = watched.rank
    watched.send(signal.SIGKILL)
    wait_until(lambda: not is_running(rank), 10, "the end of the rank")


def test_a_frozen_monitor_blocks_no_rank_and_loses_only_heartbeats(
    watch: Watch,
) -> None:
    body = """
connect(); enter("save"); tell("ready"); told("frozen")
for step in range(4000): client.send_heartbeat(step); saved(step)  # more than a pipe holds
leave("save"); tell("sent"); told("awake")
for step in range(4000, 4040): beat(step, seconds=0.05)
"""
    watched = watch(body, rank_section_timeouts={"save": 5})
    watched.told("ready")
    freeze(watched.monitor)
    watched.tell("frozen")
    watched.told("sent")
    watched.send(signal.SIGCONT)
    watched.tell("awake")
    assert watched.ends() == 0
    report = watched.report
    assert (report.saved, report.sections, report.step) == (3999, [], 4039)


def test_a_rank_that_was_suspended_with_its_monitor_was_not_hung(watch: Watch) -> None:
    body = "connect(calculate_timeouts=True); beat(8); saved(8); told('end'); beat()"
    watched = watch(body, {"SUSPENDED_SECONDS": 0.5}, rank_heartbeat_timeout=2)
    watched.wait_for("saved", 8)
    rank, monitor = watched.rank, watched.monitor
    freeze(monitor)
    freeze(rank)
    end = time.monotonic() + 2.6  # the clock has run out
    wait_until(lambda: time.monotonic() > end)
    os.kill(rank, signal.SIGCONT)
    os.kill(monitor, signal.SIGCONT)
    watched.tell("end")
    assert (watched.ends(), watched.report.end) == (0, End.BY_ITSELF)
    assert "s late: suspended" in watched.output and watched.report.longest[HEARTBEAT] < 2


def test_a_rank_that_has_ended_before_its_monitor_looks_again_was_not_hung(watch: Watch) -> None:
    body = "connect(); beat(8); saved(8); told('end'); os._exit(0)"
    watched = watch(body, rank_heartbeat_timeout=2)
    watched.wait_for("saved", 8)
    freeze(watched.monitor)
    watched.tell("end")
    end = time.monotonic() + 2.2
    wait_until(lambda: time.monotonic() > end and state_of(watched.rank) == "Z")
    os.kill(watched.monitor, signal.SIGCONT)
    assert (watched.ends(), watched.report.end) == (0, End.BY_ITSELF)


FULL_STDERR = """
import os, subprocess, sys
reader, writer = os.pipe()
os.write(writer, bytes(65536))
sys.exit(subprocess.call(sys.argv[1:], stderr=writer, pass_fds=[reader]))
"""


def test_a_reader_of_the_log_that_has_stopped_saves_no_hung_rank(watch: Watch) -> None:
    """Such as a pager, or a file system that hangs: what the rank itself may wait for."""
    wrapper = (*PYTHON, "-c", FULL_STDERR)
    watched = watch("connect(); hang()", wrapper=wrapper, initial_rank_heartbeat_timeout=2)
    watched.ends()
    assert 2 <= watched.report.waited < 2.5 + LATE


def test_the_first_process_of_a_container_ends_with_a_code(
    watch: Watch,
) -> None:
    wrapper = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted")
    watched = watch("helper('own', daemon=True); os.kill(os.getpid(), 9)", wrapper=wrapper)
    assert watched.ends() == 128 + signal.SIGKILL


# -------------------------------------------------------------------------------- the pipe


def test_what_is_no_message_is_logged_once_and_the_monitor_does_its_work(watch: Watch) -> None:
    body = """
connect()
for _ in range(50): os.write(client._pipe, os.urandom(1000) + b"\\n"); time.sleep(0.01)
beat(2); hang()
"""
    watched = watch(body, rank_heartbeat_timeout=0.6)
    assert watched.ends() == -signal.SIGKILL
    assert (watched.report.hung_on, watched.report.step) == (HEARTBEAT, 2)
    assert watched.output.count("skipping what is no message") == 1
    assert "Traceback" not in watched.output


@pytest.mark.parametrize("most", [256, 4096])
def test_nothing_lands_in_the_files_of_a_script_that_closes_all_others(
    watch: Watch, most: int
) -> None:
    body = f"""
connect(); beat(1); os.closerange(3, {most})
files = [open(f"file{{number}}", "w") for number in range(40)]
saved(5); beat(7); beat(8); hang()
"""
    watched = watch(body, rank_heartbeat_timeout=1)
    assert watched.ends() == -signal.SIGKILL
    assert [path.stat().st_size for path in watched.directory.glob("file*")] == [0] * 40
    assert (watched.report.saved, watched.report.step) == (5, 8)
    assert IN_THE_RANK in watched.stacks


def test_a_wrapper_that_closes_descriptors_is_no_obstacle(watch: Watch, tmp_path: Path) -> None:
    """As conda run does, and every call of a subprocess."""
    script = "[sys.executable, 'rank.py', 'connect(); beat(4)']"
    watched = watch(f"sys.exit(subprocess.call({script}, close_fds=True))")
    assert (watched.ends(), watched.report.step, watched.report.over) == (0, 4, True)


def test_signals_go_to_the_rank_behind_a_wrapper_and_its_stacks_are_taken(watch: Watch) -> None:
    """A shell script without exec: the signal would end the shell, and that the rank."""
    rank = "on(15, lambda: (saved(9), tell('saved'), os._exit(0))); connect(); beat(4)"
    rank += "; tell('ready'); hang()"
    script = f"{sys.executable} rank.py {shlex.quote(rank)}; echo rest of the script"
    body = f"sys.exit(subprocess.call(['sh', '-c', {script!r}]))"
    stopped = watch(body)
    stopped.send(signal.SIGTERM)
    assert stopped.ends() == 0 and "rest of the script" in stopped.output
    assert (stopped.report.saved, stopped.report.reason) == (9, "stopped by SIGTERM")
    (stopped.directory / "ready").unlink()
    hung = watch(body, rank_heartbeat_timeout=0.5)
    assert hung.ends() == -signal.SIGKILL
    assert hung.report.stacks and IN_THE_RANK in hung.stacks


# ------------------------------------------------------------------------------ the report


def test_the_report_tells_how_the_rank_does_and_how_it_ended(watch: Watch) -> None:
    body = """
told("go"); connect(); enter("save"); beat(7); beat(8); told("end")
saved(8); client.report_error(ValueError("x")); sys.exit(3)
"""
    before = time.time()
    variables = {"RANK": "5", "FT_ATTEMPT": "2"}
    watched = watch(body, rank_heartbeat_timeout=20, environment=variables)
    watched.wait_for("pid")
    report = watched.report
    assert (report.rank, report.attempt, report.host) == (5, 2, os.uname().nodename)
    assert (report.monitor_pid, report.launcher_pid) == (watched.started.pid, os.getpid())
    assert before <= report.started and report.end == End.RUNNING
    startup = (
        r"no connection after process start for \d\.\d s \(limit 1800 s, --ft-startup-timeout\)"
    )
    assert re.fullmatch(startup, report.waiting)
    assert {report.connected, report.heartbeat, report.ended, report.status} == {None}
    watched.tell("go")
    watched.wait_for("step", 8)  # which is at most a second old
    report = watched.report
    assert (report.first_step, report.sections) == (7, ["save"])
    save = r" s at step 8 \(limit 1800 s, --ft-rank-section-timeouts=save:SECONDS\)"
    assert re.fullmatch(r"in section 'save' for \d\.\d" + save, report.waiting)
    assert report.started <= report.connected <= report.first_heartbeat <= report.heartbeat
    watched.tell("end")
    assert watched.ends() == 3
    report = watched.report
    assert (report.status, report.error, report.reason) == (3, "ValueError: x", None)
    assert (report.saved, report.over) == (8, True) and "--ft-exit-timeout" in report.waiting
    assert report.heartbeat <= report.error_time <= report.ended <= time.time()
    assert report.limits[HEARTBEAT] == 20
    assert [path.name for path in watched.report_path.parent.iterdir()] == ["rank5.json"]


def test_srun_numbers_ranks_and_each_monitor_has_a_place(watch: Watch, tmp_path: Path) -> None:
    variables = {"SLURM_PROCID": "3", "FT_RUN_DIR": "", "TMPDIR": str(tmp_path)}
    watched = watch("tell('place', os.environ['FT_RUN_DIR'])", environment=variables)
    assert watched.ends() == 0
    place = tmp_path / f"ft_runs_{os.getuid()}" / f"monitor_{watched.started.pid}"
    assert watched.told("place") == str(place)
    assert Report.read(place / "attempt_0" / "rank3.json").rank == 3


def test_a_run_directory_that_is_removed_is_made_again(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    saves = "connect(); saved(1); told('go'); saved(2); told('end')"
    watched = watch(saves)
    watched.started.wait_for_output("cannot write")
    (tmp_path / "run").unlink()
    watched.tell("go")
    watched.wait_for("saved", 2)
    shutil.rmtree(tmp_path / "run")
    watched.tell("end")
    assert watched.ends() == 0
    assert watched.report.saved == 2 and len(watched.log) == 1


@pytest.mark.parametrize("place", ["evidence", "flag"])
def test_a_file_system_that_hangs_delays_no_kill_and_no_file(watch: Watch, place: str) -> None:
    """Its place takes a FIFO without a reader instead of the file beside."""
    body = (
        "tell('ready'); told('go'); connect(); beat(8); saved(8); tell('at', time.time()); hang()"
    )
    environment = {ft_monitor.FLAG_VARIABLE: "flag"}
    hurry = {"FILE_SECONDS": 1.0}
    watched = watch(body, hurry, environment=environment, rank_heartbeat_timeout=1)
    watched.told("ready")
    rank, monitor = watched.rank, watched.monitor
    name = "rank0.json" if place == "evidence" else "flag.progress"
    directory = watched.report_path.parent if place == "evidence" else watched.directory
    os.mkfifo(directory / f".{name}.{os.uname().nodename}.{monitor}.tmp")
    watched.tell("go")
    wait_until(lambda: not is_running(rank), 20)
    assert 1 <= time.time() - float(watched.told("at")) < 1.5 + LATE
    assert watched.ends() == -signal.SIGKILL and "hung: no heartbeat" in watched.log[-1]
    assert watched.report.hung_on == (None if place == "evidence" else HEARTBEAT)
    assert IN_THE_RANK in watched.stacks
    assert watched.report.saved == (None if place == "evidence" else 8)
    assert (watched.directory / "flag.progress").exists() == (place == "evidence")


# --------------------------------------------------------------------- errors, log and usage

STALE = "OSError: [Errno 116] Stale file handle"
IN_WORKER = (
    "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):"
    f"\n{'x' * 900}\n{STALE}"
)


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("one line"), "ValueError: one line"),
        (ValueError("\x1b[31mtwo\n  lines\x1b[0m\n"), "ValueError: two lines"),
        (ValueError("x" * 1000), f"ValueError: {'x' * 488} ... {'x' * 500}"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError(IN_WORKER), f"OSError: {IN_WORKER.splitlines()[0]} ... {STALE}"),
    ],
)
def test_an_error_is_told_in_one_line_with_its_place(error: BaseException, text: str) -> None:
    try:
        raise error
    except BaseException as caught:
        told = ft_monitor.describe_error(caught)
    assert re.fullmatch(rf"{re.escape(text)} \(test_monitor\.py:\d+ in test_an_error.*\)", told)


def test_a_rank_that_ends_for_want_of_a_peer_takes_one_line_of_the_screen(watch: Watch) -> None:
    lost = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    watched = watch(f"connect(); raise RuntimeError({lost.split(': ')[1]!r})")
    assert watched.ends() == 1
    evidence = watched.directory / "run" / "attempt_0" / "rank0.traceback.txt"
    told = f"rank 0: {lost} (rank.py:"
    lines = [line for line in watched.output.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith(told) and lines[0].endswith(str(evidence))
    assert evidence.read_text().startswith("Traceback") and lost in evidence.read_text()
    assert watched.report.error is not None and watched.report.error.startswith(lost)


def test_a_wrong_call_of_ours_takes_one_line_of_the_screen(watch: Watch) -> None:
    watched = watch("connect(); client.end_section('x')")
    assert watched.ends() == 1 and "Traceback" not in watched.output
    assert "rank 0: RankMonitorClientError: section 'x' is not open" in watched.output


def test_the_error_of_a_rank_itself_is_shown_whole(watch: Watch) -> None:
    watched = watch("connect(); raise RuntimeError('a connection to the data base')")
    assert watched.ends() == 1 and "Traceback" in watched.output


def test_every_line_of_a_message_begins_with_who_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    log = ft_monitor.Log("ft 3")
    log.warning("%s", "one\n  two\n\ud800")
    log.error("100%")
    # And what a progress bar has left in the line ends before several.
    assert capfd.readouterr().err == "\n[ft 3] one\n[ft 3]   two\n[ft 3] ?\n[ft 3] 100%\n"


def run_monitor(start: Start, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Start a monitor; return its exit status and the lines of its output."""
    started = start([*PYTHON, ROOT / "ft_monitor.py", *arguments], FT_RUN_DIR="run", **environment)
    return started.wait(20), started.output.splitlines()


def test_a_rank_gets_the_configuration_and_the_rest_of_the_environment(start: Start) -> None:
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    environment = {"FT_CONFIG": '{"exit_timeout": 8}', "FT_LEARNED": "{}", "OTHER": "other"}
    command = ["--ft-startup-timeout=9", "--", *PYTHON, "-c", show]
    status, [output] = run_monitor(start, *command, **environment)
    seen = json.loads(output)
    config = FaultToleranceConfig.from_mapping(json.loads(seen["FT_CONFIG"]))
    assert config == FaultToleranceConfig(startup_timeout=9, exit_timeout=8)
    assert (status, seen["OTHER"], seen["PYTHONFAULTHANDLER"]) == (0, "other", "1")
    assert seen["TORCH_FR_DUMP_TEMP_FILE"].endswith("attempt_0/rank0.nccl_")
    assert "FT_LEARNED" not in seen


def test_what_follows_the_command_is_the_commands_own(start: Start) -> None:
    command = ["echo", "--ft-startup-timeout=0", "--help", "--", "-x"]
    for arguments in (["--", *command], command, ["--ft-exit-timeout=1e9", *command]):
        assert run_monitor(start, *arguments) == (0, [" ".join(command[1:])])
    ignored = f"SigIgn:\t{1 << 9 | 1 << 11:016x}"  # SIGUSR1 and SIGUSR2, and not Python's SIGPIPE
    assert run_monitor(start, "--", "grep", "SigIgn", "/proc/self/status") == (0, [ignored])


@pytest.mark.parametrize(
    "arguments, status, error",
    [
        ("-- ./missing", 127, "cannot start './missing': No such file or directory"),
        ("missing-command", 127, "cannot start 'missing-command': No such file or directory"),
        ("-- ./no_permission", 126, "cannot start './no_permission': Permission denied"),
        ("./no_permission/x", 126, "cannot start './no_permission/x': Not a directory"),
        ("./no_program", 126, "cannot start './no_program': Exec format error"),
        ("", 2, "no command: give the rank's command line after --"),
        ("--", 2, "no command: give the rank's command line after --"),
        ("--ft-startup-timeout=0 true", 2, "startup_timeout: got '0', expected a number"),
        ("--ft-startup=5 true", 2, "--ft-startup=5"),
        ("--ft-cfg-path=missing.json true", 2, "missing.json"),
    ],
)
def test_what_cannot_be_started_is_one_line_and_the_status_of_a_shell(
    start: Start, tmp_path: Path, arguments: str, status: int, error: str
) -> None:
    (tmp_path / "no_permission").touch()
    (tmp_path / "no_program").write_text("text")
    (tmp_path / "no_program").chmod(0o755)
    ended, output = run_monitor(start, *arguments.split())
    assert ended == status and error in output[-1]
    assert [text.split(":")[0] for text in output[:-1]] == ["usage"] * (status == 2)


# ------------------------------------------------------------------ the file and its contracts


def test_importing_the_module_does_nothing_and_imports_little() -> None:
    look = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
def look():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    return handlers, sorted(os.listdir("/proc/self/fd")), dict(os.environ), threading.enumerate()
before = look()
import ft_monitor
assert look() == before
print(*sys.modules)
"""
    command = [*PYTHON, "-c", look]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    modules = {name.partition(".")[0] for name in output.split()}
    assert modules - sys.stdlib_module_names == {"ft_monitor", "__main__"}
    assert not modules & {
        "logging",
        "argparse",
        "subprocess",
        "typing",
        "multiprocessing",
        "tempfile",
    }


def table(title: str) -> dict[str, str]:
    """A table of the module's docstring: the second cell of its rows by the first."""
    _, _, rest = (ft_monitor.__doc__ or "").partition(f"\n{title}")
    below = itertools.dropwhile(lambda row: not row.startswith("    "), rest.splitlines()[1:])
    rows = itertools.takewhile(lambda row: row.startswith("    "), below)
    cells = [re.split("  +", row.strip()) for row in rows if row[4] != " "]
    return {first: others[0] if others else "" for first, *others in cells}


def test_the_tables_of_the_head_are_those_of_the_code() -> None:
    kinds = ft_monitor.MESSAGE_FIELDS
    messages = {kind: ", ".join(fields) for kind, fields in kinds.items() if fields}
    documented = table("Messages: ")
    assert documented.keys() - {"type"} == kinds.keys() and messages.items() <= documented.items()
    assert f"at most {MAX_MESSAGE_BYTES:,} bytes" in (ft_monitor.__doc__ or "")
    every: Any = {"rank_section_timeouts": {"name": 1}, **dict.fromkeys(TIMEOUTS, 1)}
    assert table("Clocks: ").keys() - {"clock"} == FaultToleranceConfig(**every).limits().keys()
    names = re.findall(r'"(FT_[A-Z_]+)"', Path(ft_monitor.__file__).read_text())
    assert table("Environment").keys() - {"variable", "RANK"} == set(names)
    rows = " ".join(table("How a rank is ended"))
    for numbers in (
        ft_monitor.STOP_SIGNALS,
        ft_monitor.USER_SIGNALS,
        [ft_monitor.PEER_FAILED],
    ):
        assert ", ".join(signal.Signals(number).name for number in numbers) in rows
