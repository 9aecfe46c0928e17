"""Judging with a finished model against plain open_clip on the same batch, in process and by HTTP.

    python -m bench.serve --json out/serve.json
    python -m bench.serve --architecture ViT-B-16 --json out/serve-b16.json

Plain is what anyone would write: the merged model, loaded by open_clip from the folder of `fedsigma export`,
encode_image and a softmax of the similarities to text features that were computed once. Ours is the judge
that `fedsigma serve` has behind its queue, given pictures as uint8, which it normalises itself. Both judge
the same batch in turns (A B B A), in the same precision, so that what else a machine does slows both.

By HTTP, clients of a real server on this machine send PNG files, one a request, or several by --per-request.
Making the files is not counted; reading and resizing them, HTTP and the clients themselves are, on the same
processor. Plain runs before and after each load. The latency is that of one client alone, over that of plain
open_clip on one picture that was read already.

With --architecture the backbone has random weights: time does not depend on their values.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fedsigma.client.inference.loaded_model import LoadedModel, export, load_model
from fedsigma.client.inference.predictor import Predictor
from fedsigma.client.serving.app import asgi
from fedsigma.client.serving.limits import Limits
from fedsigma.client.serving.service import Service, describe_model
from fedsigma.common.backbones import load_backbone, save_backbone
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.ops.web import create_server, open_listener
from fedsigma.common.registry.shift_file import save_shift
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import autocast, supports_bfloat16

CLASSES = ["neutrophil", "lymphocyte", "monocyte", "eosinophil"]
CPU = torch.device("cpu")


def finished(folder: Path, architecture: str | None) -> LoadedModel:
    """A finished model with a random shift, on the starter or on an architecture with random weights."""
    name = "starter"
    if architecture:
        torch.manual_seed(0)
        save_backbone(load_backbone(architecture, weights=False), folder / "backbone", source="random")
        name = f"local-dir:{folder / 'backbone'}"
    # The image tower's q and v alone: what is adapted does not matter once it is merged.
    selection = SigmaConfig(towers=("image",), layers="all", parts=("q", "v"))
    sigma = SigmaModel.adapt(load_backbone(name).model, selection, cache_dir=folder / "bases")
    save_shift(
        folder / "sigma.safetensors",
        0.01 * torch.randn(sigma.layout.size),
        layout_json=sigma.layout.to_json(),
        fingerprint_json=sigma.fingerprint.to_json(),
        study_yaml=f"name: bench\nbackbone: {name}\nclasses: {json.dumps(CLASSES)}\n"
        "sigma: {towers: [image], parts: [q, v]}\n",
        round=1,
    )
    return load_model(folder / "sigma.safetensors")


def plain_judge(folder: Path, prompts: list[str]) -> tuple[Callable[[Tensor], Tensor], Any]:
    """Plain open_clip on an exported folder, from normalised pictures to probabilities; its preprocessing."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
    model.eval()
    with torch.no_grad():
        text = F.normalize(model.encode_text(tokens), dim=-1)
        scale = model.logit_scale.exp()

    def judge(images: Tensor) -> Tensor:
        with torch.no_grad():
            features = F.normalize(model.encode_image(images).float(), dim=-1)
            return (scale * features @ text.T).softmax(-1)

    return judge, preprocess


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(
    plain: Callable[[], object], ours: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of plain and of ours, and the median of their ratios, plain over ours, by round."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    ratios = []
    plain(), ours()  # warm up
    for _ in range(rounds):
        here = {"plain": 0.0, "ours": 0.0}
        for form in ("plain", "ours", "ours", "plain"):
            one = timed(plain if form == "plain" else ours)
            seconds[form].append(one)
            here[form] += one
        ratios.append(here["plain"] / here["ours"])
    return statistics.median(seconds["plain"]), statistics.median(seconds["ours"]), statistics.median(ratios)


def png(seed: int, side: int) -> bytes:
    """A picture of noise as a PNG file."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def serving(judge: Predictor, restored: LoadedModel, path: Path, batch: int) -> Iterator[str]:
    """The address of a real server on this machine."""
    limits = Limits(batch_size=batch, per_client=1000, requests=1000, queue_size=4096, timeout_s=600)
    service = Service(judge, describe_model(path, restored, None, 0.0, limits), limits)
    made = create_server(asgi(service), grace_s=limits.grace_s)
    with open_listener("127.0.0.1", 0) as place:
        thread = threading.Thread(target=made.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            made.should_exit = True
            thread.join()


def load(address: str, files: list[bytes], clients: int, each: int) -> float:
    """Images a second of concurrent clients, each of which sends its share of the files, `each` a request."""
    form = [
        [("images", ("x", content)) for content in files[n : n + each]] for n in range(0, len(files), each)
    ]

    def one(requests: list[Any]) -> None:
        with httpx.Client(base_url=address, timeout=600) as client:
            for files in requests:
                client.post("/v1/predict", files=files).raise_for_status()

    with ThreadPoolExecutor(clients) as pool:
        return len(files) / timed(lambda: list(pool.map(one, [form[n::clients] for n in range(clients)])))


def alone(client: httpx.Client, content: bytes) -> float:
    """Seconds of a request of one image, while there is no other."""
    return timed(lambda: client.post("/v1/predict", files={"images": content}).raise_for_status())


def measure(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    restored = finished(folder, a.architecture)
    prompts = list(restored.study.prompts)
    merged = export(restored, folder / "merged")  # folds the shift into the model, which is then served
    plain, preprocess = plain_judge(merged, prompts)
    judge = Predictor(restored, precision=a.precision)
    side = restored.backbone.image_size
    files = [png(seed, side) for seed in range(a.images)]
    pictures = [Image.open(io.BytesIO(content)) for content in files[: a.batch]]
    bytes_ = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    normalised = torch.stack([preprocess(p) for p in pictures])

    def plain_batch(count: int = a.batch) -> Tensor:
        with autocast(a.precision, CPU):
            return plain(normalised[:count])

    apart = (plain_batch().float() - judge.probabilities(bytes_)).abs().max().item()
    by_plain, by_ours, ratio = in_turns(plain_batch, lambda: judge.probabilities(bytes_), a.rounds)
    one_plain, one_ours, one_ratio = in_turns(
        lambda: plain_batch(1), lambda: judge.probabilities(bytes_[:1]), 5 * a.rounds
    )
    with serving(judge, restored, folder / "sigma.safetensors", a.batch) as address:
        load(address, files[: 2 * a.clients], a.clients, 1)
        beside = [timed(plain_batch)]
        shares, rates = [], []
        for _ in range(3):
            rates.append(load(address, files, a.clients, a.per_request))
            beside.append(timed(plain_batch))
            shares.append(rates[-1] * (beside[-2] + beside[-1]) / 2 / a.batch)
        with httpx.Client(base_url=address, timeout=600) as client:
            alone(client, files[0])
            pairs = [(timed(lambda: plain_batch(1)), alone(client, files[0])) for _ in range(50)]
    return {
        "backbone": a.architecture or "starter",
        "batch": a.batch,
        "clients": a.clients,
        "per_request": a.per_request,
        "precision": a.precision,
        "threads": torch.get_num_threads(),
        "largest_difference": apart,
        "plain_images_per_second": a.batch / by_plain,
        "judge_images_per_second": a.batch / by_ours,
        "throughput_ratio": ratio,
        "judge_latency_ratio": 1 / one_ratio,
        "judge_latency_p50_seconds": one_ours,
        "plain_latency_p50_seconds": one_plain,
        "http_images_per_second": statistics.median(rates),
        "http_share_of_plain": statistics.median(shares),
        "http_latency_p50_seconds": statistics.median(ours for _, ours in pairs),
        "http_latency_ratio": statistics.median(ours / plain for plain, ours in pairs),
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{found['backbone']}, batch {found['batch']}, {found['precision']}, {found['threads']} threads;"
        f" {found['clients']} clients with {found['per_request']} images a request"
    )
    print(f"largest difference of a probability: {found['largest_difference']:.2g}")
    print(f"{'':26}{'images a s':>12}{'of plain':>10}{'one, ms':>10}{'of plain':>10}")
    rows = (
        ("plain open_clip", "plain", 1.0, 1.0),
        ("in process", "judge", found["throughput_ratio"], found["judge_latency_ratio"]),
        (
            f"HTTP, {found['clients']} clients",
            "http",
            found["http_share_of_plain"],
            found["http_latency_ratio"],
        ),
    )
    for name, key, share, slower in rows:
        rate, ms = found[f"{key}_images_per_second"], 1000 * found[f"{key}_latency_p50_seconds"]
        print(f"{name:26}{rate:12.1f}{share:10.3f}{ms:10.1f}{slower:10.2f}")


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--architecture", help="of open_clip, with random weights; default: the bundled starter")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--images", type=int, default=256, help="sent by HTTP")
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--per-request", type=int, default=1)
    auto = "bfloat16" if supports_bfloat16(CPU) else "float32"
    p.add_argument("--precision", choices=["float32", "bfloat16"], default=auto, help="of both")
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    """Measure and print."""
    a = arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(a, Path(folder))
    show(found)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
