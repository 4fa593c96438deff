"""What a compiled program does, read from XLA's text of it: collectives and FLOPs, loops included.

XLA's own cost analysis counts the body of a loop once, which for scanned layers is wrong by the
number of layers. Here everything counts as often as the loops around it turn. A loop whose turns
only the data know (causal attention stops at the diagonal) turns `dynamic_turns` times on average:
the caller knows that from arithmetic. No jax: the text is all that is needed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BETWEEN_SLICES = "between-slices"  # over the slower network that joins slices of TPU chips
KERNEL = "tpu_custom_call"  # a Pallas kernel: its FLOPs are not in the text

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations|true_computation|false_computation)=(\{[^}]*\}|\S+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_WIDTH = re.compile(r"^[a-z]+(\d+)")  # f32, bf16, s4, u8, c64, f8e4m3fn


@dataclass(frozen=True)
class Array:
    """Element type and dimensions of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        width = _WIDTH.match(self.dtype)
        bits = int(width[1]) if width else 8 if self.dtype == "pred" else 0  # 0: tokens
        return math.ceil(self.size * bits / 8)


@dataclass(frozen=True)
class Instruction:
    """One line of the text: `name = arrays opcode(inside), attributes`."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    inside: str
    attributes: str

    @cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    @cached_property
    def called(self) -> dict[str, str]:
        """Computations it runs, by their role: calls, to_apply, body, condition."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        return [name for part in _BRANCHES.findall(self.attributes) for name in _NAME.findall(part)]

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Such as (0, 2) of `lhs_contracting_dims={0,2}`; () when it is not there."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclass
class Computation:
    """Instructions by name, in order; `root` is the one whose value is returned."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def completes(self) -> bool:
        """Whether this is the last of the fusions of an asynchronous collective."""
        return any("AsyncCollectiveDone" in x.attributes for x in self.instructions.values())


@dataclass(frozen=True)
class Executed:
    """An instruction as it runs: `turns` times, in `computation`.

    `exact` is False inside loops that turn as often as the data say.
    """

    instruction: Instruction
    computation: Computation
    turns: float
    exact: bool


@dataclass(frozen=True)
class Collective:
    """A collective operation among groups of `devices` devices, run `turns` times.

    `arrays` are the whole ones: results of a gather, operands of a reduction or exchange.
    `received` is what each device must at least receive from others each time, in bytes: (n-1)/n
    of the array among n devices, twice that for an all-reduce, all of it for a permutation and for
    what comes from other slices, whose number the text does not say: `devices` is 0 there.
    """

    kind: str
    arrays: tuple[Array, ...]
    devices: int
    received: float
    turns: float
    exact: bool
    source: str

    @property
    def array(self) -> Array:
        """The largest of its arrays."""
        return max(self.arrays, key=lambda a: a.bytes)


class Program:
    """A compiled module. Raises ValueError when the text holds no entry computation."""

    def __init__(self, text: str, dynamic_turns: float = 1.0) -> None:
        self.computations, self.entry = _parse(text)
        self.dynamic_turns = dynamic_turns
        self.devices = max(
            int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text) or [1]
        )

    @cached_property
    def executed(self) -> tuple[Executed, ...]:
        """Everything that runs, fusions opened; of a conditional every branch, as if each ran."""
        return tuple(self._walk(self.entry, {}, 1.0, True))

    def _walk(
        self, name: str, known: dict[int, int], turns: float, exact: bool
    ) -> Iterator[Executed]:
        """`known` are the constants among the elements of the computation's parameter."""
        here = self.computations[name]
        for each in here.instructions.values():
            yield Executed(each, here, turns, exact)
            if each.opcode == "while":
                body = each.called["body"]
                constants = self._constants(here, each, known)
                count = self._trips(each, constants)
                times = turns * (self.dynamic_turns if count is None else count)
                kept = {i: v for i, v in constants.items() if self._kept(body, i)}
                yield from self._walk(body, kept, times, exact and count is not None)
            elif each.opcode in ("fusion", "async-start"):
                yield from self._walk(each.called["calls"], {}, turns, exact)
            elif each.opcode in ("call", "conditional"):
                for inner in each.branches or [each.called["to_apply"]]:
                    yield from self._walk(inner, {}, turns, exact)

    def _constants(
        self, here: Computation, loop: Instruction, known: dict[int, int]
    ) -> dict[int, int]:
        """The integer constants among the initial values of a loop."""
        start = here.instructions[loop.operands[0]]
        values = enumerate(_value(here, x, known) for x in start.operands)
        return {i: v for i, v in values if v is not None} if start.opcode == "tuple" else {}

    def _kept(self, body: str, i: int) -> bool:
        """Whether a turn of the loop hands element `i` on unchanged."""
        here = self.computations[body]
        root = here.instructions[here.root]
        return root.opcode == "tuple" and _element(here, root.operands[i]) == i

    def _trips(self, loop: Instruction, start: dict[int, int]) -> int | None:
        """How often a loop turns, None when only the data know.

        From the compiler's note if there is one. TPU programs carry none: there the condition
        compares a counter, which each turn increases by a constant, with a constant.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called["condition"]]
        body = self.computations[loop.called["body"]]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = _element(condition, test.operands[0])
        kept = {i: v for i, v in start.items() if self._kept(body.name, i)}
        end = _value(condition, test.operands[1], kept)
        root = body.instructions[body.root]
        if counter is None or end is None or counter not in start or root.opcode != "tuple":
            return None
        turn = _through_copies(body, root.operands[counter])
        if turn.opcode != "add" or _element(body, turn.operands[0]) != counter:
            return None
        step = _value(body, turn.operands[1], kept)
        return None if not step else max(0, math.ceil((end - start[counter]) / step))

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective operation of more than one device."""
        return tuple(c for each in self.executed if (c := self._collective(each)) is not None)

    def _collective(self, each: Executed) -> Collective | None:
        it, here = each.instruction, each.computation
        if it.opcode == "recv" and "xla_megascale" in it.attributes:
            arrived = it.arrays[:1]
            return Collective(
                BETWEEN_SLICES, arrived, 0, float(arrived[0].bytes), each.turns, each.exact, ""
            )
        kind = it.opcode.removesuffix("-start")
        devices = self._group(it) if kind in COLLECTIVES else 1
        # TPU programs repeat an asynchronous one in the fusions it overlaps with and in its last
        if devices == 1 or here.name.startswith("async_collective_fusion") or here.completes:
            return None
        if kind == "all-reduce" and here.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # how TPU programs spell it: a fusion with a slice
        operands = [a for x in it.operands for a in here.instructions[x].arrays]
        # asynchronous gathers return their operands too, before the results
        arrays = it.arrays[-len(operands) :] if kind == "all-gather" else tuple(operands)
        total = sum(a.bytes for a in arrays)
        share = 1 if kind == "collective-permute" else (devices - 1) / devices
        received = total * share * (2 if kind == "all-reduce" else 1)
        source = _SOURCE.search(it.attributes)
        name = source[1] if source else ""
        return Collective(kind, arrays, devices, received, each.turns, each.exact, name)

    def _group(self, it: Instruction) -> int:
        """How many devices take part in each group of a collective."""
        if it.opcode.startswith("collective-permute"):
            return self.devices
        text = it.attributes.partition("replica_groups=")[2]
        listed = re.match(r"\{\{([\d,]*)\}", text)
        if listed:
            return len(listed[1].split(","))
        shaped = re.match(r"\[(\d+),(\d+)\]<=", text)
        if shaped:
            return int(shaped[2])
        named = re.match(r"(?:mesh)?\[([^\]]*)\][^{]*\{([^}]*)\}", text)
        if named:  # mesh['a'=4,'b'=2] {'a','b':(1)2}: axes, or parts of them
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return self.devices

    @cached_property
    def flops(self) -> float:
        """FLOPs of all matrix products on one device, two for each multiply-add.

        Convolutions, as which TPU programs write products, count just the elements they read.
        """
        return sum(each.turns * _flops(each) for each in self.executed)

    @property
    def exact(self) -> bool:
        """Whether the turns of every loop with a product or collective in it are in the text."""
        counted = all(each.exact or not _flops(each) for each in self.executed)
        return counted and all(c.exact for c in self.collectives)

    @property
    def kernels(self) -> int:
        """Calls of kernels, whose FLOPs are not counted."""
        return sum(KERNEL in e.instruction.attributes for e in self.executed)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif line.startswith("  ") and " = " in line:  # a kernel's attributes go on without indent
            name, _, rest = line.strip().partition(" = ")
            is_root = name.startswith("ROOT ")
            each = _instruction(name.removeprefix("ROOT ").lstrip("%"), rest)
            current.instructions[each.name] = each
            current.root = each.name if is_root else current.root
    if not entry:
        raise ValueError("no entry computation in this text")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    arrays = tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
    )
    return Instruction(name, arrays, opcode, rest[: end - 1], rest[end:])


def _closing(text: str) -> int:
    """Where the bracket that opens `text` has been closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _through_copies(here: Computation, name: str) -> Instruction:
    found = here.instructions[name]
    while found.opcode in ("copy", "bitcast"):
        found = here.instructions[found.operands[0]]
    return found


def _element(here: Computation, name: str) -> int | None:
    """Which element of the computation's parameter this is, None when it is none."""
    found = _through_copies(here, name)
    if found.opcode != "get-tuple-element":
        return None
    if here.instructions[found.operands[0]].opcode != "parameter":
        return None
    index = re.search(r"\bindex=(\d+)", found.attributes)
    return int(index[1]) if index else None


def _value(here: Computation, name: str, known: dict[int, int]) -> int | None:
    """An integer constant's value, also one handed down in the parameter."""
    found = _through_copies(here, name)
    if found.opcode == "constant":
        return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None
    element = _element(here, name)
    return None if element is None else known.get(element)


def _flops(each: Executed) -> int:
    it = each.instruction
    if it.opcode not in ("dot", "convolution"):
        return 0
    left, right = (each.computation.instructions[x].arrays[0] for x in it.operands[:2])
    if it.opcode == "dot":
        return (
            2
            * it.arrays[0].size
            * math.prod(left.dims[i] for i in it.numbers("lhs_contracting_dims"))
        )
    return _convolution_flops(it, left, right)


def _convolution_flops(it: Instruction, left: Array, right: Array) -> int:
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", it.attributes)
    window = re.search(r"\bwindow=\{([^}]*)\}", it.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {it.name}")
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    _, kernel, output = labels.groups()
    spatial = sorted(c for c in kernel if c.isdigit())

    def option(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * len(spatial)

    pairs = 1
    for i, axis in enumerate(spatial):
        low, _ = (int(n) for n in option("pad", "0_0")[i].split("_"))
        pairs *= _window_pairs(
            left.dims[labels[1].index(axis)],
            right.dims[kernel.index(axis)],
            it.arrays[0].dims[output.index(axis)],
            int(option("stride", "1")[i]),
            low,
            int(option("lhs_dilate", "1")[i]),
            int(option("rhs_dilate", "1")[i]),
        )
    batch = it.arrays[0].dims[output.index("b")]
    return 2 * batch * right.dims[kernel.index("i")] * right.dims[kernel.index("o")] * pairs


def _window_pairs(
    size: int, window: int, places: int, stride: int, low: int, dilation: int, spread: int
) -> int:
    """(place, window element) pairs along one axis that meet an element of the input."""
    last = (size - 1) * dilation
    return sum(
        0 <= at <= last and at % dilation == 0
        for place in range(places)
        for k in range(window)
        for at in (place * stride + k * spread - low,)
    )
