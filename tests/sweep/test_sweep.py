"""A sweep: each run once, on after a kill, smaller where memory runs out, and told where it fails."""

import json

import pytest
import yaml

from tests.compare.test_compare import write_run
from unisd.cli import main
from unisd.cli import sweep as sweep_command
from unisd.sweep import Sweep, cells
from unisd.sweep import run as sweep_run
from unisd.sweep.cells import FINISHED
from unisd.sweep.table import table

CELLS = cells(["procedural"], ["plain", "sft"], [0, 1])


class Machine:
    """Stands for `unisd`: writes what a run writes, and fails where it is told to."""

    def __init__(self, fails=None):
        self.commands, self.fails = [], fails or (lambda words: None)

    def __call__(self, words, log):
        self.commands.append(list(words))
        log.parent.mkdir(parents=True, exist_ok=True)
        said = self.fails(words)
        if isinstance(said, BaseException):
            raise said
        if said is not None:
            log.write_text((log.read_text() if log.is_file() else "") + f"unisd {words[0]}\nsomething\n{said}\n")
            return 1
        if words[0] == "train":
            folder = log.parent.parent / log.stem
            folder.mkdir(exist_ok=True)
            seed = int(words[words.index("--seed") + 1])
            (folder / "unisd_config.yaml").write_text(yaml.safe_dump({"per_device_train_batch_size": 8}))
            entries = [{"step": 1, "unisd/drift_kl": 0.1 * (seed + 1)}, {"step": 1, "train_runtime": 10.0}]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        return 0

    def trained(self):
        return [
            words[words.index("--output_dir") + 1].rpartition("/")[2] for words in self.commands if words[0] == "train"
        ]


def sweep(tmp_path, machine, said=None, **settings):
    return Sweep(tmp_path, launch=machine, say=(said if said is not None else []).append, **settings)


def test_every_preset_has_a_run_before_one_has_two():
    assert [cell.name for cell in CELLS] == [
        "procedural-plain-0",
        "procedural-sft-0",
        "procedural-plain-1",
        "procedural-sft-1",
    ]
    with pytest.raises(ValueError, match=r"a/rows\.jsonl and b/rows\.jsonl would both be rows-plain-0"):
        cells(["a/rows.jsonl", "b/rows.jsonl"], ["plain"], [0])


def test_what_is_run_with_what(tmp_path):
    machine = Machine()
    settings = {"train": ["--max_steps", "3"], "evaluations": [["cos_e", "--limit", "5"]], "drift": True}
    outcomes = sweep(tmp_path, machine, **settings).run(CELLS[:1])
    assert [each.status for each in outcomes] == ["finished"]
    folder = str(tmp_path / "procedural-plain-0")
    assert machine.commands == [
        [
            "train",
            "--dataset",
            "procedural",
            "--preset",
            "plain",
            "--seed",
            "0",
            "--output_dir",
            folder,
            "--max_steps",
            "3",
        ],
        ["eval", "cos_e", "--limit", "5", "--model", folder, "-o", f"{folder}/eval"],
        ["eval", "drift", "--model", folder, "-o", f"{folder}/eval"],
    ]


@pytest.mark.parametrize("at", range(8))
def test_a_killed_sweep_goes_on_and_does_nothing_twice(tmp_path, at):
    count = iter(range(100))
    first = Machine(lambda words: KeyboardInterrupt() if next(count) == at else None)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, first, evaluations=[["cos_e"]]).run(CELLS)
    second = Machine()
    outcomes = sweep(tmp_path, second, evaluations=[["cos_e"]]).run(CELLS)
    assert {each.status for each in outcomes} <= {"found", "finished"}
    assert len(outcomes) == 4
    done = [*first.commands[:-1], *second.commands]
    assert len(done) == 8
    assert sorted(first.trained()[: -1 if first.commands[-1][0] == "train" else None] + second.trained()) == sorted(
        cell.name for cell in CELLS
    )
    assert all((tmp_path / cell.name / FINISHED).is_file() for cell in CELLS)


def test_a_run_with_checkpoints_resumes_and_others_begin_again(tmp_path):
    (tmp_path / "procedural-plain-0" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "procedural-sft-0").mkdir()
    (tmp_path / "procedural-sft-0" / "unisd_config.yaml").write_text("a: 1\n")
    machine = Machine()
    sweep(tmp_path, machine).run(CELLS[:2])
    assert machine.commands[0][-2:] == ["--resume", "true"]
    assert machine.commands[1][-1] == "--overwrite_output_dir"


def test_out_of_memory_halves_the_micro_batch_and_says_so(tmp_path):
    def fails(words):
        batch = int(words[words.index("--per_device_train_batch_size") + 1]) if len(words) > 9 else 8
        return "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate" if batch > 2 else None

    (tmp_path / "procedural-plain-0").mkdir()
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    (tmp_path / "procedural-plain-0" / "unisd_config.yaml").write_text(yaml.safe_dump(settings))
    said: list[str] = []
    machine = Machine(lambda words: fails([w for w in words if w != "--overwrite_output_dir"]))
    (outcome,) = sweep(tmp_path, machine, said).run(CELLS[:1])
    assert outcome.status == "finished"
    tail = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "12"]
    assert machine.commands[-1][-4:] == tail
    assert any(
        "out of memory with a micro-batch of 8; again with 4, and 6 of them a step instead of 3" in s for s in said
    )
    record = json.loads((tmp_path / "procedural-plain-0" / FINISHED).read_text())
    assert record["made_smaller"] == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 12}


def test_memory_that_is_never_enough_is_a_failure(tmp_path):
    machine = Machine(lambda words: "CUDA out of memory")
    (outcome,) = sweep(tmp_path, machine, train=["--per_device_train_batch_size", "2"]).run(CELLS[:1])
    assert outcome.status == "failed"
    assert "out of memory with a micro-batch of 1" in outcome.reason
    assert len(machine.commands) == 2


def test_a_run_that_fails_is_told_and_does_not_end_the_others(tmp_path):
    said: list[str] = []
    text = "unisd train: error: a bad row\n(--traceback shows where it comes from)"
    machine = Machine(lambda words: text if "sft" in words else None)
    outcomes = sweep(tmp_path, machine, said).run(CELLS)
    assert [each.status for each in outcomes] == ["finished", "failed", "finished", "failed"]
    assert outcomes[1].reason == "unisd train: error: a bad row"
    assert any("procedural-sft-0: failed after" in line and "sft-0.log" in line for line in said)


def test_the_table_is_over_seeds(tmp_path):
    for cell, right in ((CELLS[0], range(5)), (CELLS[2], range(15))):
        folder = write_run(tmp_path / cell.name, right, lr=0.01 * (cell.seed + 1))
        (folder / FINISHED).write_text("{}")
    lines = table(CELLS, tmp_path).splitlines()
    assert lines[0] == "| data | preset | seeds | cos_e | KL from the base, nats a token | training, s |"
    assert lines[2] == "| procedural | plain | 2 | 50% (25 to 75) | 0.075 (0.05 to 0.1) | 12.5 (12.5 to 12.5) |"
    assert lines[3] == "| procedural | sft | 0 | - | - | - |"


def test_the_command(tmp_path, monkeypatch, capsys):
    machine = Machine(lambda words: "no" if words[0] == "train" and "sft" in words else None)
    monkeypatch.setattr(sweep_command, "launch", machine)
    words = ["sweep", "--presets", "plain", "sft", "--seeds", "3", "-o", str(tmp_path / "out")]
    assert main([*words, "--eval", "cos_e --limit 5", "--", "--max_steps", "2"]) == 1
    said = capsys.readouterr().out
    assert "[1/2] procedural-plain-3: finished in" in said
    assert "1 of 2 runs failed; the same command tries them again" in said
    assert "| procedural | plain | 1 |" in (tmp_path / "out" / "sweep.md").read_text()
    assert "procedural-plain-3" in (tmp_path / "out" / "compare.html").read_text()
    assert machine.commands[0][-2:] == ["--max_steps", "2"]
    for more, message in (
        (["--", "--preset", "gkd"], "--preset is set by the sweep"),
        (["--eval", "procedral"], "does not begin with an evaluation: procedural, diagnostic"),
        (["--eval", "behaviour --output x.json"], "--output is set by the sweep"),
        (["--drift", "--eval", "procedural drift"], "are one evaluation"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_the_real_process(tmp_path):
    log = tmp_path / "logs" / "x.log"
    assert sweep_run.launch(["presets", "no-such-preset"], log) != 0
    assert log.read_text().startswith("unisd presets no-such-preset\n")
    assert len(log.read_text().splitlines()) > 1
