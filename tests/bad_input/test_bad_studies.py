"""Tables and questions that no study can be made of."""

from pathlib import Path

import pytest
from bad_input_kit import HUGE, LONG

HEAD = "n_heads,n_kv_heads,loss,n_params"
ROWS = [f"4,{kv},{2 + 100 / n**0.3 + kv / 100},{n}" for n in (1e6, 2e6, 4e6, 8e6) for kv in (4, 1)]
TABLES: dict[str, tuple[str, str]] = {
    "empty": ("", "holds no runs"),
    "header": (HEAD, "holds no runs"),
    "no-header": (
        "\n".join(ROWS),
        "own.csv line 1: holds the value 4 where the names of the columns belong",
    ),
    "no-loss": (HEAD.replace("loss", "lost") + "\n4,4,2,1e6", "column loss is missing"),
    "twice": (HEAD + ",loss\n4,4,2,1e6,2", "column loss appears twice"),
    "short-line": (HEAD + "\n4,4,2", "line 2: has 3 values for 4 columns"),
    "text": (HEAD + "\n4,4,two,1e6", "column loss='two'"),
    "nan": (HEAD + "\n4,4,nan,1e6", "column loss='nan'"),
    "negative": (HEAD + "\n4,4,-2,1e6", "column loss='-2'"),
    "half-heads": (HEAD + "\n4.5,4,2,1e6", "column n_heads='4.5'"),
    "no-heads": (HEAD + "\n0,4,2,1e6", "column n_heads='0'"),
    "kv": (HEAD + "\n4,5,2,1e6", "n_kv_heads=5"),
    "huge-heads": (HEAD + f"\n{HUGE},1,2,1e6", f"column n_heads='{HUGE}'"),
    "same": (HEAD + "\n4,4,2,1e6\n4,4,2,1e6", "appears twice"),
    "count": (HEAD + ",n_count\n4,4,2,1e6,mine", "n_count='mine'"),
    "pattern": (HEAD + ",pattern_block\n4,4,2,1e6,16", "needs column pattern_local"),
    "control": (HEAD + "\n4,4,\x1b[31m,1e6", "column loss='\\x1b[31m'"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(refused, workplace, kind):
    text, said = TABLES[kind]
    Path("own.csv").write_text(text)
    refused(said, "fit", "own.csv")


def test_places_of_tables(refused, workplace):
    (workplace / "folder.csv").mkdir()
    (workplace / "bytes.csv").write_bytes(b"\xff\xfe")
    refused("absent.csv: cannot be read", "fit", "absent.csv")
    refused("folder.csv: cannot be read", "fit", "folder.csv")
    refused("bytes.csv: is not a text file", "fit", "bytes.csv")
    refused("File name too long", "fit", "n" * 300 + ".csv")
    refused("unexpected argument '--seed'", "fit", "chen2025", "--seed", "1")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("refits=0 must be", "fit chen2025 --refits 0"),
        ("refits=-5 must be", "fit chen2025 --refits -5"),
        ("--law: invalid choice: 'cubic'", "fit chen2025 --law cubic"),
        ("invalid int value: 'long'", "fit chen2025 --context long"),
        ("--baseline '8' must be", "frontier chen2025 --baseline 8"),
        ("--baseline '-8,8' must be", "frontier chen2025 --baseline=-8,8"),
        ("--baseline 'a,b' must be", "frontier chen2025 --baseline a,b"),
        ("must be n_heads,n_kv_heads", f"frontier chen2025 --baseline 8,{LONG}"),
        ("context=0 must be", "frontier chen2025 --contexts 0"),
        ("context=-1 must be", "frontier chen2025 --contexts -1"),
        ("--losses: nan must be a finite number", "frontier chen2025 --losses nan"),
        ("--losses: inf must be a finite number", "frontier chen2025 --losses inf"),
        ("target loss=-1.0 must be", "frontier chen2025 --losses -1"),
        ("target loss=0.0 must be", "frontier chen2025 --losses 0"),
        ("invalid choice: 'joules'", "frontier chen2025 --objective joules"),
        ("unknown hardware 'abacus'", "frontier chen2025 --hardware abacus"),
        ("--train-context belongs to --align", "frontier chen2025 --train-context 8192"),
        ("raise --budget-flops", "suggest chen2025 --budget-flops 9"),
        ("--budget-flops=0.0 must be", "suggest chen2025 --budget-flops 0"),
        ("'4' must be heads such as 8,1", "compare chen2025 4 8,1"),
        ("the following arguments are required: second", "compare chen2025 8,1"),
        ("(16,1) cannot be predicted", "compare chen2025 8,1 16,1 --law separate"),
        ("more KV heads than query heads", "compare chen2025 4,8 8,1"),
        ("more KV heads than query heads", "frontier chen2025 --candidates 4,8"),
        ("names no run or configuration", "compare chen2025 4,1 8,1 --without 5,5"),
        ("no finished runs under runs/tiny", "fit experiments.tiny"),
        ("no finished runs under runs/tiny", "report experiments.tiny"),
        ("no finished runs under runs/tiny", "suggest experiments.tiny"),
    ],
)
def test_questions(refused, said, arguments):
    refused(said, *arguments.split())
