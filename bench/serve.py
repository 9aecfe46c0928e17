"""Prediction with a finished model against plain open_clip on the same batch, in process and by HTTP.

    python -m bench.serve --json out/serve.json
    python -m bench.serve --architecture ViT-B-16 --json out/serve-b16.json

Plain is the usual script: the merged model, loaded by open_clip from the folder of `fedsigma model export`,
encode_image and a softmax of the similarities to precomputed text features. Ours is the predictor behind the
queue of `fedsigma serve`, given images as uint8, which it normalises itself. Both predict the same batch in
turns (A B B A), in the same precision, so that other work on the machine slows both.

By HTTP, clients of a real server on this machine send PNG files, one a request, or several by --per-request.
The files are made beforehand; decoding and resizing them, HTTP and the clients count, on the same processor.
Plain runs before and after each load. The latency is that of one client alone, over that of plain open_clip
on one decoded image.

With --architecture the backbone has random weights: time does not depend on their values.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import threading
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

from bench.harness import Table, alternate, argument_parser, parse_arguments, timed, write_json
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


def finished_model(folder: Path, architecture: str | None) -> LoadedModel:
    """Return a model with a random shift, on the starter or on an architecture with random weights."""
    name = "starter"
    if architecture:
        torch.manual_seed(0)
        save_backbone(load_backbone(architecture, weights=False), folder / "backbone", source="random")
        name = f"local-dir:{folder / 'backbone'}"
    # Only the image tower's q and v: the adapted part does not matter once it is merged.
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


def plain_predictor(folder: Path, prompts: list[str]) -> tuple[Callable[[Tensor], Tensor], Any]:
    """Load plain open_clip from an exported folder: normalised images to probabilities, and its transform."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
    model.eval()
    with torch.no_grad():
        text = F.normalize(model.encode_text(tokens), dim=-1)
        scale = model.logit_scale.exp()

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            features = F.normalize(model.encode_image(images).float(), dim=-1)
            return (scale * features @ text.T).softmax(-1)

    return predict, preprocess


def compare(
    plain: Callable[[], object], ours: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Return the median seconds of plain and of ours, and the median ratio of a round, plain over ours."""
    plain(), ours()  # warm up
    pairs = [alternate(plain, ours) for _ in range(rounds)]
    medians = (statistics.median(t for pair in pairs for t in pair[form]) for form in (0, 1))
    return *medians, statistics.median(sum(first) / sum(second) for first, second in pairs)


def png(seed: int, side: int) -> bytes:
    """Return an image of noise as a PNG file."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def serving(predictor: Predictor, model: LoadedModel, path: Path, batch: int) -> Iterator[str]:
    """Run a real server on this machine; yields its address."""
    limits = Limits(batch_size=batch, per_client=1000, requests=1000, queue_size=4096, timeout_s=600)
    service = Service(predictor, describe_model(path, model, None, 0.0, limits), limits)
    web_server = create_server(asgi(service), grace_s=limits.grace_s)
    with open_listener("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=web_server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            web_server.should_exit = True
            thread.join()


def load(address: str, files: list[bytes], clients: int, each: int) -> float:
    """Return the images a second of concurrent clients that share the files, `each` a request."""
    forms = [
        [("images", ("x", content)) for content in files[n : n + each]] for n in range(0, len(files), each)
    ]

    def send(requests: list[Any]) -> None:
        with httpx.Client(base_url=address, timeout=600) as client:
            for form in requests:
                client.post("/v1/predict", files=form).raise_for_status()

    with ThreadPoolExecutor(clients) as pool:
        return len(files) / timed(lambda: list(pool.map(send, [forms[n::clients] for n in range(clients)])))


def single_request(client: httpx.Client, content: bytes) -> float:
    """Return the seconds of a request of one image, without other requests."""
    return timed(lambda: client.post("/v1/predict", files={"images": content}).raise_for_status())


def measure(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    model = finished_model(folder, a.architecture)
    merged = export(model, folder / "merged")  # merges the shift into the model that is then served
    plain, preprocess = plain_predictor(merged, list(model.study.prompts))
    predictor = Predictor(model, precision=a.precision)
    side = model.backbone.image_size
    files = [png(seed, side) for seed in range(a.images)]
    images = [Image.open(io.BytesIO(content)) for content in files[: a.batch]]
    raw = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    normalised = torch.stack([preprocess(image) for image in images])

    def plain_batch(count: int = a.batch) -> Tensor:
        with autocast(a.precision, CPU):
            return plain(normalised[:count])

    difference = (plain_batch().float() - predictor.probabilities(raw)).abs().max().item()
    by_plain, by_ours, ratio = compare(plain_batch, lambda: predictor.probabilities(raw), a.rounds)
    one_plain, one_ours, one_ratio = compare(
        lambda: plain_batch(1), lambda: predictor.probabilities(raw[:1]), 5 * a.rounds
    )
    with serving(predictor, model, folder / "sigma.safetensors", a.batch) as address:
        load(address, files[: 2 * a.clients], a.clients, 1)
        plain_seconds = [timed(plain_batch)]
        shares, rates = [], []
        for _ in range(3):
            rates.append(load(address, files, a.clients, a.per_request))
            plain_seconds.append(timed(plain_batch))
            shares.append(rates[-1] * statistics.mean(plain_seconds[-2:]) / a.batch)
        with httpx.Client(base_url=address, timeout=600) as client:
            single_request(client, files[0])
            pairs = [(timed(lambda: plain_batch(1)), single_request(client, files[0])) for _ in range(50)]
    return {
        "backbone": a.architecture or "starter",
        "batch": a.batch,
        "clients": a.clients,
        "per_request": a.per_request,
        "precision": a.precision,
        "threads": torch.get_num_threads(),
        "largest_difference": difference,
        "plain_images_per_second": a.batch / by_plain,
        "predictor_images_per_second": a.batch / by_ours,
        "throughput_ratio": ratio,
        "predictor_latency_ratio": 1 / one_ratio,
        "predictor_latency_p50_seconds": one_ours,
        "plain_latency_p50_seconds": one_plain,
        "http_images_per_second": statistics.median(rates),
        "http_share_of_plain": statistics.median(shares),
        "http_latency_p50_seconds": statistics.median(ours for _, ours in pairs),
        "http_latency_ratio": statistics.median(ours / plain for plain, ours in pairs),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{figures['backbone']}, batch {figures['batch']}, {figures['precision']},"
        f" {figures['threads']} threads;"
        f" {figures['clients']} clients with {figures['per_request']} images a request"
    )
    print(f"largest difference of a probability: {figures['largest_difference']:.2g}")
    columns = {"": "<26", "images a s": ">11.1f", "of plain": ">9.3f", "one, ms": ">9.1f"}
    table = Table(columns | {" of plain": ">9.2f"})
    for name, key, share, latency in (
        ("plain open_clip", "plain", 1.0, 1.0),
        ("in process", "predictor", figures["throughput_ratio"], figures["predictor_latency_ratio"]),
        (
            f"HTTP, {figures['clients']} clients",
            "http",
            figures["http_share_of_plain"],
            figures["http_latency_ratio"],
        ),
    ):
        milliseconds = 1000 * figures[f"{key}_latency_p50_seconds"]
        table.row(name, figures[f"{key}_images_per_second"], share, milliseconds, latency)


def main() -> None:
    """Measure and print."""
    p = argument_parser(__doc__, rounds=15, rounds_help="rounds of the comparison in process")
    p.add_argument("--architecture", help="of open_clip, with random weights; default: the bundled starter")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--images", type=int, default=256, help="sent by HTTP")
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--per-request", type=int, default=1)
    auto = "bfloat16" if supports_bfloat16(CPU) else "float32"
    p.add_argument("--precision", choices=["float32", "bfloat16"], default=auto, help="of both")
    options = parse_arguments(p)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    show(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
