"""The verb of a new machine: what it has, what it lacks, and which known faults it has."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gqa_scaling.cli.shared import Verb, add_json, nothing_left, print_json, print_table
from gqa_scaling.units import quantity

if TYPE_CHECKING:
    from gqa_scaling.doctor.faults import Answer, Diagnosis
    from gqa_scaling.doctor.machine import Fact
    from gqa_scaling.doctor.speeds import Speed


def _doctor(args: argparse.Namespace, rest: Sequence[str]) -> int:
    nothing_left(rest)
    from gqa_scaling.devices.processes import require_platform
    from gqa_scaling.doctor import machine
    from gqa_scaling.doctor.faults import diagnose
    from gqa_scaling.doctor.speeds import speeds
    from gqa_scaling.files.runs import runs_root

    held = machine.gpu_memory()  # before jax starts and takes its share
    require_platform()
    facts = [*machine.devices(held), *machine.facts(runs_root(args.root))]
    measured = speeds()
    diagnoses = diagnose()
    problems = [f"{fact.name}: {fact.problem}" for fact in facts if fact.problem]
    problems += [_too_slow(speed) for speed in measured if speed.slow]
    problems += [
        f"{each.fault.name}: {each.fault.about} ({each.fault.source}), {each.shown.seen}; "
        f"{each.hit.seen}"
        for each in diagnoses
        if each.wrong
    ]
    if args.json:
        print_json(_as_json(facts, measured, diagnoses, problems))
    else:
        _show(facts, measured, diagnoses, problems)
    return 1 if problems else 0


def _too_slow(speed: "Speed") -> str:
    assert speed.share is not None
    return (
        f"{speed.name}: {speed.share:.0%} of the data sheet; is the device shared with another "
        "process, too hot or limited in power?"
    )


def _as_json(
    facts: "Sequence[Fact]",
    measured: "Sequence[Speed]",
    diagnoses: "Sequence[Diagnosis]",
    problems: Sequence[str],
) -> dict[str, Any]:
    return {
        "machine": [dataclasses.asdict(fact) for fact in facts],
        "speeds": [
            {**dataclasses.asdict(speed), "share": speed.share, "slow": speed.slow}
            for speed in measured
        ],
        "faults": [
            {
                "name": each.fault.name,
                "source": each.fault.source,
                "about": each.fault.about,
                "touched": each.touched,
                "shown": dataclasses.asdict(each.shown),
                "hit": dataclasses.asdict(each.hit),
                "done": each.fault.done,
                "wrong": each.wrong,
            }
            for each in diagnoses
        ],
        "problems": list(problems),
    }


def _show(
    facts: "Sequence[Fact]",
    measured: "Sequence[Speed]",
    diagnoses: "Sequence[Diagnosis]",
    problems: Sequence[str],
) -> None:
    from gqa_scaling.study.report.table import Column, Table, shown

    def answer(of: "Answer") -> str:
        return "-" if of.yes is None else "yes" if of.yes else "no"

    here = [each for each in diagnoses if each.shown.yes is not None or each.hit.yes is not None]
    others = len(diagnoses) - len(here)
    tables = [
        Table(
            "This machine",
            [Column("what", lambda f: f.name), Column("found", lambda f: f.value, fold=True)],
            facts,
            [f"{fact.name}: {fact.note}." for fact in facts if fact.note],
        ),
        Table(
            "Speed of the first device",
            [
                Column("what", lambda s: s.name),
                Column("measured", lambda s: f"{quantity(s.measured)} {s.unit}"),
                Column("data sheet", lambda s: "-" if s.peak is None else quantity(s.peak)),
                Column("share", lambda s: "-" if s.share is None else f"{s.share:.0%}"),
            ],
            measured,
        ),
        Table(
            "Known faults of the libraries",
            [
                Column("fault", lambda d: d.fault.name),
                Column("these versions", lambda d: "yes" if d.touched else "no"),
                Column("shows here", lambda d: answer(d.shown)),
                Column("hits our programs", lambda d: answer(d.hit)),
                Column("seen", lambda d: f"{d.shown.seen}; {d.hit.seen}", fold=True),
            ],
            here,
            [
                *(
                    f"{each.fault.name}: {each.fault.about} ({each.fault.source}); {each.fault.done}."
                    for each in here
                ),
                *([f"{others} faults of other platforms were not looked for."] if others else []),
            ],
        ),
    ]
    sentence = (
        f"{len(problems)} of these would spoil runs" if problems else "Nothing here spoils runs."
    )
    print_table(shown(tables, problems, sentence))


VERBS: dict[str, Verb] = {
    "doctor": (
        _doctor,
        "what this machine has, measures and lacks, and which known faults it has",
        add_json,
    ),
}
