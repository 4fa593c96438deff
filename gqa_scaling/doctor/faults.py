"""Known faults of the libraries below: is this machine touched, do they show here, are we hit?

Each fault has three questions. Which versions and devices have it is what its report says, or what
was seen of the compiler. `show` runs the smallest program that tells: what should come out against
what does. `hit` looks at this project's own programs as they are compiled here, with what is done
against the fault in place. Only a fault that shows, or may, *and* hits our programs is an error.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_scaling.config import UserError
from gqa_scaling.devices.compiler_flags import (
    NATIVE_ATOMICS,
    Version,
    between,
    overlap_fault,
    version_of,
)
from gqa_scaling.devices.layout import AXES
from gqa_scaling.doctor import programs
from gqa_scaling.doctor.speeds import seconds
from gqa_scaling.model.attention import attend

SLOWER = 30  # times: one place against many. With the GPU's own addition it is a few


@dataclass(frozen=True)
class Answer:
    """Whether something is so, None where it cannot be told here, and what was seen."""

    yes: bool | None
    seen: str


@dataclass(frozen=True)
class Fault:
    """`source` is the report; versions of `package` from `since` on and before `until` have it, on
    devices of the `platform` whose kind has `kind` in it."""

    name: str
    about: str
    source: str
    platform: str
    package: str
    done: str  # against it, by this project
    show: Callable[[], Answer]
    hit: Callable[[], Answer]
    since: Version | None = None
    until: Version | None = None
    kind: str = ""

    def touches(self, platform: str, kind: str, version: Version | None) -> bool:
        """Whether devices of a platform and kind with that version of the package have it."""
        here = platform == self.platform and self.kind in kind.lower()
        return here and between(version, self.since, self.until)


@dataclass(frozen=True)
class Diagnosis:
    """What became of the three questions. Faults of other platforms are not looked for."""

    fault: Fault
    touched: bool
    shown: Answer
    hit: Answer

    @property
    def wrong(self) -> bool:
        """Whether runs of this project would suffer here."""
        return self.shown.yes is not False and self.hit.yes is True


def diagnose() -> list[Diagnosis]:
    """Every known fault on the devices that jax has."""
    device = jax.devices()[0]
    return [_diagnosis(each, device) for each in FAULTS]


def _diagnosis(fault: Fault, device: jax.Device) -> Diagnosis:
    touched = fault.touches(device.platform, device.device_kind, version_of(fault.package))
    if device.platform != fault.platform:
        return Diagnosis(fault, touched, *2 * (Answer(None, f"needs a {fault.platform.upper()}"),))
    return Diagnosis(fault, touched, fault.show(), fault.hit())


# ------------------------------------------------------------------------------------ on GPUs


def _one_place_against_many(f: Callable, places: int, width: int) -> Answer:
    """Whether `f(places, values)` takes much longer where all 40,960 values go to one place."""
    values = jnp.ones((1, 40960, width), jnp.float32)
    many = jnp.arange(values.shape[1], dtype=jnp.int32)[None] % places
    one, spread = seconds(f, 0 * many, values), seconds(f, many, values)
    return Answer(one > SLOWER * spread, f"{one / spread:.1f} times as long in one row as in many")


def scatter_shows() -> Answer:
    @jax.jit
    def scatter(places_BT: jax.Array, values_BTD: jax.Array) -> jax.Array:
        return jnp.zeros((4096, values_BTD.shape[-1])).at[places_BT].add(values_BTD)

    found = _one_place_against_many(scatter, 4096, 1)
    set_here = NATIVE_ATOMICS in os.environ.get("XLA_FLAGS", "")
    return Answer(found.yes, found.seen + (", with the flag against it" if set_here else ""))


def scatter_hits() -> Answer:
    found = [
        _one_place_against_many(programs.embedding_gradient(rows, programs.WIDTH), rows, 64)
        for rows in (programs.VOCABULARY, 4096)
    ]
    seen = "; ".join(f"{each.seen}" for each in found)
    return Answer(any(each.yes for each in found), f"our embedding, 264 and 4,096 rows: {seen}")


# ------------------------------------------------------------------------------------ on TPUs


def overlap_shows() -> Answer:
    count = len(jax.devices())
    if count == 1:
        return Answer(None, "needs several devices")
    shape = (1, 256 * count, 1, 2, 64)
    q = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    k = q[:, :, :, 0]
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1, count, 1), AXES)
    try:
        with jax.set_mesh(mesh):
            outputs = [
                jax.jit(functools.partial(attend, implementation=name))(q, k, k)
                for name in ("splash", "blockwise")
            ]
    except UserError as refused:
        return Answer(None, str(refused))
    error = float(jnp.max(jnp.abs(outputs[0].astype(jnp.float32) - outputs[1])))
    return Answer(not error < 0.1, f"splash over {count} devices is off by {error:.2g}")


def overlap_hits() -> Answer:
    found = overlap_fault(jax.devices()[0].device_kind, "splash", len(jax.devices()))
    return Answer(False, f"refused: {found}" if found else "the two groups of flags are not set")


def motion_shows() -> Answer:
    """Sums in a scan, of whole numbers, as numpy adds them."""
    count = len(jax.devices())
    if count == 1:
        return Answer(None, "needs several devices")
    mesh = Mesh(np.array(jax.devices()), ("d",))
    rng = np.random.default_rng(0)
    rows, batch = 24 * count, 4 * count
    places = rng.integers(0, rows, (2, batch, 8), dtype=np.int32)
    values = rng.integers(-9, 9, (2, batch, 8, 256)).astype(np.float32)
    expected = np.zeros((rows, 256), np.float32)
    np.add.at(expected, places, values)
    split, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("d",), (None, "d")))

    @functools.partial(jax.jit, out_shardings=split)
    def gradient(table: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
        def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            _, back = jax.vjp(lambda table: table[part[0]], table)
            return total + back(part[1])[0], None

        return jax.lax.scan(add, jnp.zeros_like(table), (places, values))[0]

    table = jax.device_put(np.zeros_like(expected), split)
    found = gradient(table, jax.device_put(places, parts), jax.device_put(values, parts))
    wrong = int((np.asarray(found) != expected).sum())
    return Answer(wrong > 0, f"{wrong:,} of {expected.size:,} sums are wrong")


def motion_hits() -> Answer:
    if len(jax.devices()) == 1:
        return Answer(False, "one device sums nothing over devices")
    shape = (programs.VOCABULARY, programs.WIDTH)
    moved = programs.moved_out(programs.step(), shape, programs.MICROBATCHES)
    return Answer(moved > 0, f"{moved} sums of the embedding's gradient are moved out of the loop")


def tied_shows() -> Answer:
    taken, steps = programs.finite_steps()
    return Answer(taken < steps, f"{taken} of {steps} steps with remat and tied tables are finite")


def tied_hits() -> Answer:
    return Answer(False, "a step that is not finite changes nothing, and several end the run")


def gather_shows() -> Answer:
    """The gradient of x[:, i, :], not jitted."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 8, 128)), jnp.float32)
    _, back = jax.vjp(lambda x: x[:, jnp.arange(8), :], jnp.zeros_like(x))
    wrong = int((np.asarray(back(x)[0]) != np.asarray(x)).sum())
    return Answer(wrong > 0, f"{wrong:,} of {x.size:,} gradients are wrong")


def gather_hits() -> Answer:
    """Our own gather of rows, jitted as in every step: of whole numbers, as numpy adds them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, programs.VOCABULARY, (4, 512), dtype=np.int32)
    dx = rng.integers(-9, 9, (4, 512, programs.WIDTH)).astype(np.float32)
    expected = np.zeros((programs.VOCABULARY, programs.WIDTH), np.float32)
    np.add.at(expected, tokens, dx)
    found = programs.embedding_gradient(*expected.shape)(tokens, dx)
    wrong = int((np.asarray(found) != expected).sum())
    return Answer(wrong > 0, f"{wrong:,} of {expected.size:,} sums of our embedding are wrong")


# ------------------------------------------------------------------------------------ on CPUs


def fusion_shows() -> Answer:
    """Squares of numbers, by a product with the identity: the last is 32,768 squared."""
    n = 2**15 + 1
    x_ND = np.zeros((n, 3), np.float32)
    x_ND[:, 0] = np.arange(n)
    found_N = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x_ND)
    wrong = np.flatnonzero(np.asarray(found_N) != x_ND[:, 0] ** 2)
    if not len(wrong):
        return Answer(False, f"all {n:,} sums are right")
    i = wrong[0]
    return Answer(True, f"sum {i:,} is {found_N[i]:.0f} and should be {i**2:.0f}")


def fusion_hits() -> Answer:
    fusions = programs.ynn_fusions(programs.step())
    hit = sum(each.sums_products_over_rows for each in fusions)
    return Answer(
        hit > 0, f"{hit} of {len(fusions)} fusions of our step sum a product over its rows"
    )


_RANK_7 = """
import jax, jax.numpy as jnp
x = jnp.ones((3, 1, 2, 2, 8, 8, 8))
print(float(jnp.max(jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(x, x))))
"""


def rank_shows() -> Answer:
    """In a process of its own, which it may end."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _RANK_7]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(True, "a sum over an axis of seven hangs")
    if done.returncode or done.stdout.strip() != "2.0":
        said = f"ends the process with {done.returncode}" if done.returncode else done.stdout
        return Answer(True, f"a sum over an axis of seven {said}")
    return Answer(False, "a sum over an axis of seven is right")


def rank_hits() -> Answer:
    rank = max((each.rank for each in programs.ynn_fusions(programs.step())), default=0)
    return Answer(rank >= 7, f"arrays that our step sums there have {rank} axes at the most")


FAULTS = (
    Fault(
        "slow scatter",
        "float32 sums at colliding places are hundreds of times slower",
        "openxla/xla 46225, jax 38806",
        "gpu",
        "jaxlib",
        "a product where the vocabulary is small, else a flag for the GPU's own addition",
        scatter_shows,
        scatter_hits,
        since=(0, 10, 2),
        until=(0, 11, 1),
    ),
    Fault(
        "overlap flags",
        "two groups of flags together turn sequence-parallel splash into NaN",
        "jax 38741",
        "tpu",
        "jax",
        "runs under both groups of flags are refused",
        overlap_shows,
        overlap_hits,
        since=(0, 10, 2),
        until=(0, 11),
        kind="v6",
    ),
    Fault(
        "moved sums",
        "an embedding's gradient summed in a scan is wrong once its all-reduce is moved out",
        "openxla/xla 49143, seen with libtpu 0.0.48",
        "tpu",
        "libtpu",
        "steps with accumulation are compiled without that pass",
        motion_shows,
        motion_hits,
    ),
    Fault(
        "tied tables",
        "gradients of tied embeddings with remat are NaN now and then",
        "jax 35409, open",
        "tpu",
        "libtpu",
        "such a step is skipped and logged; several in a row end the run",
        tied_shows,
        tied_hits,
    ),
    Fault(
        "eager gather",
        "gradients of a gather outside jit are 0 in half of the rows",
        "jax 39025, open",
        "tpu",
        "libtpu",
        "every gradient is taken under jit",
        gather_shows,
        gather_hits,
        since=(0, 0, 42),
    ),
    Fault(
        "wrong fusion",
        "products that are summed over rows are wrong in the last of many",
        "jax 39103",
        "cpu",
        "jaxlib",
        "no such fusion arises in our programs; XLA_FLAGS="
        "--xla_cpu_experimental_ynn_fusion_type=-reduce takes it away",
        fusion_shows,
        fusion_hits,
        since=(0, 10, 2),
        until=(0, 11),
    ),
    Fault(
        "seven axes",
        "sums over arrays of seven axes crash",
        "jax 39257, jax 40412",
        "cpu",
        "jaxlib",
        "our arrays have fewer axes",
        rank_shows,
        rank_hits,
        since=(0, 10, 2),
        until=(0, 11, 1),
    ),
)
