"""How the models of a study are served: the options of the verbs that rank by cost."""

import argparse
from typing import TYPE_CHECKING

from gqa_scaling.cli.shared import finite
from gqa_scaling.config import between, require
from gqa_scaling.costs import CONVENTIONS, VALUE_BYTES
from gqa_scaling.files.storage import as_path
from gqa_scaling.study.choices import OBJECTIVES, Objective

if TYPE_CHECKING:
    from gqa_scaling.study.serving import Serving


def add_costs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--convention", choices=CONVENTIONS, help="of FLOPs")
    add("--lambda", dest="weight", type=finite, help="weight of memory in Z")
    add("--alpha", dest="memory_power", type=finite, help="power of memory in Z")
    add("--beta", dest="compute_power", type=finite, help="power of FLOPs in Z")
    add(
        "--objective",
        choices=tuple(OBJECTIVES),
        help="what is to be least; seconds and dollars need --hardware or --cost (default: z, with "
        "--cost seconds)",
    )
    add("--hardware", help="serve on this: v5e, v6e, a100, h100, ... (docs/asking.md)")
    add("--cost", metavar="CALIBRATION", help="serve on the machine of this file of `calibrate`")
    add("--price", type=finite, help="dollars an hour there, of one device or of the machine timed")
    add(
        "--output-tokens",
        type=int,
        help="with --cost: tokens written after a prompt that fills the rest of the context, which pay "
        "for its prefill, too (default: decoding alone)",
    )
    add(
        "--indifference",
        type=finite,
        metavar="PERCENT",
        help="costs that differ by no more are as good as equal (default: 1)",
    )
    add("--batch", type=int, default=1, help="sequences decoded at once")
    add("--weight-bytes", type=finite, help="bytes a weight (default: 2, with --cost as timed)")
    add("--cache-bytes", type=finite, help="bytes a cached value (default: likewise)")
    add("--fit-gib", type=finite, help="only models whose weights and cache fit")
    add("--kv-multiple", type=int, default=1, help="n_kv must be a multiple")


def serving_of(args: argparse.Namespace) -> "Serving":
    """How the models are to be served; UserError where that or the objective cannot be."""
    from gqa_scaling.hardware import GIB, Hardware, changed, hardware
    from gqa_scaling.study.calibration import read_calibration
    from gqa_scaling.study.clock import Clock, clock
    from gqa_scaling.study.serving import Serving, require_costs

    if args.fit_gib is not None:
        between("--fit-gib", args.fit_gib, 1e-6, 1e12, "GiB")
    require(
        args.hardware is None or args.cost is None,
        "--hardware and --cost are two machines: name one",
    )
    require(
        args.price is None or args.hardware is not None or args.cost is not None,
        f"--price {args.price} is that of a machine: name it with --hardware or --cost",
    )
    sizes = {"weight_bytes": args.weight_bytes, "cache_bytes": args.cache_bytes}
    served: Hardware | Clock | None = None
    if args.hardware:
        served = changed(hardware(args.hardware), price=args.price)
    elif args.cost is not None:
        served = clock(read_calibration(as_path(args.cost)), args.price, **sizes)
        sizes = {name: VALUE_BYTES[each] for name, each in served.kept.items()}
    serving = Serving(
        batch=args.batch,
        hardware=served,
        limit_bytes=float("inf") if args.fit_gib is None else args.fit_gib * GIB,
        kv_multiple=args.kv_multiple,
        output_tokens=args.output_tokens,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    require_costs(objective_of(args), serving)
    return serving


def objective_of(args: argparse.Namespace) -> Objective:
    """What is to be least."""
    return args.objective or ("z" if args.cost is None else "seconds")
