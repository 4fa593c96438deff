"""Checkpoints to damage, for the tests of their integrity. Also run as a process of its own:

python checkpoint_kit.py save FOLDER MIB      save step 1, say "ready", on a line of input save step 2
python checkpoint_kit.py restore FOLDER MIB   print as JSON which step was restored and whether it is
                                              the state that was saved
python checkpoint_kit.py meshes FOLDER        with 8 devices: save on one mesh, restore on the others
python checkpoint_kit.py process FOLDER ID N PORT   one of N processes that save and restore together
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_scaling.files import checksums
from gqa_scaling.files.array_checksums import array_checksums
from gqa_scaling.files.checkpoint import open_checkpoints


def small_state(seed: int = 0) -> Any:
    """A state of 16 KiB with every kind of array that training has, and some more."""
    key = jax.random.key(seed)
    weights = {
        "gate": jax.random.normal(key, (8, 32, 16)),
        "half": jax.random.normal(key, (8, 3), jnp.bfloat16),
    }
    moments = {"count": jnp.int32(seed + 1), "mask": jnp.array([True, False, seed % 2 == 0])}
    return weights, moments


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def save_steps(folder: Path, *steps: int, keep: int = 2) -> None:
    """Save `small_state(step)` as each of the steps."""
    with open_checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, small_state(step), {"step": step})


def files(folder: Path) -> list[str]:
    """Every file of a checkpoint but the two notes that Orbax writes at the commit."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(set(names) - set(checksums.COMMIT_NOTES))


def data_file(folder: Path) -> Path:
    """The largest file of a checkpoint that holds arrays."""
    found = (folder / "state").glob("ocdbt.process_*/d/*")
    return max(found, key=lambda path: path.stat().st_size)


def write_other_state(folder: Path, other: Path) -> None:
    """Damage that the checksums of files cannot know of: what was written is not what was saved."""
    arrays = checksums.read_seal(folder).arrays
    shutil.rmtree(folder / "state")
    shutil.copytree(other / "state", folder / "state")
    checksums.seal(folder, arrays)


def flip(file: Path, bit: int) -> None:
    """Turn one bit, counted from the start of the file and around its end."""
    data = bytearray(file.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def big_state(mib: int, step: int) -> Any:
    """Random bits, which no compression makes smaller."""
    shape = (mib, 2**18 // 4)
    return {n: jax.random.bits(jax.random.key(step * 4 + i), shape) for i, n in enumerate("abcd")}


def save(folder: Path, mib: int) -> None:
    with open_checkpoints(folder, keep=2) as checkpoints:
        if checkpoints.manager.latest_step() is None:
            checkpoints.save(1, big_state(mib, 1), {"step": 1})
            checkpoints.wait()
        state = jax.block_until_ready(big_state(mib, 2))
        print("ready", flush=True)
        sys.stdin.readline()
        checkpoints.save(2, state, {"step": 2})
        print("returned", flush=True)
        checkpoints.wait()
        print("saved", flush=True)


def restore(folder: Path, mib: int) -> None:
    with open_checkpoints(folder, keep=2) as checkpoints:
        found = checkpoints.restore_latest(abstract(big_state(mib, 1)))
        assert found is not None
        whole = same(found.state, big_state(mib, found.step)) and found.position["step"]
        print(json.dumps({"step": found.step, "same": whole == found.step, "said": found.damaged}))


# ------------------------------------------------------------------------------------ meshes

SPECS = {"gate": ("x", "y"), "half": ("y",), "count": (), "mask": ()}


def on_mesh(tree: Any, shape: tuple[int, int]) -> Any:
    """The tree, laid out over the first x * y devices."""
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("x", "y"))

    def place(path: Any, x: Any) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*SPECS[path[-1].key]))
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(place, tree)


def meshes(folder: Path) -> None:
    shapes = [(1, 1), (4, 2), (1, 8), (2, 2)]
    sums, verified, detected = [], 0, []
    for i, shape in enumerate(shapes):
        state = on_mesh(small_state(5), shape)
        sums.append(array_checksums(state).values())
        path = folder / f"{i}"
        with open_checkpoints(path, keep=3) as checkpoints:
            for step in (4, 5):
                checkpoints.save(step, on_mesh(small_state(step), shape), {"step": step})
            checkpoints.wait()
            for other in shapes:
                found = checkpoints.restore_latest(abstract(on_mesh(small_state(5), other)))
                verified += found.step == 5 and same(found.state, small_state(5))
            write_other_state(path / "5", path / "4")
            other = shapes[(i + 1) % len(shapes)]
            found = checkpoints.restore_latest(abstract(on_mesh(small_state(5), other)))
            detected.append([found.step, *found.damaged])
    equal = all(each == sums[0] for each in sums)
    print(json.dumps({"equal": equal, "verified": verified, "detected": detected}))


def process(folder: Path, me: int, everyone: int, port: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", everyone, me)
    shape = (2, jax.device_count() // 2)
    with open_checkpoints(folder, keep=3) as checkpoints:
        for step in (4, 5, 6):
            checkpoints.save(step, on_mesh(small_state(step), shape), {"step": step})
        checkpoints.wait()
        if me == 0:
            flip(folder / "6" / "state" / "manifest.ocdbt", 80)
            data_file(folder / "5").unlink()
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        found = checkpoints.restore_latest(abstract(on_mesh(small_state(4), shape)))
        here = [
            (x.addressable_shards, np.asarray(y))
            for x, y in zip(
                jax.tree.leaves(found.state), jax.tree.leaves(small_state(4)), strict=True
            )
        ]
        whole = all(
            np.asarray(s.data).tobytes() == y[s.index].tobytes()
            for shards, y in here
            for s in shards
        )
        checkpoints.save(5, on_mesh(small_state(5), shape), {"step": 5})
        checkpoints.wait()
        again = checkpoints.restore_latest(abstract(on_mesh(small_state(5), shape)))
    print(
        json.dumps({"step": found.step, "same": whole, "said": found.damaged, "again": again.step})
    )


if __name__ == "__main__":
    verb, folder, rest = sys.argv[1], Path(sys.argv[2]), [int(x) for x in sys.argv[3:]]
    if verb == "meshes":
        shutil.rmtree(folder, ignore_errors=True)
    {"save": save, "restore": restore, "meshes": meshes, "process": process}[verb](folder, *rest)
