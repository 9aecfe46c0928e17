"""What each further Ray actor of a simulation takes of a machine's memory, beside the first.

    python -m bench.memory --out out/memory --json out/memory.json

Actors are started one after another. Each is a Ray actor that loads CLIP ViT-B/16 as a site does (folder,
verified, sigma of both towers, basis from the cache) and trains one step of a batch of 32. The weights are
random and the basis is random numbers of a basis' shapes, for memory does not depend on their values; both
are made once under --out.

Memory is PSS, in which a page that n processes share counts 1/n to each: the sum over the actors is what they
take of the machine together. Looked at in four states of the newest: `imported`, nothing loaded; `loaded`,
its basis compared with its fingerprint; `training`, all at once, the largest sum of ten looks a second; and
`trained`, in which an actor stays between its turns until the study ends. The aim is for that one.

    sum      of all actors
    further  what the newest added to the sum of those that had trained; in `training`, to their largest
    files    of the sum, pages of the files of backbone and basis: one copy, however many actors
    private  of the newest, what it has written itself (Private_Dirty): objects of libraries, the heap
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from fedsigma.common.utils.console import print_table

ARCHITECTURE, CLASSES, MOST_SHARE = "ViT-B-16", ("a", "b", "c", "d"), 0.4
HEADS = ("actors", "state", "sum", "further", "files", "private")
STATES = ("imported", "loaded", "training", "trained")


def prepare(out: Path) -> Path:
    """Write the backbone's folder and a stand-in for its basis, as far as they are not there."""
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
    """What runs in an actor."""

    def begin(self) -> int:
        """Import what a site needs; returns the process's id."""

        return os.getpid()

    def load(self, backbone: str) -> None:
        """Build the learner as a site does."""
        from fedsigma.common.config.sigma import SigmaConfig
        from fedsigma.common.training.trainer import open_trainer

        self.learner = open_trainer(backbone, SigmaConfig(), CLASSES, tuple(f"a {c}." for c in CLASSES))

    def train(self) -> int:
        """One step on 32 random images; returns how many were made."""
        import numpy as np
        import torch

        from fedsigma.common.config.training import LocalTrainingConfig

        side = 224
        images = torch.randint(0, 256, (32, 3, side, side), dtype=torch.uint8)
        examples = [SimpleNamespace(image=image, label=i % len(CLASSES)) for i, image in enumerate(images)]
        shift = np.zeros(self.learner.layout.size, np.float32)
        done = self.learner.train(
            shift, examples, LocalTrainingConfig(), first_step=0, steps=1, total_steps=1, seed=0
        )
        return done.steps


def total_mb(pids: list[int]) -> float:
    """The memory of these processes together, PSS."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20


def at_rest(pids: list[int]) -> dict[str, float]:
    """The same, with what of it is pages of safetensors files, and what the last process has written."""
    found = {"sum": 0.0, "files": 0.0, "private": 0.0}
    for pid in pids:
        found["private"] = 0.0
        for mapped in psutil.Process(pid).memory_maps():
            found["sum"] += mapped.pss / 2**20
            found["private"] += mapped.private_dirty / 2**20
            if mapped.path.endswith(".safetensors"):
                found["files"] += mapped.pss / 2**20
    return found


def while_training(ray: Any, actors: list[Any], pids: list[int]) -> dict[str, float]:
    """Have all train at once; the most memory they had together."""
    seen, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.append(total_mb(pids))
            time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    ray.get([actor.train.remote() for actor in actors])
    ended.set()
    thread.join()
    return {"sum": max(seen)}


def measure(out: Path, count: int) -> list[dict[str, Any]]:
    """So many actors, one after another."""
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
    found: list[dict[str, Any]] = []
    before = dict.fromkeys(STATES, 0.0)
    for number in range(1, count + 1):
        actors.append(remote.remote())
        pids.append(ray.get(actors[-1].begin.remote()))
        now = {"imported": at_rest(pids)}
        ray.get(actors[-1].load.remote(f"local-dir:{folder}"))
        now |= {"loaded": at_rest(pids), "training": while_training(ray, actors, pids)}
        now["trained"] = at_rest(pids)
        for state, line in now.items():
            found.append({"actors": number, "state": state, **line, "further": line["sum"] - before[state]})
        before = {state: now[state]["sum"] for state in STATES}
        before["imported"] = before["loaded"] = before["trained"]  # the others had, when this one came
        print(f"{number}: {now['trained']['sum']:.0f} MB", file=sys.stderr, flush=True)
    ray.shutdown()
    return found


def cell(value: Any) -> str:
    """A value of the table."""
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure, print the table and say whether the aim is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/memory"))
    parser.add_argument("--actors", type=int, default=4, choices=range(2, 65), metavar="2..64")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(options.out.resolve(), options.actors)
    print_table(HEADS, [{head: cell(line.get(head, "")) for head in HEADS} for line in found])
    shares = {}
    for state in STATES:
        first, *others = (line["further"] for line in found if line["state"] == state)
        shares[state] = max(others) / first
        words = f"{state}: a further actor takes at most {shares[state]:.0%} of the first"
        met = "met: " if shares[state] <= MOST_SHARE else "MISSED: "
        print(met + words if state == "trained" else words)
    if options.json:
        options.json.write_text(json.dumps({"lines": found, "shares": shares}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
