"""A page's numbers and words without a browser: its scripts in a JavaScript engine out of a wheel."""

import json
import math
import shlex

from py_mini_racer import MiniRacer

from gqa_scaling import cli
from gqa_scaling.cli import report
from gqa_scaling.cli import study as verbs
from gqa_scaling.study.report.carried import carried
from gqa_scaling.study.report.page import NUMERICS, part


class Engine:
    """The scripts that know of no page, and, of one study, what its page carries."""

    def __init__(self, held=None):
        self.scripts = MiniRacer()
        for name in NUMERICS:
            self.scripts.eval(part(name))
        if held is not None:
            self.scripts.eval(f"const carried = {json.dumps(held, allow_nan=False)};")
            self.scripts.eval("const model = Numerics.prepare(carried);")
            self.scripts.eval("const asking = Asking(carried, model);")

    def run(self, code):
        """The value of an expression; infinite and unknown numbers as texts, which JSON lacks."""
        odd = "(_, v) => typeof v === 'number' && !Number.isFinite(v) ? String(v) : v"
        told = self.scripts.eval(f"JSON.stringify({code}, {odd})")
        return json.loads(told)

    def asked(self, **changes):
        """The question with these changes: what is wrong, the answer, the sentence, the command."""
        state = f"{{...asking.opening, ...{json.dumps(changes)}}}"
        return self.run(
            f"(() => {{ const s = {state}, [, wrong] = asking.refusal(s); if (wrong) return {{wrong}};"
            "const answer = Numerics.answer(model, asking.asked(s));"
            "return {answer, sentence: Words.sentence(carried, model, answer, s),"
            "command: asking.command(s)[0], address: asking.toAddress(s),"
            "again: asking.fromAddress(asking.toAddress(s)), state: s}; })()"
        )


def answered(command):
    """The study of a command line, and what its page carries."""
    args, rest = cli._parse(shlex.split(command)[1:])
    source = verbs.source_of(args, rest)
    study = verbs.answer_of(args, source)
    return study, carried(study, report.again_of(args, rest, source.question))


def printed(command, capsys):
    """The one answer that a command line of `frontier` prints, as JSON."""
    capsys.readouterr()
    assert cli.main([*shlex.split(command)[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (answer,) = told["answers"]
    return answer


NUMBERS = ("n", "n_layers", "d_model", "memory", "flops", "z", "cost", "excess", "bytes")
SHARES = ("probability", "within", "regret", "unreachable")


def agree(shown, answer):
    """Whether the page's answer is that of the command line, to more digits than either prints."""
    assert [name(c["configuration"]) for c in shown["choices"]] == [
        name(c["heads"]) for c in answer["choices"]
    ]
    assert [name(c["configuration"]) for c in shown["tied"]] == [*map(name, answer["tied"])]
    assert {name(c["configuration"]) for c in shown["equivalent"]} == {
        *map(name, answer["equivalent"])
    }
    for mine, its in zip(shown["choices"], answer["choices"], strict=True):
        for key in (*NUMBERS, *SHARES):
            close(mine[key], its[key], key)
        for kind, saving in its["saving"].items():
            close(mine["saving"][kind], saving, kind)
            for end in (0, 1):
                close(mine["saving_interval"][kind][end], its["saving_interval"][kind][end], kind)
        for end in (0, 1):
            close(mine["n_interval"][end], its["n_interval"][end], "n_interval")
    close(shown["baseline"]["cost"], answer["baseline"]["cost"], "baseline")


def name(heads):
    """A configuration as the page or as JSON has it."""
    if isinstance(heads, dict):
        heads = [heads["n_heads"], heads["n_kv_heads"], (heads["pattern"] or {}).get("label")]
    return tuple(heads[:2])


def close(mine, its, what):
    if its is None:  # JSON of the command line has no infinity
        assert not math.isfinite(float(mine)), (what, mine)
    else:
        assert math.isclose(float(mine), its, rel_tol=1e-5, abs_tol=1e-5 if what != "n" else 0), (
            what,
            mine,
            its,
        )
