"""The memory that each further Ray actor of a simulation takes, beside the first.

    python -m bench.memory --out out/memory --json out/memory.json

Actors are started one after another. Each is a Ray actor that loads CLIP ViT-B/16 as a site does (folder,
verified, sigma of both towers, basis from the cache) and trains one step of a batch of 32. Weights and basis
are random numbers of the right shapes, since memory does not depend on their values; both are written once
under --out.

Memory is PSS, in which a page shared by n processes counts 1/n to each, so that the sum over the actors
is their memory together. It is read in four states of the newest: `imported`, nothing loaded; `loaded`, its
basis compared with its fingerprint; `training`, all at once, the largest sum of ten readings a second; and
`trained`, in which an actor stays between its turns until the study ends. The aim is for that one.

    sum      of all actors
    further  what the newest added to the sum of those that had trained; in `training`, to their largest
    files    part of the sum in pages of the backbone's and basis' files: one copy, however many actors
    private  of the newest, written by itself (Private_Dirty): objects of libraries, the heap
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from bench.harness import Table, argument_parser, parse_arguments, write_json

ARCHITECTURE, CLASSES, MAX_SHARE = "ViT-B-16", ("a", "b", "c", "d"), 0.4
STATES = ("imported", "loaded", "training", "trained")
COLUMNS = {"actors": ">6", "state": "<9"} | dict.fromkeys(("sum", "further", "files", "private"), ">8,.0f")


def prepare(out: Path) -> Path:
    """Write the backbone's folder and a random basis, unless present."""
    import torch

    from fedsigma.common.backbones import load_backbone, save_backbone
    from fedsigma.common.sigma import Basis, Fingerprint, find_layout
    from fedsigma.common.sigma.basis import SVD, cache_path, weights_digest

    folder = out / "backbone"
    if not folder.exists():
        torch.manual_seed(0)
        save_backbone(load_backbone(ARCHITECTURE, weights=False), folder, source="bench/memory.py")
    model = load_backbone(f"local-dir:{folder}").model
    layout, weights = find_layout(model), weights_digest(model)
    path = cache_path(out / "cache", weights, layout)
    if not path.exists():
        svds = []
        for entry in layout.entries:
            rows, columns = entry.rows[1] - entry.rows[0], model.get_parameter(entry.weight).shape[1]
            shapes = ((rows, entry.size), (entry.size,), (entry.size, columns))
            svds.append(SVD(*(torch.randn(shape) for shape in shapes)))
        Basis(layout, tuple(svds), Fingerprint.compute(weights, layout, svds)).save(path)
    return folder


class Site:
    """The code of an actor."""

    def process_id(self) -> int:
        """Return the id of the actor's process."""
        return os.getpid()

    def load(self, backbone: str) -> None:
        """Open the trainer as a site does."""
        from fedsigma.common.config.sigma import SigmaConfig
        from fedsigma.common.training.trainer import open_trainer

        self.trainer = open_trainer(backbone, SigmaConfig(), CLASSES, tuple(f"a {c}." for c in CLASSES))

    def train(self) -> int:
        """Make one step on 32 random images; returns the number of steps."""
        import numpy as np
        import torch

        from fedsigma.common.config.training import LocalTrainingConfig

        side = 224
        images = torch.randint(0, 256, (32, 3, side, side), dtype=torch.uint8)
        examples = [SimpleNamespace(image=image, label=i % len(CLASSES)) for i, image in enumerate(images)]
        shift = np.zeros(self.trainer.layout.size, np.float32)
        done = self.trainer.train(
            shift, examples, LocalTrainingConfig(), first_step=0, steps=1, total_steps=1, seed=0
        )
        return done.steps


def total_mb(pids: list[int]) -> float:
    """Return the memory of these processes together, PSS."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20


def at_rest(pids: list[int]) -> dict[str, float]:
    """Return the same, its part in pages of safetensors files, and private memory of the last process."""
    memory = {"sum": 0.0, "files": 0.0, "private": 0.0}
    for pid in pids:
        memory["private"] = 0.0
        for mapped in psutil.Process(pid).memory_maps():
            memory["sum"] += mapped.pss / 2**20
            memory["private"] += mapped.private_dirty / 2**20
            if mapped.path.endswith(".safetensors"):
                memory["files"] += mapped.pss / 2**20
    return memory


def while_training(ray: Any, actors: list[Any], pids: list[int]) -> dict[str, float]:
    """Let all train at once; returns the largest sum of their memory."""
    sums, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.is_set():
            sums.append(total_mb(pids))
            time.sleep(0.1)

    thread = threading.Thread(target=sample)
    thread.start()
    ray.get([actor.train.remote() for actor in actors])
    ended.set()
    thread.join()
    return {"sum": max(sums)}


def measure(out: Path, count: int) -> list[dict[str, Any]]:
    """Start so many actors one after another; returns a row for each and state."""
    import ray

    folder = prepare(out)
    environment = {"FEDSIGMA_CACHE": str(out / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(
        num_cpus=count,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    remote = ray.remote(num_cpus=1)(Site)
    actors: list[Any] = []
    pids: list[int] = []
    rows: list[dict[str, Any]] = []
    before = dict.fromkeys(STATES, 0.0)
    for number in range(1, count + 1):
        actors.append(remote.remote())
        pids.append(ray.get(actors[-1].process_id.remote()))
        states = {"imported": at_rest(pids)}
        ray.get(actors[-1].load.remote(f"local-dir:{folder}"))
        states |= {"loaded": at_rest(pids), "training": while_training(ray, actors, pids)}
        states["trained"] = at_rest(pids)
        for state, memory in states.items():
            further = memory["sum"] - before[state]
            rows.append({"actors": number, "state": state, **memory, "further": further})
        before = {state: states[state]["sum"] for state in STATES}
        before["imported"] = before["loaded"] = before["trained"]  # the state of the others from here
        print(f"{number}: {states['trained']['sum']:.0f} MB", file=sys.stderr, flush=True)
    ray.shutdown()
    return rows


def main() -> None:
    """Measure, and print the table and whether the aim is met."""
    p = argument_parser(__doc__, out="out/memory")
    p.add_argument("--actors", type=int, default=4, choices=range(2, 65), metavar="2..64")
    options = parse_arguments(p)
    rows = measure(options.out, options.actors)
    table = Table(COLUMNS)
    table.rows([row.get(name) for name in COLUMNS] for row in rows)
    shares = {}
    for state in STATES:
        first, *others = (row["further"] for row in rows if row["state"] == state)
        shares[state] = max(others) / first
        text = f"{state}: a further actor takes at most {shares[state]:.0%} of the first"
        met = "met: " if shares[state] <= MAX_SHARE else "MISSED: "
        print(met + text if state == "trained" else text)
    write_json(options.json, {"lines": rows, "shares": shares})


if __name__ == "__main__":
    main()
