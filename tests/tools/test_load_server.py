"""The load script passes a server that keeps its promises and fails one that does not."""

import load_server
import numpy as np

SHORT = ["--minutes", "0.03", "--turns", "3", "--any-overhead"]


def test_a_server_that_answers_everything_passes(package, capsys):
    assert load_server.main([str(package), *SHORT]) == 0
    out = capsys.readouterr().out
    assert '"right"' in out
    assert "FAULT" not in out


def test_a_server_that_refuses_requests_fails(package, capsys):
    """The twin: four clients meet a queue that holds nobody."""
    assert load_server.main([str(package), *SHORT, "--queue", "0"]) == 1
    assert "answers were refused: [503] the queue is full" in capsys.readouterr().out


def findings_of(outcomes, resident, milliseconds=(1.0,)):
    findings = load_server.Findings()
    options = load_server.parsed(["nowhere"])
    load_server.report_load(findings, load_server.Counter(outcomes), list(milliseconds), resident, options)
    return findings.faults


def test_wrong_and_lost_answers_and_growing_memory_are_faults():
    flat = [400.0 + 0.01 * second for second in range(600)]
    assert findings_of({"right": 9}, flat) == []
    assert findings_of({"right": 9, "wrong": 1}, flat) == ["1 answers were wrong"]
    assert findings_of({"lost: ConnectionError": 1}, flat, ())[-1] == "nothing was answered"
    (fault,) = findings_of({"right": 9}, list(np.linspace(400, 420, 600)))
    assert fault.startswith("the server grew by 12.0 MiB")
