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
from typing import NamedTuple

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
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_WIDTH = re.compile(r"^[a-z]+(\d+)")  # f32, bf16, s4, u8, c64, f8e4m3fn


# ---------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class Array:
    """Element type and dimensions of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        width = _WIDTH.match(self.dtype)
        bits = int(width[1]) if width else 8 if self.dtype == "pred" else 0  # a token has none
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
        """The names of the instructions whose values it takes."""
        return _NAME.findall(self.inside)

    @cached_property
    def called(self) -> dict[str, str]:
        """The computations it runs, by their role: calls, to_apply, body, condition."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        return [name for part in _BRANCHES.findall(self.attributes) for name in _NAME.findall(part)]


@dataclass
class Computation:
    """Instructions by name, in order; the value of `root` is returned."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def starts_asynchronous(self) -> bool:
        """Whether this is the first of the fusions of an asynchronous collective."""
        return any("AsyncCollectiveStart" in x.attributes for x in self.instructions.values())

    @cached_property
    def ends_asynchronous(self) -> bool:
        """Whether this is the last of them."""
        return any("AsyncCollectiveDone" in x.attributes for x in self.instructions.values())

    def source(self, name: str) -> Instruction:
        """The instruction that makes a value, seen through copies of it."""
        found = self.instructions[name]
        while found.opcode in ("copy", "bitcast"):
            found = self.instructions[found.operands[0]]
        return found

    def element(self, name: str) -> int | None:
        """Which element of the computation's parameter a value is; None when it is none."""
        found = self.source(name)
        if found.opcode != "get-tuple-element":
            return None
        if self.instructions[found.operands[0]].opcode != "parameter":
            return None
        index = re.search(r"\bindex=(\d+)", found.attributes)
        return int(index[1]) if index else None

    def constant(self, name: str, known: dict[int, int]) -> int | None:
        """The value of an integer constant; `known` are those among the parameter's elements."""
        found = self.source(name)
        if found.opcode == "constant":
            return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None
        element = self.element(name)
        return None if element is None else known.get(element)

    def hands_on(self, i: int) -> bool:
        """Whether this body of a loop returns element `i` of its parameter unchanged."""
        root = self.instructions[self.root]
        return root.opcode == "tuple" and self.element(root.operands[i]) == i


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the one that the program begins with."""
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
    """The instruction of a line, from what stands right of the equals sign."""
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


# ------------------------------------------------------------------------------- the program


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
    `exact` is as in `Executed`, `source` the name that the program's own code has for it.
    `overlaps` says whether the program goes on between its start and its end, and not just waits;
    `meanwhile` are the FLOPs of the matrix products between them, each time, kernels left out.
    """

    kind: str
    arrays: tuple[Array, ...]
    devices: int
    received: float
    turns: float
    exact: bool
    source: str
    overlaps: bool
    meanwhile: float

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
        """What a computation runs; `known` are the constants among its parameter's elements."""
        here = self.computations[name]
        for each in here.instructions.values():
            yield Executed(each, here, turns, exact)
            if each.opcode == "while":
                body = each.called["body"]
                start = _initial_constants(here, each, known)
                kept = {i: v for i, v in start.items() if self.computations[body].hands_on(i)}
                count = self._trips(each, start, kept)
                times = turns * (self.dynamic_turns if count is None else count)
                yield from self._walk(body, kept, times, exact and count is not None)
            elif each.opcode in ("fusion", "async-start"):
                yield from self._walk(each.called["calls"], {}, turns, exact)
            elif each.opcode in ("call", "conditional"):
                for inner in each.branches or [each.called["to_apply"]]:
                    yield from self._walk(inner, {}, turns, exact)

    def _trips(self, loop: Instruction, start: dict[int, int], kept: dict[int, int]) -> int | None:
        """How often a loop turns, None when only the data know.

        From the compiler's note if there is one. TPU programs carry none: there the condition
        compares a counter, which each turn increases by a constant, with a constant. `start` are the
        constants among the initial values of the loop, `kept` those that no turn changes.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called["condition"]]
        body = self.computations[loop.called["body"]]
        test, root = condition.instructions[condition.root], body.instructions[body.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = condition.element(test.operands[0])
        end = condition.constant(test.operands[1], kept)
        if counter is None or end is None or counter not in start or root.opcode != "tuple":
            return None
        turn = body.source(root.operands[counter])
        if turn.opcode != "add" or body.element(turn.operands[0]) != counter:
            return None
        step = body.constant(turn.operands[1], kept)
        return None if not step else max(0, math.ceil((end - start[counter]) / step))

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective operation of more than one device."""
        found = map(self._collective, range(len(self.executed)), self.executed)
        return tuple(each for each in found if each is not None)

    def _collective(self, place: int, each: Executed) -> Collective | None:
        """What runs at this place of all that is executed, if it is a collective."""
        it, here = each.instruction, each.computation
        if it.opcode == "recv" and "xla_megascale" in it.attributes:
            arrays, received = it.arrays[:1], float(it.arrays[0].bytes)
            flops = self._flops_until_done(place)
            return Collective(
                BETWEEN_SLICES, arrays, 0, received, each.turns, each.exact, "", True, flops
            )
        kind = it.opcode.removesuffix("-start")
        devices = self._group(it) if kind in COLLECTIVES else 1
        # TPU programs repeat an asynchronous one in the fusions it overlaps with and in its last.
        repeated = here.name.startswith("async_collective_fusion") or here.ends_asynchronous
        if devices == 1 or repeated:
            return None
        if kind == "all-reduce" and here.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # how TPU programs spell it: a fusion with a slice
        operands = [a for x in it.operands for a in here.instructions[x].arrays]
        # Asynchronous gathers return their operands too, before the results.
        arrays = it.arrays[-len(operands) :] if kind == "all-gather" else tuple(operands)
        total = sum(a.bytes for a in arrays)
        share = 1 if kind == "collective-permute" else (devices - 1) / devices
        received = total * share * (2 if kind == "all-reduce" else 1)
        source = _SOURCE.search(it.attributes)
        name = source[1] if source else ""
        overlaps = it.opcode.endswith("-start") or here.starts_asynchronous
        flops = self._flops_until_done(place) if overlaps else 0.0
        return Collective(
            kind, arrays, devices, received, each.turns, each.exact, name, overlaps, flops
        )

    def _flops_until_done(self, place: int) -> float:
        """FLOPs of the products that run from the start of a collective until its end, each time.

        Instructions stand in the order in which they run. The end names the start, or has the same
        channel where a TPU program spells it as fusions; 0 where there is none.
        """
        start = self.executed[place]
        channel = _CHANNEL.search(start.instruction.attributes)
        flops = 0.0
        for each in self.executed[place + 1 :]:
            it = each.instruction
            named = it.opcode.endswith("-done") and start.instruction.name in it.operands
            if named and each.computation is start.computation:
                return flops / start.turns
            if channel and each.computation.ends_asynchronous:
                other = _CHANNEL.search(it.attributes)
                if other and other[1] == channel[1]:
                    return flops / start.turns
            flops += each.turns * _flops(each)
        return 0.0

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


def _initial_constants(
    here: Computation, loop: Instruction, known: dict[int, int]
) -> dict[int, int]:
    """The integer constants among the initial values of a loop, by their place."""
    start = here.instructions[loop.operands[0]]
    values = enumerate(here.constant(x, known) for x in start.operands)
    return {i: v for i, v in values if v is not None} if start.opcode == "tuple" else {}


# ------------------------------------------------------------------------------------- FLOPs


def _flops(each: Executed) -> int:
    """FLOPs of one turn of an instruction, if it is a matrix product."""
    it = each.instruction
    if it.opcode not in ("dot", "convolution"):
        return 0
    left, right = (each.computation.instructions[x].arrays[0] for x in it.operands[:2])
    if it.opcode == "convolution":
        return _convolution_flops(it, left, right)
    summed = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", it.attributes)
    axes = [int(axis) for axis in summed[1].split(",") if axis] if summed else []
    return 2 * it.arrays[0].size * math.prod(left.dims[axis] for axis in axes)


class _Axis(NamedTuple):
    """One spatial axis of a convolution, in XLA's terms.

    The window slides over the base, between whose elements `base_dilation` - 1 holes lie, and which
    is padded by `pad_low` at its beginning.
    """

    base: int
    window: int
    output: int
    stride: int
    pad_low: int
    base_dilation: int
    window_dilation: int

    @property
    def products(self) -> int:
        """Pairs of an output and a window element that meet an element, no hole and no padding."""
        last = (self.base - 1) * self.base_dilation
        met = (
            place * self.stride + k * self.window_dilation - self.pad_low
            for place in range(self.output)
            for k in range(self.window)
        )
        return sum(0 <= at <= last and at % self.base_dilation == 0 for at in met)


def _convolution_flops(it: Instruction, left: Array, right: Array) -> int:
    """FLOPs of a convolution: two for each element of the input that meets one of the window."""
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", it.attributes)
    window = re.search(r"\bwindow=\{([^}]*)\}", it.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {it.name}")
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    base, kernel, output = labels.groups()
    spatial = sorted(c for c in kernel if c.isdigit())

    def option(name: str, i: int, default: str) -> int:
        """Of `pad=1_1x0_0` the low padding of axis i, of `stride=1x2` its stride."""
        each = options[name].split("x") if name in options else [default] * len(spatial)
        return int(each[i].split("_")[0])

    axes = (
        _Axis(
            base=left.dims[base.index(axis)],
            window=right.dims[kernel.index(axis)],
            output=it.arrays[0].dims[output.index(axis)],
            stride=option("stride", i, "1"),
            pad_low=option("pad", i, "0_0"),
            base_dilation=option("lhs_dilate", i, "1"),
            window_dilation=option("rhs_dilate", i, "1"),
        )
        for i, axis in enumerate(spatial)
    )
    products = math.prod(axis.products for axis in axes)
    batch = it.arrays[0].dims[output.index("b")]
    return 2 * batch * right.dims[kernel.index("i")] * right.dims[kernel.index("o")] * products
