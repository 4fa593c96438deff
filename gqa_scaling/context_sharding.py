"""Which keys each head sees, and what that costs: heterogeneous context sharding (HCS).

The query heads of one KV head read a local window and that head's own stripes of distant blocks.
The heads of a layer, and of consecutive layers, cover the context together, so that no head pays
for all of it (Lin et al. 2024, S2-Attention, arXiv 2407.17678).

Arithmetic only, no imports of arrays: where a type says `Blocks`, Python integers and arrays of
them do alike, traced ones too.

Symbols: T context length in tokens, b block size in tokens, w local blocks, W = w b, s stride in
blocks, i query block, j key block. Layers and heads count from 0.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from gqa_scaling.fields import INT32_MAX, Json, require

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
        return (j <= i) & ((i - j < self.local) | self.distant(j))

    def distant(self, j: Blocks) -> Any:
        """Whether all later queries see key block j: it is a sink or a stripe."""
        return is_distant(j, self.stride, self.offset, self.sinks)

    def key_blocks(self, i: int) -> list[int]:
        """The key blocks that query block i sees, ascending."""
        return [j for j in range(i + 1) if self.visible(i, j)]

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
        far = n - near
        total = near * (near + 1) // 2 + far * self.local
        few = _least(far, self.sinks)  # so many queries do not see all sinks yet
        total = total + few * (few + 1) // 2 + (far - few) * self.sinks
        if self.stride is not None:
            total = total + self._stripes_summed(far) - self._stripes_summed(few)
            in_sinks = stripes_before(self.sinks, self.stride, self.offset)
            total = total - (far - few) * in_sinks
        return total

    def _stripes_summed(self, m: Blocks) -> Blocks:
        """The sum of `stripes_before` over 0 .. m, a sum of floor((x + shift) / s)."""
        s, first = self.stride, -self.offset % self.stride
        end = m + s - first
        whole = end // s
        return s * whole * (whole - 1) // 2 + whole * (end - whole * s)


@dataclass(frozen=True)
class BlockPattern:
    """Any pattern of one KV head, given as the key blocks that each query block sees.

    `rows[i]` are those of query block i, in any order, as lists or tuples. A row must hold its own
    block and none after it; `UserError` names the first that does not. Inside the diagonal block
    visibility is causal by token. `require_decodable` says whether a cache can follow it.
    """

    block: int
    rows: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        _whole(self, "block", 1)
        rows = tuple(tuple(sorted(set(row))) for row in self.rows)
        require(bool(rows), "rows=() must hold the key blocks of at least one query block")
        for i, row in enumerate(rows):
            for j in row:
                require(
                    type(j) is int and 0 <= j <= i,
                    f"query block {i} lists key block {j!r}: it must be an integer from 0 to {i}, "
                    "as attention is causal",
                )
            require(i in row, f"query block {i} must list key block {i}: a token sees itself")
        object.__setattr__(self, "rows", rows)

    def key_blocks(self, i: int) -> list[int]:
        """The key blocks that query block i sees, ascending."""
        return list(self.rows[i])

    def keys(self, context: int) -> int:
        """S(T): keys read for the token at position T - 1, itself included."""
        i = self._last_block(context)
        return (len(self.rows[i]) - 1) * self.block + (context - 1) % self.block + 1

    def slots(self, context: int) -> int:
        """Tokens that a decoding cache for up to T tokens holds: the most blocks seen at once."""
        last = self._last_block(context)
        return self.block * max(len(row) for row in self.rows[: last + 1])

    def mean_keys(self, context: int) -> float:
        """Keys read for one token, a mean over the positions of a sequence of T tokens; exact."""
        b, total = self.block, 0
        for i in range(self._last_block(context) + 1):
            tokens = min(b, context - i * b)
            total += tokens * (len(self.rows[i]) - 1) * b + tokens * (tokens + 1) // 2
        return total / context

    def _last_block(self, context: int) -> int:
        longest = len(self.rows) * self.block
        require(
            0 < context <= longest,
            f"context={context} must lie between 1 and the {longest} tokens of the pattern's "
            f"{len(self.rows)} query blocks: list more",
        )
        return (context - 1) // self.block


Head: TypeAlias = HeadPattern | BlockPattern | None  # None is a dense head: it sees all before it
LayerPattern: TypeAlias = tuple[HeadPattern | None, ...]  # one for each KV head


def require_decodable(pattern: Head) -> None:
    """Raise `UserError` when a key block is needed again after a query block that did not see it.

    A cache holds what the current query block sees; what it has dropped cannot come back. Dense
    heads and every `HeadPattern` pass: windows move forward, sinks and stripes stay.
    """
    if not isinstance(pattern, BlockPattern):
        return
    seen_by: dict[int, int] = {}  # the last query block that saw each key block
    for i, row in enumerate(pattern.rows):
        for j in row:
            before = seen_by.get(j, i)
            require(
                i - before <= 1,
                f"query block {i} needs key block {j} again, which query block {before + 1} did not "
                "see: a cache has dropped it by then. Let all query blocks between see it, or keep "
                "stripes at absolute positions",
            )
            seen_by[j] = i


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

    def layer(self, layer: int, n_layers: int, n_kv_heads: int) -> LayerPattern:
        """The patterns of one layer's KV heads; all None in a dense layer.

        Raises `UserError` where the pattern does not fit the model (see `layers`).
        """
        return self.layers(n_layers, n_kv_heads)[layer]

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
        stride = self.stride or 1
        turns = -(-stride // n)
        out: list[LayerPattern] = []
        made: list[LayerPattern] = []  # of the sparse layers, which repeat after `turns`
        sparse = 0
        for layer in range(n_layers):
            if layer in dense:
                out.append((None,) * n_kv_heads)
                continue
            if sparse < turns:
                offsets = [(h * stride // n + sparse) % stride for h in range(n)]
                heads = [
                    HeadPattern(self.block, self.local, self.stride, offset, self.sinks)
                    for offset in offsets
                ]
                left = iter(heads)
                # the last heads of equal parts, so that devices which share them have the same work
                parts = math.gcd(n_kv_heads, self.dense_kv_heads)
                part = (True,) * (n // parts) + (False,) * (self.dense_kv_heads // parts)
                made.append(tuple(next(left) if is_sparse else None for is_sparse in part * parts))
            out.append(made[sparse % turns])
            sparse += 1
        return tuple(out)

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
        *words, number = term.split()
        word = " ".join(words)
        require(
            word in ("first", "last", "every", "")
            and number.isascii()
            and number.isdecimal()
            and len(number) < 10,
            f"dense_layers={self.dense_layers!r} must be a list of layer numbers, first K, last K "
            f"and every K, such as 'first 2, every 4'; {term!r} is none of them",
        )
        least = {"every": 2, "": 0}.get(word, 1)
        require(
            int(number) >= least,
            f"dense_layers={self.dense_layers!r}: {term!r} must have a number of at least {least}",
        )
        return word, int(number)


# ------------------------------------------------------------------------- what it costs


def effective_context(layers: Iterable[Sequence[Head]], context: int) -> float:
    """T_eff: keys read for the token at position T - 1, a mean over layers and KV heads.

    A dense head reads T. All query heads of a KV head read the same keys, so that the mean serves
    FLOPs and memory alike. A cache holds `slots`, at most a block a head more.
    """
    return _mean(context if head is None else head.keys(context) for head in _heads(layers))


def mean_keys(layers: Iterable[Sequence[Head]], context: int) -> float:
    """Keys read for one token of a training sequence of T tokens, a mean over positions, layers and
    KV heads; a dense head reads (T + 1) / 2."""
    dense = (context + 1) / 2
    return _mean(dense if head is None else head.mean_keys(context) for head in _heads(layers))


def density(layers: Iterable[Sequence[Head]], context: int) -> float:
    """Share of the causal query-key pairs of T tokens that some attention computes."""
    return mean_keys(layers, context) / ((context + 1) / 2)


def kv_cache_values(layers: Iterable[Sequence[Head]], context: int, head_dim: int) -> int:
    """Values in the KV caches that decode one sequence of up to T tokens: 2 d_h for each slot."""
    slots = (context if head is None else head.slots(context) for head in _heads(layers))
    return 2 * head_dim * sum(slots)


def coverage(layers: Iterable[Sequence[Head]], n_blocks: int) -> float:
    """Share of `n_blocks` blocks of context that at least one head sees from the last of them.

    `layers` may be one layer, for what its heads cover, or several.
    """
    seen: set[int] = set()
    for head in set(_heads(layers)):
        if head is None:
            return 1.0
        seen.update(head.key_blocks(n_blocks - 1))
    return len(seen) / n_blocks


def keys_by_depth(
    pattern: ContextSharding, n_kv_heads: int, context: int, most: int, training: bool = False
) -> tuple[float, ...]:
    """L T_eff of models with L = 0 .. `most` layers: keys over all layers, a mean over KV heads.

    With `training` L times `mean_keys` instead. For curves over size, which pass through every
    depth: a model too shallow for all dense layers that are named has those that it has room for.
    """
    sparse = replace(pattern, dense_layers="")
    turns = -(-(pattern.stride or 1) // (n_kv_heads - pattern.dense_kv_heads))
    mean = mean_keys if training else effective_context
    # more layers than there are would not be read
    shown = sparse.layers(max(1, min(turns, most)), n_kv_heads)
    turn = [mean([layer], context) for layer in shown]
    sums = list(itertools.accumulate(itertools.islice(itertools.cycle(turn), most), initial=0.0))
    dense = mean([(None,)], context)
    named, last = pattern._named(most)
    before = list(itertools.accumulate((k in named for k in range(most)), initial=0))
    counts = [before[max(0, L - last)] + min(last, L) for L in range(most + 1)]
    return tuple(n * dense + sums[L - n] for L, n in enumerate(counts))


def _heads(layers: Iterable[Sequence[Head]]) -> list[Head]:
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


def _whole(pattern: Any, name: str, least: int) -> None:
    value = getattr(pattern, name)
    require(
        type(value) is int and least <= value <= INT32_MAX,
        f"{name}={value!r} must be an integer of at least {least} and at most {INT32_MAX:,}",
    )


# --------------------------------------------------------------------------------- presets

PHI3_SMALL = ContextSharding(block=64, local=16, stride=8, dense_layers="every 2")


def strided(window: int = 1024, stride: int = 16, block: int = 64) -> ContextSharding:
    """Local window of `window` tokens and every `stride`-th block, all layers sparse."""
    return ContextSharding(block, _blocks_in(window, "window", block), stride)


def sliding_window(window: int, block: int = 64) -> ContextSharding:
    """Local window of `window` tokens alone, rounded to blocks."""
    return ContextSharding(block, _blocks_in(window, "window", block))


def streaming(window: int, sinks: int = 64, block: int = 64) -> ContextSharding:
    """Local window and the first `sinks` tokens (Xiao et al. 2023, arXiv 2309.17453)."""
    blocks = _blocks_in(sinks, "sinks", block)
    return ContextSharding(block, _blocks_in(window, "window", block), sinks=blocks)


def _blocks_in(tokens: int, name: str, block: int) -> int:
    require(
        block > 0 and tokens > 0 and tokens % block == 0,
        f"{name}={tokens} must be a positive multiple of block={block} tokens",
    )
    return tokens // block
