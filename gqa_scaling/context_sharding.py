"""Which keys each head sees, and how many: heterogeneous context sharding (HCS).

The query heads of one KV head read a local window and that head's own stripes of distant blocks.
The heads of a layer, and of consecutive layers, cover the context together, so that no head pays
for all of it (Lin et al. 2024, S2-Attention, arXiv 2407.17678). `HeadPattern` is what one KV head
sees, `ContextSharding` what a model declares; the functions after them count keys over its layers.

Arithmetic only, no imports of arrays: where a type says `Blocks`, Python integers and arrays of
them do alike, traced ones too.

Symbols: T context length in tokens, b block size in tokens, w local blocks, W = w b, s stride in
blocks, i query block, j key block. Layers and heads count from 0.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from gqa_scaling.fields import INT32_MAX, Json, UserError, require

MOST_PATTERN_HEADS = 2**16  # KV heads of all layers that a pattern is worked out for, one by one

Blocks: TypeAlias = Any  # an integer or an array of them


@dataclass(frozen=True)
class HeadPattern:
    """What the query heads of one KV head see, in blocks of `block` tokens.

    Query block i sees key block j <= i when i - j < `local` (its own block counts), when
    j < `sinks`, or when j is a stripe: (j + `offset`) % `stride` == 0. Inside the diagonal block
    visibility is causal by token. Stripes lie at absolute positions, so that a key block once
    dropped is never needed again. `stride` None: no stripes.
    """

    block: int
    local: int
    stride: int | None = None
    offset: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        _check_blocks(self)
        _whole(self, "offset", 0)
        if self.stride is None:
            require(self.offset == 0, f"offset={self.offset} must be 0 where stride is None")
        else:
            require(
                self.offset < self.stride,
                f"offset={self.offset} must be less than stride={self.stride}: stripes repeat there",
            )

    @property
    def window(self) -> int:
        """W: tokens in the local blocks."""
        return self.local * self.block

    def hides(self, context: int) -> bool:
        """Whether any of `context` queries does not see all before it."""
        return _hides(self, context)

    def visible(self, i: Blocks, j: Blocks) -> Any:
        """Whether query block i sees key block j; arrays broadcast."""
        distant = is_distant(j, self.stride, self.offset, self.sinks)
        return (j <= i) & ((i - j < self.local) | distant)

    def live_blocks(self, i: Blocks) -> Blocks:
        """How many key blocks query block i sees, its own included."""
        local = _least(i + 1, self.local)
        return local + distant_before(i + 1 - local, self.stride, self.offset, self.sinks)

    def keys(self, context: Blocks) -> Blocks:
        """S(T): keys read for the token at position T - 1, itself included.

        At multiples of b it is b x `live_blocks`, about W + (T - W) / s.
        """
        i = (context - 1) // self.block
        return (self.live_blocks(i) - 1) * self.block + (context - 1) % self.block + 1

    def slots(self, context: Blocks) -> Blocks:
        """Tokens that a decoding cache for up to T tokens holds: a ring of w blocks and the most
        distant blocks that any offset needs.

        W + b ceil((T - W) / (b s)) without sinks: `keys` where T is a multiple of b and s divides
        the distant blocks, at most one block more elsewhere, whatever the offset.
        """
        blocks = -(-context // self.block)
        distant = blocks - _least(blocks, self.local)
        kept = distant_before(distant, None, 0, self.sinks)
        if self.stride is not None:
            kept = kept + -(-(distant - kept) // self.stride)
        return _least(context, self.window) + self.block * kept

    def mean_keys(self, context: Blocks) -> Any:
        """Keys read for one token, a mean over the positions of a sequence of T tokens; exact.

        For T >= W it is about W (1 - W / 2T) + (T - W)^2 / (2 T s), where causal dense attention
        reads (T + 1) / 2.
        """
        b, n, rest = self.block, context // self.block, context % self.block
        pairs = (self._live_blocks_before(n) - n) * b * b + n * b * (b + 1) // 2
        pairs = pairs + rest * (self.live_blocks(n) - 1) * b + rest * (rest + 1) // 2
        return pairs / context

    def _live_blocks_before(self, n: Blocks) -> Blocks:
        """The sum of `live_blocks` over the query blocks i < n."""
        near = _least(n, self.local)
        far = n - near  # of these queries some key blocks lie before the window
        total = near * (near + 1) // 2 + far * self.local
        few = _least(far, self.sinks)  # so many queries do not see all sinks yet
        total = total + few * (few + 1) // 2 + (far - few) * self.sinks
        if self.stride is not None:
            stripes = self.stride, self.offset
            total = total + _stripes_summed(far, *stripes) - _stripes_summed(few, *stripes)
            total = total - (far - few) * stripes_before(self.sinks, *stripes)
        return total


LayerPattern: TypeAlias = tuple[HeadPattern | None, ...]  # one for each KV head; None is dense


@dataclass(frozen=True)
class ContextSharding(Json):
    """Which keys every head of a model sees.

    In a sparse layer `dense_kv_heads` KV heads, spread evenly, are dense, the others have the window,
    stripes and sinks of a `HeadPattern`. The n sparse heads spread their offsets evenly over the
    stride, s / n apart, and each sparse layer shifts them by one block more than the sparse layer
    before: the heads of any ceil(s / n) consecutive sparse layers see every block, even for n = 1.

    `dense_layers` names the layers that stay dense, "" for none: a list of layer numbers,
    "first K", "last K" and "every K" (layers K - 1, 2 K - 1, ...), such as "first 2, every 4".
    """

    block: int
    local: int
    stride: int | None = None
    sinks: int = 0
    dense_kv_heads: int = 0
    dense_layers: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_blocks(self)
        _whole(self, "dense_kv_heads", 0)
        terms = [" ".join(term.split()) for term in self.dense_layers.split(",") if term.strip()]
        known = dict.fromkeys(map(self._term, terms))  # one spelling, one digest
        spelt = ", ".join(f"{word} {number}".strip() for word, number in known)
        object.__setattr__(self, "dense_layers", spelt)

    @property
    def label(self) -> str:
        """One line for people, such as b64 w16 s8 +dense every 2; two patterns never share one.

        Blocks of b tokens, w of them local, a stripe each s blocks, k sinks, then what is dense.
        """
        parts = [f"b{self.block} w{self.local}"]
        parts += [f"s{self.stride}"] if self.stride is not None else []
        parts += [f"k{self.sinks}"] if self.sinks else []
        parts += [f"+{self.dense_kv_heads} dense KV"] if self.dense_kv_heads else []
        parts += [f"+dense {self.dense_layers}"] if self.dense_layers else []
        return " ".join(parts)

    def __lt__(self, other: "ContextSharding") -> bool:
        """An order for tables: by blocks, window, stride (none first) and the rest."""
        return self._order < other._order

    @property
    def _order(self) -> tuple:
        sparse = (self.block, self.local, self.stride or 0, self.sinks)
        return (*sparse, self.dense_kv_heads, self.dense_layers)

    def hides(self, context: int) -> bool:
        """Whether any of `context` queries does not see all before it in a sparse layer."""
        return _hides(self, context)

    def layers(self, n_layers: int, n_kv_heads: int) -> tuple[LayerPattern, ...]:
        """The patterns of all layers of a model.

        Raises `UserError` when a dense layer is not there, or nothing sparse is left.
        """
        dense = self._dense(n_layers)
        require(
            len(dense) < n_layers,
            f"dense_layers={self.dense_layers!r} makes all {n_layers} layers dense: name fewer, or "
            "leave out the pattern",
        )
        n = n_kv_heads - self.dense_kv_heads
        require(
            n > 0,
            f"dense_kv_heads={self.dense_kv_heads} must be less than n_kv_heads={n_kv_heads}: leave "
            "out the pattern for a dense model",
        )
        require(
            n_layers * n_kv_heads <= MOST_PATTERN_HEADS,
            f"a pattern may have at most {MOST_PATTERN_HEADS:,} KV heads in all layers, not n_layers="
            f"{n_layers} times n_kv_heads={n_kv_heads}",
        )
        sparse = itertools.cycle(self.sparse_layers(n_kv_heads))
        every_head_dense = (None,) * n_kv_heads
        return tuple(every_head_dense if k in dense else next(sparse) for k in range(n_layers))

    def sparse_layers(self, n_kv_heads: int) -> Iterator[LayerPattern]:
        """The sparse layers one after another, until they repeat."""
        n, stride = n_kv_heads - self.dense_kv_heads, self.stride or 1
        # The last heads of equal parts are dense, so that devices which share them have equal work.
        parts = math.gcd(n_kv_heads, self.dense_kv_heads)
        part = (True,) * (n // parts) + (False,) * (self.dense_kv_heads // parts)
        for turn in range(-(-stride // n)):
            heads = (
                HeadPattern(
                    self.block,
                    self.local,
                    self.stride,
                    (h * stride // n + turn) % stride,
                    self.sinks,
                )
                for h in range(n)
            )
            yield tuple(next(heads) if is_sparse else None for is_sparse in part * parts)

    def _dense(self, n_layers: int) -> set[int]:
        named, last = self._named(n_layers)
        beyond = min((k for k in named if k >= n_layers), default=None)
        require(
            beyond is None,
            f"dense_layers={self.dense_layers!r} names layer {beyond}, but the {n_layers} layers "
            f"are 0 to {n_layers - 1}",
        )
        return named | set(range(max(0, n_layers - last), n_layers))

    def _named(self, n_layers: int) -> tuple[set[int], int]:
        """The dense layers counted from the first on, listed ones all, and how many last ones."""
        named: set[int] = set()
        last = 0
        for term in self.dense_layers.split(", ") if self.dense_layers else []:
            word, k = self._term(term)
            if word == "every":
                named.update(range(k - 1, n_layers, k))
            elif word == "first":
                named.update(range(min(k, n_layers)))
            elif word == "last":
                last = max(last, k)
            else:
                named.add(k)
        return named, last

    def _term(self, term: str) -> tuple[str, int]:
        """("first" | "last" | "every" | "", number) of one part of `dense_layers`."""
        found = re.fullmatch(r"(?:(first|last|every) )?([0-9]{1,9})", term)
        if found is None:
            raise UserError(
                f"dense_layers={self.dense_layers!r} must be a list of layer numbers, first K, last "
                f"K and every K, such as 'first 2, every 4'; {term!r} is none of them"
            )
        word, number = found[1] or "", int(found[2])
        least = {"every": 2, "": 0}.get(word, 1)
        require(
            number >= least,
            f"dense_layers={self.dense_layers!r}: {term!r} must have a number of at least {least}",
        )
        return word, number


# ------------------------------------------------------------------ keys over layers and heads


def effective_context(layers: Iterable[LayerPattern], context: int) -> float:
    """T_eff: keys read for the token at position T - 1, a mean over layers and KV heads.

    A dense head reads T. All query heads of a KV head read the same keys, so that the mean serves
    FLOPs and memory alike. A cache holds `slots`, at most a block a head more.
    """
    return _mean(context if head is None else head.keys(context) for head in _heads(layers))


def mean_keys(layers: Iterable[LayerPattern], context: int) -> float:
    """Keys read for one token of a training sequence of T tokens, a mean over positions, layers and
    KV heads; a dense head reads (T + 1) / 2."""
    dense = (context + 1) / 2
    return _mean(dense if head is None else head.mean_keys(context) for head in _heads(layers))


def density(layers: Iterable[LayerPattern], context: int) -> float:
    """Share of the causal query-key pairs of T tokens that some attention computes."""
    return mean_keys(layers, context) / ((context + 1) / 2)


def kv_cache_values(layers: Iterable[LayerPattern], context: int, head_dim: int) -> int:
    """Values in the KV caches that decode one sequence of up to T tokens: 2 d_h for each slot."""
    slots = (context if head is None else head.slots(context) for head in _heads(layers))
    return 2 * head_dim * sum(slots)


def keys_by_depth(
    pattern: ContextSharding, n_kv_heads: int, context: int, most: int, training: bool = False
) -> tuple[float, ...]:
    """L T_eff of models with L = 0 .. `most` layers: keys over all layers, a mean over KV heads.

    With `training` it is L times `mean_keys` instead. Curves over size need it, as they pass through
    every depth: a model too shallow for all dense layers that are named has those it has room for.
    """
    sparse = replace(pattern, dense_layers="")
    turns = -(-(pattern.stride or 1) // (n_kv_heads - pattern.dense_kv_heads))
    mean = mean_keys if training else effective_context
    # no more layers are worked out than the deepest model has
    shown = sparse.layers(max(1, min(turns, most)), n_kv_heads)
    turn = [mean([layer], context) for layer in shown]
    sums = list(itertools.accumulate(itertools.islice(itertools.cycle(turn), most), initial=0.0))
    dense = mean([(None,)], context)
    named, last = pattern._named(most)
    before = list(itertools.accumulate((k in named for k in range(most)), initial=0))
    counts = [before[max(0, L - last)] + min(last, L) for L in range(most + 1)]
    return tuple(n * dense + sums[L - n] for L, n in enumerate(counts))


def _heads(layers: Iterable[LayerPattern]) -> list[HeadPattern | None]:
    return [head for layer in layers for head in layer]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# --------------------------------------------------------------------------- block arithmetic


def is_distant(j: Blocks, stride: int | None, offset: Blocks, sinks: int) -> Any:
    """Whether all later queries see key block j: it is a sink or a stripe."""
    sink = j < sinks
    return sink if stride is None else sink | ((j + offset) % stride == 0)


def distant_before(m: Blocks, stride: int | None, offset: Blocks, sinks: int) -> Blocks:
    """How many of the key blocks j < m are sinks or stripes."""
    first = _least(m, sinks)
    if stride is None:
        return first
    return first + stripes_before(m, stride, offset) - stripes_before(first, stride, offset)


def distant_block(n: Blocks, stride: int | None, offset: Blocks, sinks: int) -> Blocks:
    """The n-th key block, from 0, that is a sink or a stripe; nonsense past the last one."""
    if stride is None:
        return n
    stripe = sinks + -(offset + sinks) % stride
    return n + (stripe - n + (n - sinks) * stride) * (n >= sinks)


def stripes_before(m: Blocks, stride: int, offset: Blocks) -> Blocks:
    """How many of the key blocks j < m are stripes: (j + offset) % stride == 0."""
    first = -offset % stride
    return (m + stride - 1 - first) // stride


def _stripes_summed(m: Blocks, stride: int, offset: int) -> Blocks:
    """The sum of `stripes_before` over 0 .. m: one of floor((x + shift) / stride)."""
    end = m + stride - -offset % stride
    whole = end // stride
    return stride * whole * (whole - 1) // 2 + whole * (end - whole * stride)


def _least(a: Blocks, b: Blocks) -> Blocks:
    return b + (a - b) * (a < b)


def _hides(pattern: HeadPattern | ContextSharding, context: int) -> bool:
    return pattern.local * pattern.block < context and pattern.stride != 1


def _check_blocks(pattern: Any) -> None:
    _whole(pattern, "block", 1)
    _whole(pattern, "local", 1)
    _whole(pattern, "sinks", 0)
    if pattern.stride is not None:
        _whole(pattern, "stride", 1)
        most = INT32_MAX // pattern.block
        require(
            pattern.stride <= most,
            f"stride={pattern.stride} must be at most {most:,} blocks of {pattern.block}: positions are "
            "int32, and a stripe beyond them would be taken for one near the beginning",
        )


def _whole(pattern: Any, name: str, least: int) -> None:
    value = getattr(pattern, name)
    require(
        type(value) is int and least <= value <= INT32_MAX,
        f"{name}={value!r} must be an integer of at least {least} and at most {INT32_MAX:,}",
    )
