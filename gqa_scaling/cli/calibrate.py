"""The verb of measured cost: timings to a calibration."""

import argparse
from collections.abc import Sequence

from gqa_scaling.cli.shared import Verb, add_json, nothing_left, print_json, print_table
from gqa_scaling.files.storage import as_path


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("timings", help="file of timings that `bench-inference` wrote")
    add("--output", help="the calibration (default: calibration.json beside the timings)")
    add("--hardware", help="also judge this row's figures: cpu, v5e, v5p, v6e, a100, h100, h200")
    add_json(parser)


def _calibrate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.hardware import hardware
    from gqa_scaling.study.calibrate import calibrate
    from gqa_scaling.study.calibration import require_replaceable, write_calibration
    from gqa_scaling.study.report.calibrated import calibrated

    nothing_left(rest)
    path = as_path(args.timings)
    output = path.with_name("calibration.json") if args.output is None else as_path(args.output)
    require_replaceable(output)
    found = calibrate(path, hardware(args.hardware) if args.hardware else None)
    write_calibration(output, found)
    if args.json:
        print_json(found.to_dict() | {"file": str(output)})
        return 0
    print_table(calibrated(found))
    print(f"calibration: {output}")
    return 0


VERBS: dict[str, Verb] = {
    "calibrate": (_calibrate, "fit and judge what steps cost to timings", _add_calibrate),
}
